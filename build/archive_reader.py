"""Whether PyInstaller's archive in an executable is undamaged.

In: an executable, and where its archive is. Out: the names of what is damaged in it. Everything is unpacked, as the boot loader
will do, but the result is thrown away; nothing is run and no marshalled data is read. Knows no models.

Format: PyInstaller/archive/writers.py. The archive ends with a cookie (runtime/container.py). In front of it is a table with a
row for every file: length of the row, offset, bytes, bytes when unpacked, whether compressed, kind, name. Python's modules are
one file, "PYZ": a head of 17 bytes, in which an offset at byte 8 says where the file's own table begins, and a zlib stream for
every module. zlib's checksums reveal any changed byte in a stream; in the table of modules, a few kilobytes, nothing does.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pocketlm.build.archive_writer import ENTRY
from pocketlm.errors import FileError
from pocketlm.runtime.container import COOKIE, program_place

_MODULES, _MODULES_MAGIC, _MODULES_HEAD = b"z", b"PYZ\0", 17
_PIECE = 1 << 20  # bytes that are unpacked at a time


class Entry(NamedTuple):
    """A file of the archive: its place in the executable, and what it unpacks to."""

    name: str
    kind: bytes
    offset: int
    length: int
    unpacked: int
    compressed: bool


class _Damaged(Exception):
    """The bytes are not what the archive promises."""


def damaged_entries(path: Path) -> list[str]:
    """The names of damaged files in the archive. Raises FileError if there is no archive, or its table is damaged."""
    start, length = program_place(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return [entry.name for entry in _table(data, start, length) if not _is_whole(data, entry)]
        except (_Damaged, struct.error):
            raise FileError(path, "the table of the archive in it is damaged", "get it again, or make it again") from None


def _table(data: mmap.mmap, start: int, length: int) -> Iterator[Entry]:
    end = start + length - COOKIE.size
    _, _, offset, n_bytes, *_ = COOKIE.unpack_from(data, end)
    at = start + offset
    if at + n_bytes != end:
        raise _Damaged
    while at < end:
        size, offset, packed, unpacked, compressed, kind = ENTRY.unpack_from(data, at)
        if size <= ENTRY.size or at + size > end or offset + packed > length:
            raise _Damaged
        name = data[at + ENTRY.size : at + size].rstrip(b"\0").decode("utf-8", "replace")
        yield Entry(name, kind, start + offset, packed, unpacked, bool(compressed))
        at += size


def _is_whole(data: mmap.mmap, entry: Entry) -> bool:
    end = entry.offset + entry.length
    try:
        if entry.kind == _MODULES and not entry.compressed:
            _unpack_modules(data, entry.offset, end)
        elif entry.compressed:
            n_bytes, stop = _unpack(data, entry.offset, end, entry.unpacked)
            return (n_bytes, stop) == (entry.unpacked, end)
        return entry.compressed or entry.length == entry.unpacked
    except (_Damaged, zlib.error, struct.error):
        return False


def _unpack_modules(data: mmap.mmap, start: int, end: int) -> None:
    """Unpack the modules one after the other, up to the table behind them."""
    if data[start : start + 4] != _MODULES_MAGIC:
        raise _Damaged
    at, table = start + _MODULES_HEAD, start + struct.unpack_from("!i", data, start + 8)[0]
    if not at <= table < end:
        raise _Damaged
    while at < table:
        _, at = _unpack(data, at, table, 1 << 30)
    if at != table:
        raise _Damaged


def _unpack(data: mmap.mmap, start: int, end: int, most: int) -> tuple[int, int]:
    """Unpack a zlib stream: how many bytes come out, and where it ends. Raises zlib.error or _Damaged."""
    stream, n_bytes, at, rest = zlib.decompressobj(), 0, start, b""
    while not stream.eof:
        if not rest:
            rest = data[at : min(at + _PIECE, end)]
            at += len(rest)
            if not rest:
                raise _Damaged
        n_bytes += len(stream.decompress(rest, _PIECE))
        rest = stream.unconsumed_tail
        if n_bytes > most:
            raise _Damaged
    return n_bytes, at - len(stream.unused_data)
