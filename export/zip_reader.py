"""Finds the entries of a zip archive: reads the central directory, and checks it against every local header.

In: a mapped file. Out: an `Entry` for each name. Only `Entry.head` and `Entry.data`, which are bounded, unpack anything. Made
for archives from strangers: entries may not overlap, repeat a name, be encrypted or claim more than the file holds.
Format: PKWARE APPNOTE 6.3, sections 4.3 and 4.5 (zip64).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from pocketlm.errors import FileError, quoted
from pocketlm.export.arrays import Buffer, Storage

MAX_ENTRIES = 1 << 18  # checkpoints have two entries a tensor
STORED, DEFLATED = 0, 8
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_PIECE = 1 << 22  # bytes checked at a time


@dataclass(frozen=True)
class Entry:
    """One file of an archive: `n_packed` bytes from `start` on, which unpack to `n_bytes`."""

    path: Path
    name: str
    method: int
    start: int
    n_packed: int
    n_bytes: int
    crc: int
    buffer: Buffer

    def _fail(self, problem: str) -> NoReturn:
        raise FileError(self.path, f"entry {quoted(self.name)} {problem}", "the file is damaged")

    def storage(self) -> Storage:
        """A stored entry as it lies in the mapping; its checksum is tested once, at the first read. Raises FileError if it is
        compressed.
        """
        if self.method != STORED:
            raise FileError(self.path, f"entry {quoted(self.name)} is compressed", "save the checkpoint again with torch.save")
        return Storage(self.buffer, self.start, self.n_bytes, cache(self._check))

    def _check(self) -> None:
        crc = 0
        for at in range(self.start, self.start + self.n_bytes, _PIECE):
            crc = zlib.crc32(self.buffer[at : min(at + _PIECE, self.start + self.n_bytes)], crc)
        if self.crc and crc != self.crc:  # PyTorch can be told to write no checksums: zero
            self._fail("does not match its checksum")

    def head(self, n: int) -> bytes:
        """The first `n` unpacked bytes, not checked against the checksum."""
        packed = self.buffer[self.start : self.start + min(self.n_packed, 2 * n)]
        if self.method == STORED:
            return bytes(packed[:n])
        try:
            return zlib.decompressobj(-15).decompress(packed, n)
        except zlib.error:
            self._fail("cannot be unpacked")

    def data(self, limit: int) -> bytes:
        """The unpacked bytes, checked. Raises FileError if there are more than `limit`, or they are damaged."""
        if self.n_bytes > limit:
            self._fail(f"has {self.n_bytes} bytes, more than the {limit} allowed")
        packed = self.buffer[self.start : self.start + self.n_packed]
        if self.method == STORED:
            data = bytes(packed)
        else:
            try:
                data = zlib.decompressobj(-15).decompress(packed, self.n_bytes + 1)
            except zlib.error:
                self._fail("cannot be unpacked")
        if len(data) != self.n_bytes or (self.crc and zlib.crc32(data) != self.crc):
            self._fail("does not match its checksum")
        return data


def read_zip(buffer: Buffer, path: Path) -> dict[str, Entry]:
    """Every entry of the archive by its name. Raises FileError for anything but a sound, plain archive."""

    def fail(problem: str, advice: str = "it is damaged or not complete, copy or save it again") -> NoReturn:
        raise FileError(path, problem, advice)

    start, n_bytes, count = _directory(buffer, fail)
    if count > min(MAX_ENTRIES, n_bytes // 46):
        fail(f"the archive claims {count} entries")
    directory = memoryview(buffer)[start : start + n_bytes]
    entries: dict[str, Entry] = {}
    spans = [(start, start + n_bytes)]
    at = 0
    for _ in range(count):
        if len(directory) - at < 46 or directory[at : at + 4] != b"PK\x01\x02":
            fail("the archive's table of contents is cut short")
        (flags, method, crc, n_packed, n_unpacked, n_name, n_extra, n_comment, disk, offset) = struct.unpack_from(
            "<8xHH4xIIIHHHH6xI", directory, at
        )
        raw = bytes(directory[at + 46 : at + 46 + n_name])
        extra = bytes(directory[at + 46 + n_name : at + 46 + n_name + n_extra])
        at += 46 + n_name + n_extra + n_comment
        if at > len(directory):
            fail("the archive's table of contents is cut short")
        n_unpacked, n_packed, offset = _zip64(extra, (n_unpacked, n_packed, offset), fail)
        name = raw.decode("utf-8", "replace")
        if name in entries:
            fail(f"entry {quoted(name)} is there twice")
        if flags & 0x2041:
            fail(f"entry {quoted(name)} is encrypted", "unpack it with its password and save the checkpoint again")
        if disk or method not in (STORED, DEFLATED):
            fail(f"entry {quoted(name)} is packed in a way pocketlm does not read", "save the checkpoint again")
        if method == STORED and n_packed != n_unpacked:
            fail(f"entry {quoted(name)} has two sizes, {n_packed} and {n_unpacked}")
        data = _data_start(buffer, offset, raw, method, fail)
        if data + n_packed > start:
            fail(f"entry {quoted(name)} reaches beyond the archive")
        spans.append((offset, data + n_packed))
        entries[name] = Entry(path, name, method, data, n_packed, n_unpacked, crc, buffer)
    spans.sort()
    if any(end > following for (_, end), (following, _) in pairwise(spans)):
        fail("entries of the archive overlap")
    return entries


def _directory(buffer: Buffer, fail: Callable[..., NoReturn]) -> tuple[int, int, int]:
    """Start, size and number of entries of the central directory."""
    tail = max(0, len(buffer) - 65557)  # the end record is followed by a comment of at most 65535 bytes
    end = buffer.rfind(_END, tail)
    if end < 0 or end + 22 > len(buffer):
        fail("the archive has no table of contents: its end is missing")
    disk, first_disk, _, count, n_bytes, start = struct.unpack_from("<4H2I", buffer, end + 4)
    last = end
    if end >= 20 and buffer[end - 20 : end - 16] == _LOCATOR64:
        (at,) = struct.unpack_from("<Q", buffer, end - 12)
        if at + 56 > end - 20 or buffer[at : at + 4] != _END64:
            fail("the archive's table of contents is damaged")
        disk, first_disk, _, count, n_bytes, start = struct.unpack_from("<2I4Q", buffer, at + 16)
        last = at
    if disk or first_disk:
        fail("it is one part of an archive in several parts", "join the parts first")
    if start + n_bytes > last:
        fail("the archive's table of contents reaches beyond the file")
    return start, n_bytes, count


def _zip64(extra: bytes, sizes: tuple[int, int, int], fail: Callable[..., NoReturn]) -> tuple[int, ...]:
    """Unpacked size, packed size and offset; those that do not fit into 32 bits come from the extra field."""
    if 0xFFFFFFFF not in sizes:
        return sizes
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wanted = [i for i, size in enumerate(sizes) if size == 0xFFFFFFFF]
            if length < 8 * len(wanted) or at + 4 + length > len(extra):
                break
            large = list(sizes)
            for i, value in zip(wanted, struct.unpack_from(f"<{len(wanted)}Q", extra, at + 4), strict=True):
                large[i] = value
            return tuple(large)
        at += 4 + length
    fail("the archive's table of contents lacks a size")


def _data_start(buffer: Buffer, offset: int, name: bytes, method: int, fail: Callable[..., NoReturn]) -> int:
    """Where the data of an entry begins: behind its local header, which must agree with the central directory."""
    if offset + 30 > len(buffer) or buffer[offset : offset + 4] != b"PK\x03\x04":
        fail(f"entry {quoted(name.decode('utf-8', 'replace'))} is not where the archive says")
    flags, local_method, n_name, n_extra = struct.unpack_from("<HH16xHH", buffer, offset + 6)
    if flags & 0x2041 or local_method != method or buffer[offset + 30 : offset + 30 + n_name] != name:
        fail(f"entry {quoted(name.decode('utf-8', 'replace'))} has two headers that disagree")
    return offset + 30 + n_name + n_extra
