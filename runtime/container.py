"""Where things are in a packed executable: the locator, and PyInstaller's archive behind it.

In: an executable. Out: its sections with their lengths and checksums, or one line about what is wrong with it. Knows the
container, neither models nor conversations.

    boot loader │ zeros to a multiple of 4096 │ model │ original │ reference │ persona │ locator │ program

`program` is PyInstaller's archive; the boot loader finds it from the end of the file. The locator ends where it begins:
magic, version, number of rows; a row for each name in ROWS (offset, length, SHA-256); the SHA-256 of all that. Numbers are
little-endian. Signatures that are put behind the archive later do not matter.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pocketlm.errors import FileError, refused

# boot: the boot loader · header: the model up to its weights · original: what makes the packed model the GGUF again
# gguf: length and checksum of that GGUF (it is not in the file as such)
ROWS = ("boot", "header", "model", "original", "reference", "persona", "program", "gguf")
IN_ORDER = ("model", "original", "reference", "persona")  # each begins where the one before ends
TITLES = {  # for people
    "boot": "boot loader", "header": "keys of the model", "model": "model", "original": "record of the GGUF",
    "reference": "reference results", "persona": "title and system prompt", "program": "archive of the program",
}  # fmt: skip
PAGE = 4096
CHUNK = 1 << 20

_MAGIC, _VERSION = b"pocketlm", 2
_PREFIX, _ROW, _DIGEST = struct.Struct("<8sII"), struct.Struct("<QQ32s"), 32
SIZE = _PREFIX.size + len(ROWS) * _ROW.size + _DIGEST
# PyInstaller's cookie: magic, bytes of the archive with the cookie, table's offset and length, Python's version and library
COOKIE_MAGIC, COOKIE = b"MEI\014\013\012\013\016", struct.Struct("!8sIIII64s")
_PROGRAMS = (b"\x7fELF", b"MZ", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe")  # ELF, PE, Mach-O, Mach-O for two machines
_BROKEN = "was damaged or cut short on its way", "get it again, best in a zip archive"


@dataclass(frozen=True)
class Section:
    """Bytes [offset, offset + length) of the executable, and their SHA-256."""

    offset: int
    length: int
    sha256: bytes

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True)
class Packed:
    """An executable that holds a model."""

    path: Path
    sections: Mapping[str, Section]

    def read(self, name: str) -> bytes:
        """A section's bytes. Raises FileError unless they are the ones that were packed."""
        section = self.sections[name]
        with open(self.path, "rb") as file:
            file.seek(section.offset)
            data = file.read(section.length)
        if hashlib.sha256(data).digest() != section.sha256:
            raise FileError(self.path, *_BROKEN)
        return data

    def damaged(self) -> list[str]:
        """The sections, by name, that are not as they were packed. Reads every byte, but for what signing changes."""
        with open(self.path, "rb") as file:
            wrong = [name for name in (*IN_ORDER, "program") if not self._is_whole(file, name)]
            boot = self.sections["boot"]
            if not _may_be_signed(file):
                file.seek(boot.end)
                filled = file.read(-boot.end % PAGE)
                file.seek(0)
                if hashlib.sha256(without_checksum(file.read(boot.length))).digest() != boot.sha256 or any(filled):
                    wrong.insert(0, "boot")
        return wrong

    def _is_whole(self, file: BinaryIO, name: str) -> bool:
        section = self.sections[name]
        return digest(file, section.offset, section.length) == section.sha256

    def check(self) -> None:
        """Read everything. Raises FileError, with the names of the parts, if a byte is wrong."""
        if wrong := self.damaged():
            parts = " and ".join(TITLES[name] for name in wrong)
            raise FileError(self.path, f"{_BROKEN[0]} (the {parts})", _BROKEN[1])


def without_checksum(boot: bytes) -> bytes:
    """A boot loader with zeros for Windows' checksum, which covers the file with the locator, and the locator covers this."""
    if not boot.startswith(b"MZ") or len(boot) < 64 or (at := struct.unpack_from("<I", boot, 60)[0] + 88) + 4 > len(boot):
        return boot
    return boot[:at] + bytes(4) + boot[at + 4 :]


def _may_be_signed(file: BinaryIO) -> bool:
    """Whether the boot loader may differ from the packed one: a Mac's covers the whole file, and a signature is in Windows'."""
    file.seek(0)
    head = file.read(PAGE)
    if not head.startswith(b"MZ"):
        return not head.startswith(b"\x7fELF")
    try:  # the fifth data directory of the optional header: the certificates
        optional = struct.unpack_from("<I", head, 60)[0] + 24
        directories = optional + (112 if head[optional : optional + 2] == b"\x0b\x02" else 96)  # of 64 bits, of 32
        return struct.unpack_from("<II", head, directories + 4 * 8) != (0, 0)
    except struct.error:
        return False


def beginning(path: Path) -> bytes:
    """The first four bytes of a file. None of what cannot be read, or is no file: a pipe would be waited for."""
    with suppress(OSError):
        if path.is_file():
            with open(path, "rb") as file:
                return file.read(4)
    return b""


def is_program(path: Path) -> bool:
    """Whether a file begins as executables do."""
    return beginning(path).startswith(_PROGRAMS)


def program_place(path: Path) -> tuple[int, int]:
    """Offset and length of PyInstaller's archive in an executable. Raises FileError where there is none."""
    with _mapped(path) as data:
        cookie = data.rfind(COOKIE_MAGIC)
        if 0 <= cookie <= len(data) - COOKIE.size:
            length = COOKIE.unpack_from(data, cookie)[1]
            start = cookie + COOKIE.size - length
            if length > COOKIE.size and start >= 0:
                return start, length
    raise FileError(path, *_BROKEN)


def find(path: Path) -> Packed | None:
    """The sections of a packed executable; None if there is no model in it (or the locator's first bytes are gone).

    Milliseconds: the locator is checked, and that every section lies where it says. Raises FileError for a damaged one.
    """
    start, length = program_place(path)
    if start < SIZE:
        return None
    with open(path, "rb") as file:
        file.seek(start - SIZE)
        data = file.read(SIZE)
    magic, version, count = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        return None
    if version != _VERSION:
        raise FileError(path, f"was packed by another version of pocketlm ({version})", "pack the model again")
    body, own = data[:-_DIGEST], data[-_DIGEST:]
    if count != len(ROWS) or hashlib.sha256(body).digest() != own:
        raise FileError(path, *_BROKEN)
    sections = _sections(body)
    at = -(-sections["boot"].length // PAGE) * PAGE
    for name in IN_ORDER:
        if sections[name].offset != at:
            raise FileError(path, *_BROKEN)
        at = sections[name].end
    header, model = sections["header"], sections["model"]
    if (at + SIZE, length, header.offset) != (start, sections["program"].length, model.offset) or header.end > model.end:
        raise FileError(path, *_BROKEN)
    return Packed(path, sections)


def _sections(body: bytes) -> dict[str, Section]:
    return {name: Section(*row) for name, row in zip(ROWS, _ROW.iter_unpack(body[_PREFIX.size :]), strict=True)}


def search(path: Path) -> Packed | None:
    """The sections of an executable whose end is gone or was changed, by a locator that is whole; None if there is none."""
    with _mapped(path) as data:
        at = len(data)
        while (at := data.rfind(_MAGIC, 0, at)) >= 0:
            body, own = data[at : at + SIZE - _DIGEST], data[at + SIZE - _DIGEST : at + SIZE]
            if len(own) == _DIGEST and hashlib.sha256(body).digest() == own and _PREFIX.unpack_from(body)[1] == _VERSION:
                return Packed(path, _sections(body))
    return None


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file's bytes. Raises FileError for one that cannot be read, an empty one among them."""
    with (
        refused(path, kinds=(OSError, ValueError)), open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):  # fmt: skip
        yield data


def locator(sections: Mapping[str, Section]) -> bytes:
    """The locator's bytes, SIZE of them."""
    rows = b"".join(_ROW.pack(sections[name].offset, sections[name].length, sections[name].sha256) for name in ROWS)
    body = _PREFIX.pack(_MAGIC, _VERSION, len(ROWS)) + rows
    return body + hashlib.sha256(body).digest()


def digest(file, offset: int, length: int) -> bytes:
    """SHA-256 of a part of an open file, or of as much of it as the file has."""
    file.seek(offset)
    total, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
    while length > 0 and (n := file.readinto(buffer[: min(CHUNK, length)])):
        total.update(buffer[:n])
        length -= n
    return total.digest()


def copy(source, offset: int, length: int, target) -> None:
    """Copy a part of an open file to the other's place. Raises EOFError where the source ends before."""
    source.seek(offset)
    while length > 0:
        data = source.read(min(CHUNK, length))
        if not data:
            raise EOFError(f"{os.fspath(source.name)} became shorter")
        target.write(data)
        length -= len(data)
