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
_PIECE = 1 << 16  # bytes that are unpacked at a time, to a thousand times as many at most


class Entry(NamedTuple):
    """A file of the archive: its place in the executable, and what it unpacks to."""

    name: str
    kind: bytes
    offset: int
    length: int
    unpacked: int
    compressed: bool


def damaged_entries(path: Path) -> list[str]:
    """The names of damaged files in the archive. Raises FileError if there is no archive, or its table is damaged."""
    start, length = program_place(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return [entry.name for entry in _table(data, start, length) if not _is_whole(data, entry)]
        except (ValueError, struct.error):
            raise FileError(path, "the table of the archive in it is damaged", "get it again, or make it again") from None


def _table(data: mmap.mmap, start: int, length: int) -> Iterator[Entry]:
    end = start + length - COOKIE.size
    _, _, offset, n_bytes, *_ = COOKIE.unpack_from(data, end)
    at = start + offset
    if at + n_bytes != end:
        raise ValueError
    while at < end:
        size, offset, packed, unpacked, compressed, kind = ENTRY.unpack_from(data, at)
        if size <= ENTRY.size or at + size > end or offset + packed > length:
            raise ValueError
        name = data[at + ENTRY.size : at + size].rstrip(b"\0").decode("utf-8", "replace")
        yield Entry(name, kind, start + offset, packed, unpacked, bool(compressed))
        at += size


def _is_whole(data: mmap.mmap, entry: Entry) -> bool:
    start, end = entry.offset, entry.offset + entry.length
    try:
        if entry.compressed:
            return list(_unpacked(data, start, end)) == [entry.unpacked]
        if entry.kind == _MODULES:
            table = start + struct.unpack_from("!i", data, start + 8)[0]
            if data[start : start + 4] != _MODULES_MAGIC or not start + _MODULES_HEAD <= table < end:
                return False
            list(_unpacked(data, start + _MODULES_HEAD, table))
        return entry.length == entry.unpacked
    except (zlib.error, struct.error):
        return False


def _unpacked(data: mmap.mmap, at: int, end: int) -> Iterator[int]:
    """How many bytes each of the zlib streams gives that fill the place from `at` to `end`. Raises zlib.error."""
    while at < end:
        stream, n_bytes = zlib.decompressobj(), 0
        while not stream.eof:
            piece = data[at : min(at + _PIECE, end)]
            if not piece:
                raise zlib.error("cut short")
            n_bytes += len(stream.decompress(piece))
            at += len(piece) - len(stream.unused_data)
        yield n_bytes
