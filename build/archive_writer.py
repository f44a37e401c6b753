"""Writes what PyInstaller's boot loader reads: its archive, in it the archive of modules, and base_library.zip.

In: code and files as bytes. Out: bytes, the same for the same input. Knows neither models nor where files come from.
Format: PyInstaller 6, bootloader/src/pyi_archive.c and PyInstaller/loader/pyimod01_archive.py. Numbers are big-endian.
"""

from __future__ import annotations

import io
import marshal
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pocketlm.runtime.container import COOKIE, COOKIE_MAGIC

ENTRY = struct.Struct("!IIIIBc")  # of the table: its length, offset, bytes here and unpacked, whether compressed, kind
_ALIGNMENT = 16
BINARY, DATA, MODULE, SCRIPT, OPTION, MODULES = (letter.encode() for letter in "bxmsoz")
_PACKAGE, _PLAIN = 1, 0


class Entry(NamedTuple):
    """A part of the archive. MODULE and SCRIPT hold marshalled code; OPTION has its text as the name."""

    kind: bytes
    name: str
    content: bytes = b""


class Code(NamedTuple):
    """A module: marshalled code."""

    is_package: bool
    marshalled: bytes


def program(entries: Sequence[Entry], python: tuple[int, int], library: str) -> bytes:
    """The archive that is put behind the boot loader; `library`: the name of the entry that holds Python itself."""
    body, table = bytearray(), bytearray()
    for kind, name, content in entries:
        compressed = kind not in (OPTION, MODULES)  # modules are compressed one by one
        stored = zlib.compress(content, 9) if compressed else content
        words = name.encode() + b"\0"
        words += bytes(-(ENTRY.size + len(words)) % _ALIGNMENT)
        table += ENTRY.pack(ENTRY.size + len(words), len(body), len(stored), len(content), compressed, kind) + words
        body += stored
    length = len(body) + len(table) + COOKIE.size
    return bytes(body + table) + COOKIE.pack(
        COOKIE_MAGIC, length, len(body), len(table), 100 * python[0] + python[1], library.encode()
    )


def modules(codes: Mapping[str, Code], bytecode_magic: bytes) -> bytes:
    """The archive of modules, from which everything is imported once the program runs."""
    body, table = bytearray(b"PYZ\0" + bytecode_magic + bytes(9)), []
    for name, code in sorted(codes.items()):
        stored = zlib.compress(code.marshalled, 9)
        table.append((name, (_PACKAGE if code.is_package else _PLAIN, len(body), len(stored))))
        body += stored
    struct.pack_into("!i", body, 8, len(body))
    return bytes(body) + marshal.dumps(table, 0)  # version 0: without references, whose flags differ from run to run


def library(codes: Mapping[str, Code], bytecode_magic: bytes) -> bytes:
    """base_library.zip: the modules that Python needs before it can run code from the archive."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, code in sorted(codes.items()):
            path = name.replace(".", "/") + "/__init__" * code.is_package + ".pyc"
            header = bytecode_magic + struct.pack("<I", 1) + bytes(8)  # never to be compared with a source
            file.writestr(zipfile.ZipInfo(path), header + code.marshalled)
    return out.getvalue()
