"""Pre-tokenizers of byte-level BPE: one table, name → regular expressions that cut a text into words.

In: a text. Out: its words; nothing is lost, what no expression matches is a word of its own. Knows no ids.
The names are those of `tokenizer.ggml.pre`; the same table maps the `pre_tokenizer` of a Hugging Face
`tokenizer.json`, whose expressions are compared as text and never run when they are not known here.
"""

from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any

from pocketlm.errors import FileError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Single digits first and then the GPT-2 expression on what is between them: there a text ends before each digit.
_DIGITS_GPT2 = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "llama-bpe": (_CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST,),
    "qwen2": (_CONTRACTIONS + _WORDS + r"\p{N}" + _REST,),
    "smollm": (_DIGITS_GPT2,),
    "starcoder": (_DIGITS_GPT2,),
    "refact": (_DIGITS_GPT2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
# A word that is a token as a whole is taken as it is, whatever the merges say (llama.cpp, Llama 3).
WHOLE_WORDS_FIRST = frozenset({"llama-bpe"})

# Other ways to write the same expressions, as files from elsewhere do → name; the table's own are known as they are.
OTHER_WRITINGS = {
    # OpenAI's gpt2 and r50k_base
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""": "gpt-2",
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""": "gpt-2",
}


def name_of_pattern(pattern: str) -> str | None:
    """The name of the pre-tokenizer that is exactly this one expression, None where none is."""
    own = (name for name, patterns in PRE_TOKENIZERS.items() if patterns == (pattern,))
    return next(own, OTHER_WRITINGS.get(pattern))


def check_name(name: str, path: object) -> None:
    """FileError unless `name` is a pre-tokenizer of the table."""
    if name not in PRE_TOKENIZERS:
        raise FileError(path, f"its pre-tokenizer {name[:80]!r} is not known", "known are " + ", ".join(PRE_TOKENIZERS))


@cache
def splitter(name: str) -> Callable[[str], list[str]]:
    """The function text → words of a pre-tokenizer of the table."""
    import regex

    first, *others = (regex.compile(pattern) for pattern in PRE_TOKENIZERS[name])
    if not others:
        return first.findall  # the single expressions of the table match every character

    def split(text: str) -> list[str]:
        words = [text]
        for pattern in (first, *others):
            words = list(chain.from_iterable(_isolate(pattern, word) for word in words))
        return words

    return split


def _isolate(pattern: Any, text: str) -> list[str]:
    """The matches of `pattern` and what is between them, in order."""
    pieces, end = [], 0
    for match in pattern.finditer(text):
        if match.start() > end:
            pieces.append(text[end : match.start()])
        pieces.append(match.group())
        end = match.end()
    if end < len(text):
        pieces.append(text[end:])
    return pieces
