"""Reads NumPy's .npz archives: a zip of .npy files, stored or compressed. Objects (pickles) in them are refused.

In: a mapped file. Out: `LazyTensor`s. Stored entries are views of the mapping; compressed ones are unpacked when read.
Format: numpy.lib.format's documentation, versions 1 to 3.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from pocketlm.errors import FileError, quoted
from pocketlm.export.arrays import Buffer, LazyTensor, Storage, view
from pocketlm.export.zip_reader import STORED, Entry, read_zip

MAX_HEADER = 10_000
MAX_PACKED = 1 << 34  # bytes that one compressed array may unpack to
MAX_RATIO = 1100  # deflate cannot pack tighter than 1032 to 1
_HEADER = re.compile(rb"\{'descr': '([<>|=])([a-zV])(\d)', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\),? ?\}\s*")
_KINDS = {"f": "float", "i": "int", "u": "uint"}
_OTHER_NAMES = {"b1": "bool", "V2": "bfloat16"}  # the second as MLX and ml_dtypes write it, which NumPy has no letter for


def read_npz(buffer: Buffer, path: Path) -> dict[str, LazyTensor]:
    """Arrays by name (without .npy). Raises FileError."""
    return {name.removesuffix(".npy"): _array(entry, path) for name, entry in read_zip(buffer, path).items()}


def _array(entry: Entry, path: Path) -> LazyTensor:
    def fail(problem: str) -> FileError:
        return FileError(path, f"entry {quoted(entry.name)} {problem}", "save it again with numpy.savez")

    if entry.method != STORED and entry.n_bytes > min(MAX_PACKED, MAX_RATIO * entry.n_packed + 1000):
        raise fail(f"claims {entry.n_bytes} bytes, more than can be packed there")
    head = entry.head(MAX_HEADER + 12)
    if head[:6] != b"\x93NUMPY" or head[6] not in (1, 2, 3):
        raise fail("is not a NumPy array")
    size = 2 if head[6] == 1 else 4
    start = 8 + size + int.from_bytes(head[8 : 8 + size], "little")
    match = _HEADER.fullmatch(head[8 + size : start])
    if match is None:
        raise fail("holds objects or has a header pocketlm does not read")
    order, kind, width, fortran, sizes = (part.decode() for part in match.groups())
    dtype = _OTHER_NAMES.get(kind + width, f"{_KINDS.get(kind, kind)}{8 * int(width)}")
    shape = [int(n) for n in sizes.replace(",", " ").split()]
    if any(n >= 1 << 40 for n in shape):
        raise fail("has an impossible shape")
    strides = [math.prod(shape[:i]) for i in range(len(shape))] if fortran == "True" else None
    n_bytes = math.prod(shape) * int(width)
    if start + n_bytes > entry.n_bytes:
        raise fail("is cut short")
    if entry.method == STORED:
        stored = entry.storage()
        storage = Storage(entry.buffer, entry.start + start, n_bytes, stored.check)
        return view(path, storage, dtype, shape, strides, big_endian=order == ">")

    def read() -> np.ndarray:
        unpacked = Storage(entry.data(MAX_PACKED), start, n_bytes)
        return view(path, unpacked, dtype, shape, strides, big_endian=order == ">").read()

    return LazyTensor("", tuple(shape), dtype, read, entry)
