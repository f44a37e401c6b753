"""Reads the fp16 bin: a folder of `config.json`, `vocab.json` and `weights.bin`, with the weights memory-mapped.

In: the folder. Out: an object like `runtime/gguf_reader.py`'s, with the same metadata keys and with F16 tensors. Knows nothing
about architectures or tokenizers. The layout is documented in `export/README.md`.

The files are not trusted: every name, shape and offset is checked against the real size of `weights.bin` before use.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.errors import FileError, refused
from pocketlm.runtime.file_mapping import MappedModel, map_file, unmap
from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.gguf_strings import Buffer
from pocketlm.runtime.tensor import Tensor

CONFIG, VOCAB, WEIGHTS = "config.json", "vocab.json", "weights.bin"
FORMAT_NAME = "pocketlm-fp16"
# keys of the model file that live in vocab.json -> their names there
VOCAB_KEYS = {
    "tokenizer.ggml.tokens": "pieces",
    "tokenizer.ggml.scores": "scores",
    "tokenizer.ggml.token_type": "types",
    "tokenizer.ggml.merges": "merges",
}
_BROKEN = "the folder is damaged or was written by another program: export the model again"
_MAX_JSON_BYTES = 1 << 28  # the largest vocabularies take 20 MB


def is_fp16_bin(path: Path) -> bool:
    """Whether this is such a folder, by the names in it."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def open_fp16_bin(path: str | Path) -> MappedModel:
    """Open and check a folder. Raises FileError for anything that is not a whole, sound fp16 bin."""
    path = Path(path)
    config = _read_json(path / CONFIG)
    if config.get("format") != FORMAT_NAME or config.get("version") != 1:
        raise FileError(path / CONFIG, f"is not the configuration of an fp16 bin (format {FORMAT_NAME!r}, version 1)", _BROKEN)
    metadata, entries = config.get("metadata"), config.get("tensors")
    if not isinstance(metadata, dict) or not isinstance(entries, list) or not entries:
        raise FileError(path / CONFIG, "has no metadata or no tensors", _BROKEN)
    vocabulary = _read_json(path / VOCAB)
    values = {**metadata, **{key: vocabulary[name] for key, name in VOCAB_KEYS.items() if name in vocabulary}}
    decoded = {key: _value(path, key, value) for key, value in values.items()}
    weights = map_file(path / WEIGHTS)
    try:
        return MappedModel(path, decoded, _read_tensors(path, entries, weights), weights)
    except BaseException as error:
        unmap(weights, error)
        raise


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with refused(path, "an fp16 bin is the whole folder"):
            if path.stat().st_size > _MAX_JSON_BYTES:
                raise FileError(path, "is too large", _BROKEN)
            content = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError):
        raise FileError(path, "is not JSON", _BROKEN) from None
    if not isinstance(content, dict):
        raise FileError(path, "is not a JSON object", _BROKEN)
    return content


def _value(path: Path, key: str, value: Any) -> Any:
    """A value as a GGUF gives it: lists of numbers become arrays."""
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, list):
        kinds = set(map(type, value))
        if kinds <= {str}:
            return value
        if kinds <= {int, float} or kinds == {bool}:
            try:
                return np.array(value, np.float32 if float in kinds else None)
            except (OverflowError, ValueError):
                pass
    raise FileError(path, f"the value of {key[:80]!r} is of a kind that pocketlm does not read", _BROKEN)


def _read_tensors(path: Path, entries: list[Any], weights: Buffer) -> dict[str, Tensor]:
    data, tensors, end = np.frombuffer(weights, np.uint8), {}, 0
    for entry in entries:
        match entry:
            case {"name": str(name), "shape": [_, *_] as shape, "offset": int(offset)} if (
                len(shape) <= 4 and name not in tensors
            ):
                sound = all(type(size) is int and 1 <= size < 1 << 48 for size in shape) and offset == end
            case _:
                name, shape, sound = "", [], False
        if not sound:
            problem = f"entry {len(tensors)} of its tensors is not sound, or does not begin where the one before it ends"
            raise FileError(path / CONFIG, problem, _BROKEN)
        start, end = end, end + 2 * math.prod(shape)
        tensors[name] = Tensor(name, tuple(shape), FORMATS["F16"], data[start:end], start, path)
    if end != len(data):
        raise FileError(path / WEIGHTS, f"has {len(data)} bytes where its tensors take {end}", "copy the whole folder again")
    return tensors
