"""Relocatable ELF64 objects made by hand, for what LLVM does not emit of its own accord."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import TypeAlias

MACHINES = {"x86_64": 62, "aarch64": 183}


Relocation: TypeAlias = tuple[int, int, str, int]  # offset, type, symbol, addend


def object_file(
    machine: str, text: bytes, defined: Mapping[str, int], relocations: Sequence[Relocation] = (), align: int = 16
) -> bytes:
    """An object with a .text section. A symbol of `relocations` that is not `defined` is undefined."""
    names = [*defined, *sorted({symbol for _, _, symbol, _ in relocations} - defined.keys())]
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    symbols = bytes(24)
    for name in names:
        section, value = (1, defined[name]) if name in defined else (0, 0)
        symbols += struct.pack("<IBBHQQ", strings.index(b"\0" + name.encode() + b"\0") + 1, 0x12, 0, section, value, 0)
    rela = b"".join(struct.pack("<QQq", o, names.index(symbol) + 1 << 32 | kind, a) for o, kind, symbol, a in relocations)
    section_names = b"\0.text\0.rela.text\0.symtab\0.strtab\0"
    rows = [  # name, type, flags, content, link, info, align, entry size
        ("", 0, 0, b"", 0, 0, 0, 0),
        (".text", 1, 6, text, 0, 0, align, 0),
        (".rela.text", 4, 0, rela, 3, 1, 8, 24),
        (".symtab", 2, 0, symbols, 4, 1, 8, 24),
        (".strtab", 3, 0, strings + section_names, 0, 0, 1, 0),
    ]
    body, headers = b"", b""
    for name, kind, flags, content, link, info, alignment, entry in rows:
        at = len(strings) + section_names.index(name.encode() + b"\0") if name else 0
        headers += struct.pack("<IIQQQQIIQQ", at, kind, flags, 0, 64 + len(body), len(content), link, info, alignment, entry)
        body += content
    ident, count = b"\x7fELF\x02\x01\x01", len(rows)
    file = struct.pack("<16sHHIQQQIHHHHHH", ident, 1, MACHINES[machine], 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, count, 4)
    return file + body + headers
