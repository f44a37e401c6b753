"""Reads safetensors files: a length, a JSON header, the data.

In: a mapped file. Out: `LazyTensor`s and the header's texts. Offsets are checked against the file and each other.
Format: the README of the safetensors repository.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from pocketlm.errors import FileError, quoted
from pocketlm.export.arrays import DTYPES, Buffer, LazyTensor, Storage, bytes_each, view

MAX_HEADER = 1 << 25  # a tensor takes about 100 bytes
NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip


def looks_like_safetensors(buffer: Buffer) -> bool:
    """Whether the file begins as one: a length that fits, then a JSON object."""
    return buffer[8:9] == b"{" and int.from_bytes(buffer[:8], "little") <= len(buffer) - 8


def read_safetensors(buffer: Buffer, path: Path) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """Tensors by name, and the header's `__metadata__`. Raises FileError for anything that is not a sound file."""
    length = int.from_bytes(buffer[:8], "little")
    if len(buffer) < 8 or length > min(MAX_HEADER, len(buffer) - 8):
        raise FileError(path, "the file is cut short, or is no safetensors file", "copy it again")
    header = parse_json(buffer[8 : 8 + length], path)
    if not isinstance(header, dict):
        raise FileError(path, "its header is not a JSON object", "copy the file again")
    metadata = header.pop("__metadata__", {})
    tensors: dict[str, LazyTensor] = {}
    spans = []
    for name, row in header.items():
        dtype, shape, start, end = _entry(row, name, path)
        n_bytes = math.prod(shape) * bytes_each(dtype)
        if not 0 <= start <= end <= len(buffer) - 8 - length or end - start != n_bytes:
            problem = f"tensor {quoted(name)} has offsets {start} to {end} that do not fit it or the file"
            raise FileError(path, problem, "copy the file again")
        spans.append((start, end))
        tensors[name] = view(path, Storage(buffer, 8 + length + start, n_bytes), dtype, shape)
    spans.sort()
    if any(end > following for (_, end), (following, _) in pairwise(spans)):
        raise FileError(path, "its tensors overlap", "the file is damaged")
    return tensors, metadata if isinstance(metadata, dict) else {}


def _entry(row: Any, name: str, path: Path) -> tuple[str, list[int], int, int]:
    try:
        dtype, shape, (start, end) = NAMES.get(row["dtype"], str(row["dtype"])), row["shape"], row["data_offsets"]
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, start, end)) or not isinstance(shape, list):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise FileError(path, f"its header says nothing usable about tensor {quoted(name)}", "copy the file again") from None
    if dtype not in DTYPES:
        raise FileError(
            path, f"tensor {quoted(name)} is of type {quoted(dtype)}, which pocketlm does not read", "save it as float32"
        )
    return dtype, shape, start, end


def parse_json(data: bytes, path: Path) -> Any:
    """The value of a JSON text. Raises FileError where it is none, is nested absurdly deep or repeats a key."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key is there twice")
        return result

    try:
        return json.loads(bytes(data), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise FileError(path, f"its JSON is damaged ({quoted(reason)})", "copy the file again") from None
