"""Opens a tokenizer, whatever file it is in: a path in, a `Tokenizer` out.

The kind of file is told by how it begins, not by its name. Every reader checks what it is given: a vocabulary from a
stranger is data, nothing in it is run, and its patterns are compared with those known here and never compiled.
"""

import base64
import binascii
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocketlm.errors import FileError, UsageError, refused
from pocketlm.tokenizer import byte_bpe, characters, huggingface, llama2c, sentencepiece_model
from pocketlm.tokenizer.base import CONTROL, NORMAL, UNUSED, Tokenizer, make_vocabulary
from pocketlm.tokenizer.gguf_vocabulary_reader import from_metadata
from pocketlm.tokenizer.merge import concatenation_table
from pocketlm.tokenizer.pretokenize import PRE_TOKENIZERS, name_of_patterns

_MAX_BYTES = 256 * 10**6  # the largest published tokenizer.json has 35 MB
# what is looked for in a folder, in this order
BESIDE = (
    "tokenizer.json", "tokenizer.model", "*.model", "vocab.json", "encoder.json", "*-vocab.json", "meta.pkl", "*.tiktoken",
    "tokenizer.bin", "gpt2_tokenizer.bin", "tokenizer.pkl",
)  # fmt: skip
_IN_FOLDER = (*BESIDE, "*.gguf")
_MERGES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}  # ends of the names of files that belong together
# beginnings of the names of published rank files → pre-tokenizer; cl100k's is not in the table and refused so
_TIKTOKEN_FILES = {
    "gpt2": "gpt-2", "r50k": "gpt-2", "p50k": "gpt-2", "qwen": "qwen2", "cl100k": "cl100k", "o200k": "gpt-4o",
}  # fmt: skip
# Meta's tokenizer.model of Llama 3 is such a file, too, known by its number of ranks; its markers are in Meta's code alone
_LLAMA3_RANKS = 128000
_LLAMA3_MARKERS = (
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id", "step_id",
    "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", "image",
    *(f"reserved_special_token_{i}" for i in range(2, 246)),
)  # fmt: skip
_LLM_C, _LLM_C_HEADER = struct.pack("<i", 20240328), 1024  # of its gpt2_tokenizer.bin


def load(
    path: str | os.PathLike[str], *, pattern: str | None = None, special_tokens: Mapping[str, int] | None = None
) -> Tokenizer:
    """The tokenizer of a GGUF (one with a vocabulary only will do) or a packed program, a Hugging Face `tokenizer.json`, a
    SentencePiece `.model`, tiktoken ranks, GPT-2's `vocab.json` with its `merges.txt` (or `encoder.json` with `vocab.bpe`)
    beside it, the `vocab.json` of an fp16 bin, nanoGPT's `meta.pkl`, nanochat's `tokenizer.pkl`, llama2.c's `tokenizer.bin`,
    llm.c's `gpt2_tokenizer.bin`, or a folder that holds one.

    `pattern` (a name of the pre-tokenizer table or the expression itself; by the file's name where it is missing,
    else `gpt-2`) and `special_tokens` (marker → id) are for tiktoken ranks, whose files do not hold them.
    Raises FileError for a file that cannot be used, UsageError for an unknown pattern.
    """
    path = Path(path)
    if path.is_dir():
        if (found := find_in(path, _IN_FOLDER)) is None:
            raise FileError(path, "holds no tokenizer", "looked for " + ", ".join(_IN_FOLDER))
        path = found
    from pocketlm.runtime import model_file

    if model_file.begins_as_one(path):
        with model_file.open_model(path) as file:
            return from_metadata(file.metadata, path)
    data = _read(path)
    if llama2c.looks_like(data):
        return llama2c.read(path, data)
    if data.startswith(_LLM_C):
        return _llm_c(path, data)
    if data.startswith(b"\x80"):
        return _from_pickle(path, data)
    if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        return _from_json(path, characters.parse_json(path, data))
    if data.startswith(b"\x0a"):
        return sentencepiece_model.read(path, data)
    return _tiktoken(path, data, pattern, special_tokens or {})


def _read(path: Path) -> bytes:
    """What is in a file."""
    with refused(path, "check the path and the permissions", kinds=(OSError, ValueError)):
        if not path.exists():
            raise FileError(path, "there is no such file", "check the path")
        if not path.is_file():
            raise FileError(path, "is not a file")
        if path.stat().st_size > _MAX_BYTES:
            raise FileError(path, f"is larger than any vocabulary ({_MAX_BYTES // 10**6} MB)")
        data = path.read_bytes()
    if not data:
        raise FileError(path, "is empty")
    return data


def find_in(folder: Path, names: Sequence[str] = BESIDE) -> Path | None:
    """The first tokenizer's file in a folder, of `names` in their order; None where there is none."""
    found = (sorted(file for file in folder.glob(name) if file.is_file()) for name in names)
    return next((files[0] for files in found if files), None)


def _from_json(path: Path, value: Any) -> Tokenizer:
    if isinstance(value, dict) and isinstance(value.get("model"), dict):
        return huggingface.from_tokenizer_json(path, value)
    if isinstance(value, dict) and not isinstance(value.get("pieces"), int | None):  # GPT-2's vocabulary has a word "pieces"
        return _fp16_bin(path, value)
    if isinstance(value, dict) and isinstance(value.get("vocab"), list) and "config" in value:
        raise FileError(path, "is Mistral's own tekken.json, which is not read", "give the tokenizer.json that lies beside it")
    for end, other in _MERGES.items():
        merges = path.with_name(path.name.removesuffix(end) + other)
        if path.name.endswith(end) and merges.is_file():
            return huggingface.from_vocab_and_merges(path, value, merges, _read(merges))
    return characters.from_json(path, value)


def _fp16_bin(path: Path, value: dict[str, Any]) -> Tokenizer:
    """`pieces`, `scores`, `types` and `merges`; under `metadata`, there or in the `config.json` beside it, what else a GGUF
    file would say, with the same keys.

    Without that: SentencePiece BPE with `<s>`, `</s>` and the piece of type 2 as its bos, eos and unknown tokens.
    """
    config = path.with_name("config.json")
    if "metadata" not in value and config.is_file():
        beside = characters.parse_json(config, _read(config))
        value = {**value, "metadata": beside.get("metadata", {}) if isinstance(beside, dict) else {}}
    pieces, metadata = value["pieces"], value.get("metadata", {})
    if not isinstance(metadata, dict) or not isinstance(pieces, list):
        raise FileError(path, "its pieces are not a list or its metadata is not an object")
    said = {f"tokenizer.ggml.{name}_token_id": pieces.index(text) for name, text in _BIN_ENDS.items() if text in pieces}
    columns = {"tokens": pieces, **{name: value.get(key) for name, key in _BIN_COLUMNS.items()}}
    keys = {"tokenizer.ggml." + key: column for key, column in columns.items() if column is not None}
    return from_metadata({"tokenizer.ggml.model": "llama", **(said if not metadata else {}), **metadata, **keys}, path)


def to_json(keys: Mapping[str, Any]) -> str:
    """The keys of a tokenizer (`to_metadata`) as such a file, with all of them in it."""
    plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in keys.items()}
    columns = {"tokenizer.ggml." + key: name for key, name in {"tokens": "pieces", **_BIN_COLUMNS}.items()}
    value = {name: plain.pop(key) for key, name in columns.items() if key in plain}
    return json.dumps({**value, "metadata": plain}, ensure_ascii=False)


_BIN_ENDS = {"bos": "<s>", "eos": "</s>"}
_BIN_COLUMNS = {"scores": "scores", "token_type": "types", "merges": "merges"}


def _tiktoken(path: Path, data: bytes, pattern: str | None, special_tokens: Mapping[str, int]) -> Tokenizer:
    """Lines `base64 rank`; the rank is the id and the order of merging."""
    ids: dict[str, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            i = int(rank) if rank.isdigit() and len(rank) < 10 else -1
        except (ValueError, binascii.Error):
            token, i = b"", -1
        if i < 0 or not token:
            if number == 1:
                raise FileError(path, "is no tokenizer pocketlm knows", "see `pocketlm tokenize --help`")
            raise FileError(path, f"line {number} is not a token in base64 and its rank")
        text = token.decode("latin-1").translate(byte_bpe.TO_LETTERS)
        if text in ids:
            raise FileError(path, f"line {number} gives the token of rank {ids[text]} another rank")
        ids[text] = i
    if pattern is None and len(ids) == _LLAMA3_RANKS:
        own = {f"<|{name}|>": _LLAMA3_RANKS + i for i, name in enumerate(_LLAMA3_MARKERS)}
        pattern, special_tokens = "llama-bpe", special_tokens or own
    if pattern is None:
        pattern = next((name for start, name in _TIKTOKEN_FILES.items() if path.name.startswith(start)), "gpt-2")
    name = pattern if pattern in PRE_TOKENIZERS else name_of_patterns(pattern)
    if name is None:
        raise UsageError(f"the pattern {pattern[:80]!r} is not known; known are " + ", ".join(PRE_TOKENIZERS))
    return _from_ranks(path, ids, name, special_tokens)


def _llm_c(path: Path, data: bytes) -> Tokenizer:
    """GPT-2's tokens in the order of their ids, a byte for the length of each in front: that order is the one of merging."""
    at, tokens = _LLM_C_HEADER, list[bytes]()
    while at < len(data):
        tokens.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    ids = {token.decode("latin-1").translate(byte_bpe.TO_LETTERS): i for i, token in enumerate(tokens)}
    if at != len(data) or data[8:12] != struct.pack("<i", len(ids)) or len(ids) != len(tokens) or "" in ids:
        raise FileError(path, "is no whole gpt2_tokenizer.bin of llm.c", "copy it again")
    end = "<|endoftext|>"
    special_tokens = {end: ids.pop(end)} if end in ids else {}
    return _from_ranks(path, ids, "gpt-2", special_tokens)


def _from_pickle(path: Path, data: bytes) -> Tokenizer:
    """A pickled `tiktoken.Encoding`, which has pattern and markers, or nanoGPT's characters."""
    from pocketlm.pickle_reader import Record, read_pickle

    value = read_pickle(data, path, {})[0]  # it may call nothing
    if not isinstance(value, Record):
        return characters.from_json(path, value)
    ranks, pattern, markers = (value.fields.get(name) for name in ("mergeable_ranks", "pat_str", "special_tokens"))
    if not isinstance(ranks, dict) or not isinstance(pattern, str) or not isinstance(markers, dict):
        problem = f"holds a {value.name[:80]!r}, which is no tokenizer pocketlm knows"
        raise FileError(path, problem, "see `pocketlm tokenize --help`")
    if set(map(type, ranks)) - {bytes} or set(map(type, [*ranks.values(), *markers.values()])) - {int} or b"" in ranks:
        raise FileError(path, "its ranks are not a table from bytes to numbers")
    name = name_of_patterns(pattern)
    if name is None:
        raise FileError(path, f"its pattern {pattern[:80]!r} is not known", "known are " + ", ".join(PRE_TOKENIZERS))
    ids = {token.decode("latin-1").translate(byte_bpe.TO_LETTERS): i for token, i in ranks.items()}
    return _from_ranks(path, ids, name, markers)


def _from_ranks(path: Path, ids: Mapping[str, int], name: str, special_tokens: Mapping[str, int]) -> Tokenizer:
    """Byte-level BPE whose ids are the order of merging; `name`: of its pre-tokenizer."""
    missing = [byte for byte, letter in enumerate(byte_bpe.LETTERS) if letter not in ids]
    if missing:
        raise FileError(path, f"it has no token for the byte 0x{missing[0]:02X}")
    if set(special_tokens) & set(ids):
        raise UsageError(f"a special token is a token of {path} already")
    tokens = characters.place_tokens(path, {**ids, **special_tokens})
    types = bytearray(NORMAL if token else UNUSED for token in tokens)
    for i in special_tokens.values():
        types[i] = CONTROL
    eos_id = special_tokens.get("<|endoftext|>", special_tokens.get("<|end_of_text|>"))
    bos_id = special_tokens.get("<|begin_of_text|>", special_tokens.get("<|endoftext|>"))
    adds_bos = "<|bos|>" in special_tokens or "<|begin_of_text|>" in special_tokens  # nanochat's and Llama 3's
    bos_id = special_tokens.get("<|bos|>", bos_id)
    vocabulary = make_vocabulary(path, tokens, bytes(types), bos_id=bos_id, eos_id=eos_id, adds_bos=adds_bos)
    mergeable = vocabulary.index.without(list(special_tokens.values()))
    table = concatenation_table(vocabulary.tokens.__getitem__, mergeable, range(len(tokens)), len(tokens), ties=False)
    return byte_bpe.ByteBPE(vocabulary, table, byte_bpe.Options(name, whole_words_first=True))
