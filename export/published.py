"""Published tokenizers by name, such as gpt2. In: a name or a path. Out: a `Tokenizer`. tiktoken fetches and caches them."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from tempfile import TemporaryDirectory

from pocketlm import tokenizer
from pocketlm.errors import FileError
from pocketlm.tokenizer import Tokenizer

NAMES = ("gpt2",)
INSTEAD = "give its files: tokenizer.json, or vocab.json with merges.txt"


def load(name: str | Path) -> Tokenizer:
    """`tokenizer.load(name)`; a tokenizer of NAMES if there is no such file. Raises FileError."""
    if str(name) not in NAMES or Path(name).exists():
        return tokenizer.load(name)
    try:
        import tiktoken

        encoding = tiktoken.get_encoding(str(name))
    except ImportError:
        raise FileError(name, "is fetched by the package tiktoken", f"pip install tiktoken, or {INSTEAD}") from None
    except Exception as error:  # whatever stands between here and the network
        raise FileError(name, f"could not be fetched by tiktoken ({type(error).__name__})", INSTEAD) from None
    with TemporaryDirectory() as folder:
        lines = (b"%s %d" % (b64encode(token), rank) for token, rank in encoding._mergeable_ranks.items())
        (file := Path(folder, str(name))).write_bytes(b"\n".join(lines))
        return tokenizer.load(file, pattern=encoding._pat_str, special_tokens=encoding._special_tokens)
