"""Stores a GGUF with its matrices tiled, and restores the original from that, byte for byte.

In: an open GGUF. Out: another GGUF of the same model, in which the matrices have the order that the native executor reads, at
multiples of 64 bytes; and a short record of what that changed. Holds a few rows in memory at a time. Knows no executables.

The stored header has one more key, `pocketlm.tiled`, behind the others, and other offsets of tensors. The record is what these
replace: the original's list of tensors with the padding behind it, then the bytes between and behind the tensors, which are
usually zeros.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from pocketlm.errors import FileError
from pocketlm.runtime.gguf_reader import GGUF, TILED, TILED_ALIGNMENT, can_tile, stored_bytes
from pocketlm.runtime.memory import release_pages, round_up
from pocketlm.runtime.native.tiling import LAYOUTS, ROWS, groups, restore, tile
from pocketlm.runtime.tensor import Tensor, check_finite

PIECE = 1 << 19  # bytes of a matrix that are permuted at a time: fits the second-level cache

_KEY = struct.pack("<Q", len(TILED)) + TILED.encode() + struct.pack("<I?", 7, True)
_COUNTS = struct.Struct("<4sIQQ")  # magic, version, tensors, keys


class Place(NamedTuple):
    """A tensor, and the offset of its data in the original file and in the stored one."""

    tensor: Tensor
    original: int
    stored: int


def _entry_bytes(tensor: Tensor) -> int:
    return 8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.shape) + 4 + 8


def _list_bytes(file: GGUF) -> int:
    return sum(map(_entry_bytes, file.tensors.values()))


def store(source: GGUF, raw: BinaryIO, out: BinaryIO) -> tuple[int, int, list[tuple[int, int]]]:
    """Write the tiled model to `out`, at its position, which is a multiple of 64. `raw`: the file of `source`, for reading.

    Returns how many bytes the header has, how many the stored model has, and the parts (offset, length) of `raw` that make the
    record. Raises FileError for weights that are NaN or infinite, or a GGUF that is tiled already.
    """
    if TILED in source.metadata:
        raise FileError(source.path, "is tiled already", "take the original")
    base, list_bytes = out.tell(), _list_bytes(source)
    list_start = source.header_end - list_bytes
    data_start, stored_start = (round_up(end, source.alignment) for end in (source.header_end, source.header_end + len(_KEY)))
    at, places, tensors = stored_start, {}, source.tensors
    for name in sorted(tensors, key=lambda name: tensors[name].offset):
        at = round_up(at, max(TILED_ALIGNMENT, source.alignment))
        places[name] = Place(tensors[name], tensors[name].offset, at)
        at += stored_bytes(tensors[name].format, tensors[name].shape, True)
    end = round_up(at, TILED_ALIGNMENT)

    raw.seek(0)
    magic, version, n_tensors, n_keys = _COUNTS.unpack(raw.read(_COUNTS.size))
    out.write(_COUNTS.pack(magic, version, n_tensors, n_keys + 1))
    out.write(raw.read(list_start - _COUNTS.size) + _KEY)
    entries = bytearray(raw.read(list_bytes))
    for name, field in _offset_fields(source):
        struct.pack_into("<Q", entries, field, places[name].stored - stored_start)
    out.write(bytes(entries).ljust(stored_start - (out.tell() - base), b"\0"))
    parts, cursor = [(list_start, data_start - list_start)], data_start
    for place in places.values():
        check_finite(place.tensor)
        release_pages(place.tensor.data)
        parts.append((cursor, place.original - cursor))
        cursor = place.original + place.tensor.data.nbytes
        _store_tensor(place.tensor, raw, out, base + place.stored)
    raw.seek(0, 2)
    parts.append((cursor, raw.tell() - cursor))
    out.seek(base + end)
    out.truncate()
    return stored_start, end, [part for part in parts if part[1]]


def _offset_fields(file: GGUF) -> Iterator[tuple[str, int]]:
    """For every tensor its name, and where its offset is in the list of tensors."""
    at = 0
    for name, tensor in file.tensors.items():
        at += _entry_bytes(tensor)
        yield name, at - 8


def _pieces(tensor: Tensor) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """A matrix in pieces of whole groups of rows: first row, number of rows, and (offset, bytes) of the piece in every plane
    of the stored tensor.
    """
    layout, (n_rows, n_columns) = LAYOUTS[tensor.format.name], tensor.shape
    n_blocks, n_groups = n_columns // layout.block_size, groups(tensor.shape[0])
    step = max(1, PIECE // (ROWS * n_blocks * layout.block_bytes))
    for first in range(0, n_groups, step):
        last, planes, start = min(first + step, n_groups), [], 0
        for plane in layout.planes:
            row = ROWS * n_blocks * plane.bytes
            planes.append((start + first * row, (last - first) * row))
            start += n_groups * row
        yield first * ROWS, min(last * ROWS, n_rows) - first * ROWS, planes


def _store_tensor(tensor: Tensor, raw: BinaryIO, out: BinaryIO, at: int) -> None:
    if not can_tile(tensor.format, tensor.shape):
        raw.seek(tensor.offset)
        out.seek(at)
        out.write(raw.read(tensor.data.nbytes))
        return
    row = tensor.data.nbytes // tensor.shape[0]
    for first, n_rows, planes in _pieces(tensor):
        raw.seek(tensor.offset + first * row)
        data = memoryview(tile(tensor.format.name, np.frombuffer(raw.read(n_rows * row), np.uint8), n_rows))
        for offset, length in planes:
            out.seek(at + offset)
            out.write(data[:length])
            data = data[length:]


def unstore(stored: GGUF, raw: BinaryIO, base: int, record: bytes, out: BinaryIO) -> bytes:
    """Write the original GGUF to `out`; returns its SHA-256. `raw` holds the stored model from byte `base` on."""
    total = hashlib.sha256()

    def write(data: bytes | memoryview) -> None:
        total.update(data)
        out.write(data)

    list_bytes = _list_bytes(stored)
    header_end = stored.header_end - len(_KEY)
    data_start = round_up(header_end, stored.alignment)
    raw.seek(base)
    magic, version, n_tensors, n_keys = _COUNTS.unpack(raw.read(_COUNTS.size))
    write(_COUNTS.pack(magic, version, n_tensors, n_keys - 1))
    write(raw.read(header_end - list_bytes - _COUNTS.size))
    rest = memoryview(record)
    entries, rest = rest[: data_start - header_end + list_bytes], rest[data_start - header_end + list_bytes :]
    write(entries)
    cursor = data_start
    offsets = {name: data_start + struct.unpack_from("<Q", entries, field)[0] for name, field in _offset_fields(stored)}
    for name in sorted(offsets, key=offsets.__getitem__):
        gap = offsets[name] - cursor
        write(rest[:gap])
        rest = rest[gap:]
        cursor = offsets[name]
        for data in _restored(stored.tensors[name], raw, base):
            write(data)
            cursor += len(data)
    write(rest)
    return total.digest()


def _restored(tensor: Tensor, raw: BinaryIO, base: int) -> Iterator[memoryview | bytes]:
    if not tensor.tiled:
        raw.seek(base + tensor.offset)
        yield raw.read(tensor.data.nbytes)
        return
    for _, n_rows, planes in _pieces(tensor):
        data = b""
        for offset, length in planes:
            raw.seek(base + tensor.offset + offset)
            data += raw.read(length)
        yield memoryview(restore(tensor.format.name, np.frombuffer(data, np.uint8), n_rows, tensor.shape[1]))
