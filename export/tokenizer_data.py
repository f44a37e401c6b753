"""The tokenizer of a checkpoint as keys of a model file: `tokenizer.ggml.*`, and `pocketlm.tokenizer.*` for all else.

In: a tokenizer's file, given by the user or found beside the checkpoint. Out: GGUF keys. They are read back with
`pocketlm.tokenizer.from_metadata` and compared on twenty texts, which go into the file, with their ids. Knows no tensors.
"""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pocketlm.errors import FileError, refused
from pocketlm.export.checkpoint import Checkpoint, read_json
from pocketlm.runtime.file_mapping import map_file
from pocketlm.tokenizer import Tokenizer, from_metadata, load, to_metadata
from pocketlm.tokenizer.base import NORMAL, USER_DEFINED
from pocketlm.tokenizer.byte_bpe import ByteBPE
from pocketlm.tokenizer.characters import from_json
from pocketlm.tokenizer.gguf_vocabulary_writer import OURS
from pocketlm.tokenizer.readers import find_in

PUBLISHED = ("gpt2",)  # names that --tokenizer takes: tiktoken fetches and keeps these
NONE = "none"  # what --tokenizer says for a model without one
CHARACTER_TABLES = ("stoi", "itos", "chars")  # entries that checkpoints of character models hold themselves
ROUNDED, MOST_SPARE = 128, 1.1  # token tables are rounded up for speed, or have a few rows for later
GPT2_ROWS = (50257, 50304)  # nanoGPT rounds GPT-2's vocabulary up
GPT2_END = {"<|endoftext|>": 50256}  # OpenAI's rank files leave it out
MAX_TEMPLATE = 1 << 20

TEST_TEXTS = (
    "Hello, world!", "Once upon a time there was a little girl named Lily.",
    "I'm sure they'll say it's fine; we've been there.",
    "  two spaces before, two after  ", "a\nb\n\nc\r\nd\te", "0 1 12 123 1234 12345 3.14159 1,000,000",
    "İstanbul'da güneşli bir gün, ığdır çayı.",
    "Zażółć gęślą jaźń", "Съешь ещё этих мягких французских булок", "今天天气很好，我们去公园玩吧。", "日本語のテキスト",
    "안녕하세요",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈", "def f(x):\n    return x ** 2  # square", "http://example.com/?q=a&b=c#d",
    "ALL CAPS, CamelCase, snake_case, kebab-case",
    "e\u0301 é ﬁ ½ ①", "\"Quotes\" 'single' «guillemets» “curly”", " leading space", "…—–·•",
)  # fmt: skip


def find_tokenizer(checkpoint: Checkpoint, n_vocab: int, given: str | Path | None) -> tuple[dict[str, Any], list[str]]:
    """The tokenizer's keys, and notes for the user. `given`: a file, a folder, a name or "none"; None: look beside the
    checkpoint.

    `n_vocab`: rows of the token table, to which the vocabulary is filled up. Raises FileError if there is no tokenizer, or one
    that does not fit the model.
    """
    if given is not None and str(given) == NONE:
        return {}, ["it has no tokenizer: it can be run with token ids only"]
    path = Path(given) if given is not None else _beside(checkpoint)
    tokenizer = load_named(path) if path is not None else _own_characters(checkpoint)
    if tokenizer is None:
        is_gpt2 = n_vocab in GPT2_ROWS
        kind = "GPT-2's tokenizer.json, or its vocab.json with merges.txt beside it," if is_gpt2 else "its tokenizer's file"
        advice = f"give {kind} with --tokenizer FILE, or --tokenizer {NONE}"
        raise FileError(checkpoint.path, "no tokenizer was found beside it", advice)
    taken = [f"its tokenizer is {path}"] if given is None and path is not None else []
    path = path or checkpoint.path
    if isinstance(tokenizer, ByteBPE) and tokenizer.n_vocab == 50256 < n_vocab and path.is_file():
        tokenizer = load(path, special_tokens=GPT2_END)
    if left_out := _added_beyond(tokenizer, n_vocab):
        taken.append(f"its token table has no rows for {', '.join(left_out)}, which {path.name} adds: left out")
        tokenizer = _first(tokenizer, n_vocab, path)
    if tokenizer.n_vocab > n_vocab:
        problem = f"it has {tokenizer.n_vocab} tokens, but the model's token table {n_vocab} rows"
        raise FileError(path, problem, "give the model's own tokenizer with --tokenizer FILE")
    keys, notes = with_tests(to_metadata(tokenizer, n_vocab) | _end_ids(checkpoint, tokenizer, n_vocab), tokenizer, path)
    if n_vocab > max(-(-tokenizer.n_vocab // ROUNDED) * ROUNDED, MOST_SPARE * tokenizer.n_vocab):
        rows = f"{tokenizer.n_vocab} tokens for {n_vocab} rows of the token table"
        notes.append(f"{path.name} has {rows}: is it this model's tokenizer?")
    if template := chat_template(path if path.is_dir() else path.parent):
        keys["tokenizer.chat_template"] = template
    return keys, taken + notes


def load_named(name: str | Path) -> Tokenizer:
    """`tokenizer.load(name)`; a tokenizer of PUBLISHED if there is no such file. Raises FileError."""
    if str(name) not in PUBLISHED or Path(name).exists():
        return load(name)
    instead = "give its files: tokenizer.json, or vocab.json with merges.txt"
    try:
        import tiktoken

        encoding = tiktoken.get_encoding(str(name))
    except ImportError:
        raise FileError(name, "is fetched by the package tiktoken", f"pip install tiktoken, or {instead}") from None
    except Exception as error:  # whatever stands between here and the network
        raise FileError(name, f"could not be fetched by tiktoken ({type(error).__name__})", instead) from None
    with TemporaryDirectory() as folder:
        lines = (b"%s %d" % (b64encode(token), rank) for token, rank in encoding._mergeable_ranks.items())
        (file := Path(folder, str(name))).write_bytes(b"\n".join(lines))
        return load(file, pattern=encoding._pat_str, special_tokens=encoding._special_tokens)


def _added_beyond(tokenizer: Tokenizer, n_vocab: int) -> list[str]:
    """The markers beyond the rows of the token table, where nothing else is: who adds one seldom makes the table larger."""
    beyond = range(n_vocab, tokenizer.n_vocab)
    types, tokens = tokenizer.vocabulary.types, tokenizer.vocabulary.tokens
    return [ascii(tokens[i]) for i in beyond[:5]] if NORMAL not in types[n_vocab:] and len(beyond) < n_vocab // 2 else []


def _first(tokenizer: Tokenizer, n_vocab: int, path: Path) -> Tokenizer:
    """The tokenizer without the tokens behind the first `n_vocab`."""
    keys = to_metadata(tokenizer, tokenizer.n_vocab)
    for name in ("tokens", "token_type", "scores"):
        if (name := f"tokenizer.ggml.{name}") in keys:
            keys[name] = keys[name][:n_vocab]
    for name in (OURS + "strip_left", OURS + "strip_right", OURS + "normalized"):
        if name in keys:
            keys[name] = keys[name][keys[name] < n_vocab]
    ids = {f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "unknown")}
    return from_metadata({key: value for key, value in keys.items() if key not in ids or value < n_vocab}, path)


def _beside(checkpoint: Checkpoint) -> Path | None:
    """A tokenizer's file in the checkpoint's folder, or in the folder of nanoGPT's data set."""
    if found := find_in(checkpoint.folder):
        return found
    training = checkpoint.config.get("config")
    data_set = training.get("dataset") if isinstance(training, dict) else None
    if isinstance(data_set, str) and Path(data_set).name == data_set != "..":
        for root in (checkpoint.folder, checkpoint.folder.absolute().parent):
            if (file := root / "data" / data_set / "meta.pkl").is_file():
                return file
    return None


def _own_characters(checkpoint: Checkpoint) -> Tokenizer | None:
    """A tokenizer of the characters that the checkpoint itself lists, if it does."""
    for level in (checkpoint.config, *(v for v in checkpoint.config.values() if isinstance(v, dict))):
        tables = {name: list(level[name]) if isinstance(level.get(name), str) else level.get(name) for name in CHARACTER_TABLES}
        if any(isinstance(table, (dict, list)) for table in tables.values()):
            return from_json(checkpoint.path, tables)
    return None


def _end_ids(checkpoint: Checkpoint, tokenizer: Tokenizer, n_vocab: int) -> dict[str, Any]:
    """Keys of begin and end tokens that the model's configuration names, or a text; further ends end a turn."""
    beside = checkpoint.folder / "generation_config.json"
    said = [
        config
        for config in (read_json(beside) if beside.is_file() else None, checkpoint.config.get("config.json"))
        if isinstance(config, dict)
    ]

    def ids(name: str) -> list[int]:
        values = next((config[name] for config in said if config.get(name) is not None), [])
        return [i for i in (values if isinstance(values, list) else [values]) if type(i) is int and 0 <= i < n_vocab]

    keys: dict[str, Any] = {}
    ends = ids("eos_token_id")
    if not ends and len(tokenizer.vocabulary.end_ids) == 1:  # <|endoftext|>, most often: by its text the only one
        ends = [*tokenizer.vocabulary.end_ids]
    if tokenizer.eos_id is None and ends:
        keys["tokenizer.ggml.eos_token_id"] = ends[0]
    others = [i for i in ends if i != keys.get("tokenizer.ggml.eos_token_id", tokenizer.eos_id)]
    keys |= {f"tokenizer.ggml.{name}_token_id": i for name, i in zip(("eot", "eom"), others, strict=False)}
    if others[2:]:
        keys[OURS + "end_ids"] = np.array(others[2:], np.int32)
    if tokenizer.bos_id is None and ids("bos_token_id"):
        keys["tokenizer.ggml.bos_token_id"] = ids("bos_token_id")[0]
    return keys


def chat_template(folder: Path) -> str | None:
    """The chat template among a folder's tokenizer files. Raises FileError for a file that is damaged."""
    if (file := folder / "chat_template.jinja").is_file():
        with refused(file):
            return bytes(map_file(file)[:MAX_TEMPLATE]).decode()
    if not (file := folder / "tokenizer_config.json").is_file():
        return None
    config = read_json(file)
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):  # several, each with a name
        rows = [row for row in template if isinstance(row, dict)]
        template = next((row.get("template") for row in rows if row.get("name") == "default"), None)
    return template if isinstance(template, str) else None


# ── the texts that travel along ────────────────────────────────────────────────────────────────────────────────────────


def with_tests(keys: dict[str, Any], tokenizer: Tokenizer, path: Path) -> tuple[dict[str, Any], list[str]]:
    """The keys with test texts and their ids, and a note about texts that the keys would encode differently."""
    written = from_metadata(keys, path)
    texts, ids, differ = [], [], []
    for text in test_texts(tokenizer):
        expected = tokenizer.encode(text)
        if written.encode(text) == expected:
            texts.append(text)
            ids.append(" ".join(map(str, expected)))
        else:
            differ.append(ascii(text))
    notes = [f"the tokenizer cannot be written exactly: other ids for {', '.join(differ)}"] if differ else []
    return {**keys, "pocketlm.tokenizer.test_texts": texts, "pocketlm.tokenizer.test_ids": ids}, notes


def test_texts(tokenizer: Tokenizer) -> list[str]:
    """Twenty texts that the tokenizer can encode: without the characters that it lacks, and the last with user-defined symbols,
    or with what its normalizer replaces, if there are any.
    """
    vocabulary = tokenizer.vocabulary
    usable = [vocabulary.tokens[i] for i in vocabulary.ids_of(NORMAL)]
    wanted = [*TEST_TEXTS[:-1], " ".join(what for what, _ in vocabulary.normalizer.replacements[:40]) or TEST_TEXTS[-1]]
    texts = [tokenizer.encodable(text) or "".join(usable[number::7][:40]) for number, text in enumerate(wanted)]
    if symbols := [vocabulary.tokens[i] for i in vocabulary.ids_of(USER_DEFINED)]:
        texts[-1] = f"one {symbols[0]} two{symbols[-1]} three"
    return texts
