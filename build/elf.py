"""Linux's shared libraries (ELF): writes a small one, and lists the libraries and symbols that one needs.

In: position-independent code and names; or a library's bytes. Out: a library's bytes; or names. Knows nothing of what the
code does. Sources: System V gABI, chapters 4 and 5.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

from pocketlm.runtime.memory import round_up
from pocketlm.runtime.native.linker import HEADER, SECTION, SYMBOL, text_at

_MACHINES = {"x86_64": (62, 0x1000), "aarch64": (183, 0x10000)}  # number, largest page
_SEGMENT = struct.Struct("<IIQQQQQQ")  # type, flags, offset, address, physical address, bytes in file and memory, alignment
_LOAD, _DYNAMIC, _STACK = 1, 2, 0x6474E551
_X, _W, _R = 1, 2, 4
_NEEDED, _HASH, _STRINGS, _SYMBOLS, _STRINGS_SIZE, _SYMBOL_SIZE, _SONAME = 1, 4, 5, 6, 10, 11, 14
_SHT_DYNAMIC, _SHT_DYNSYM = 6, 11
_GLOBAL_FUNCTION = 0x12


def shared_object(name: str, machine: str, code: bytes, symbols: Mapping[str, int]) -> bytes:
    """A library called `name` of position-independent code; `symbols`: a function's name, and its offset in the code."""
    number, page = _MACHINES[machine]
    texts, table = bytearray(b"\0"), [bytes(SYMBOL.size)]

    def text(value: str) -> int:
        texts.extend(value.encode() + b"\0")
        return len(texts) - len(value.encode()) - 1

    n = len(symbols) + 1
    chain = struct.pack(f"<{3 + n}I", 1, n, 1, 0, *range(2, n), 0)  # one bucket, in which each names the next: they are few
    head = HEADER.size + 5 * _SEGMENT.size
    hash_at = round_up(head, 8)
    symbols_at = round_up(hash_at + len(chain), 8)
    strings_at = symbols_at + n * SYMBOL.size
    own = text(name)
    names = {symbol: text(symbol) for symbol in symbols}
    code_at = round_up(strings_at + len(texts), page)
    table += [SYMBOL.pack(names[s], _GLOBAL_FUNCTION, 0, 1, code_at + offset, 0) for s, offset in symbols.items()]
    dynamic_at = round_up(code_at + len(code), page)
    facts = {_SONAME: own, _HASH: hash_at, _STRINGS: strings_at, _SYMBOLS: symbols_at, _STRINGS_SIZE: len(texts),
             _SYMBOL_SIZE: SYMBOL.size, 0: 0}  # fmt: skip
    dynamic = b"".join(struct.pack("<QQ", *fact) for fact in facts.items())

    def segment(kind: int, flags: int, at: int, size: int, alignment: int) -> bytes:
        return _SEGMENT.pack(kind, flags, at, at, at, size, size, alignment)

    segments = [
        segment(_LOAD, _R, 0, strings_at + len(texts), page),
        segment(_LOAD, _R | _X, code_at, len(code), page),
        segment(_LOAD, _R | _W, dynamic_at, len(dynamic), page),
        segment(_DYNAMIC, _R | _W, dynamic_at, len(dynamic), 8),
        segment(_STACK, _R | _W, 0, 0, 16),
    ]
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    sizes = HEADER.size, _SEGMENT.size, len(segments), SECTION.size
    out = bytearray(HEADER.pack(ident, 3, number, 1, 0, HEADER.size, 0, 0, *sizes, 0, 0) + b"".join(segments))
    parts = {hash_at: chain, symbols_at: b"".join(table), strings_at: texts, code_at: code, dynamic_at: dynamic}
    for at, data in parts.items():
        out += bytes(at - len(out)) + data
    return bytes(out)


def dynamic_symbols(library: bytes, defined: bool) -> set[str]:
    """The names that a library defines for others, or (not `defined`) needs from others."""
    rows = _rows(library, _SHT_DYNSYM, SYMBOL)
    return {text_at(library, texts + name) for texts, (name, _, _, section, _, _) in rows if bool(section) == defined}


def needed(library: bytes) -> list[str]:
    """The names of the libraries that a library needs."""
    rows = _rows(library, _SHT_DYNAMIC, struct.Struct("<QQ"))
    return [text_at(library, texts + value) for texts, (tag, value) in rows if tag == _NEEDED]


def _rows(library: bytes, wanted: int, row: struct.Struct) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The rows of all sections of type `wanted`, each with the offset of the string table that it refers to."""
    at, size, count = struct.unpack_from("<Q", library, 40)[0], *struct.unpack_from("<HH", library, 58)
    sections = [SECTION.unpack_from(library, at + i * size) for i in range(count)]
    for _, kind, _, _, start, length, link, *_ in sections:
        if kind == wanted:
            yield from ((sections[link][4], fields) for fields in row.iter_unpack(library[start : start + length]))


def without_sections(binary: bytes) -> bytes:
    """A program or library without its sections, which only linkers and debuggers read; nothing that is loaded moves."""
    at, size, count = struct.unpack_from("<Q", binary, 32)[0], *struct.unpack_from("<HH", binary, 54)
    rows = [_SEGMENT.unpack_from(binary, at + i * size) for i in range(count)]
    out = bytearray(binary[: max(at + size * count, *(offset + length for _, _, offset, _, _, length, *_ in rows))])
    struct.pack_into("<Q", out, 40, 0)  # offset of the table of sections
    struct.pack_into("<HHH", out, 58, 0, 0, 0)  # bytes of a row, rows, the row with their names
    return bytes(out)
