"""Object files become one flat image of code: linked once, then only mapped, called and stored.

In: ELF64 relocatable objects (little-endian; x86-64 or aarch64) of functions and constants. Out: an `Image`, that is bytes
which run at any page-aligned address, and the offsets of its functions; the same as a checksummed container; and, mapped
into executable memory, functions to call. Knows nothing about kernels, levels or where images are kept.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from pocketlm.runtime.native.executable_memory import CodePages, NativeUnavailable, map_code
from pocketlm.runtime.native.levels import host_machine


class ImageError(NativeUnavailable):
    """Objects that cannot be linked, or bytes that are no image."""


@dataclass(frozen=True)
class Image:
    """Position-independent code and constants; `symbols` maps a function's name to its offset in `code`."""

    machine: str  # "x86_64" or "aarch64"
    code: bytes
    symbols: Mapping[str, int]


# ---- linking: the ELF-64 object file format, System V gABI chapter 4 -------------------------------------------------

HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SECTION = struct.Struct("<IIQQQQIIQQ")
SYMBOL = struct.Struct("<IBBHQQ")
_RELA = struct.Struct("<QQq")
_ET_REL = 1
_MACHINES = {62: "x86_64", 183: "aarch64"}
_SHT_PROGBITS, _SHT_SYMTAB, _SHT_RELA, _SHT_NOBITS = 1, 2, 4, 8
_SHF_WRITE, _SHF_ALLOC, _SHF_EXECINSTR, _SHF_TLS = 1, 2, 4, 0x400
_SHN_UNDEF = 0
_STB_GLOBAL = 1


class _Section(NamedTuple):
    name: str
    type: int
    flags: int
    data: bytes
    link: int
    info: int
    align: int


class _Symbol(NamedTuple):
    name: str
    is_global: bool
    section: int
    value: int


class _Object:
    """One object file, taken apart: its machine, sections and symbols, and where each loaded section goes in the image."""

    def __init__(self, data: bytes):
        if data[:6] != b"\x7fELF\x02\x01":
            raise ImageError("cannot link what is not an object file (ELF64, little-endian)")
        _, kind, machine, _, _, _, shoff, _, _, _, _, shentsize, shnum, shstrndx = HEADER.unpack_from(data)
        if kind != _ET_REL or machine not in _MACHINES or shentsize != SECTION.size:
            raise ImageError("cannot link an object file that is not relocatable, or not for x86-64 or aarch64")
        self.machine = _MACHINES[machine]
        headers = [SECTION.unpack_from(data, shoff + i * shentsize) for i in range(shnum)]
        contents = [b"" if h[1] == _SHT_NOBITS else data[h[4] : h[4] + h[5]] for h in headers]
        self.sections = [
            _Section(text_at(contents[shstrndx], h[0]), h[1], h[2], c, h[6], h[7], max(h[8], 1))
            for h, c in zip(headers, contents, strict=True)
        ]
        table = next((s for s in self.sections if s.type == _SHT_SYMTAB), None)
        names = self.sections[table.link].data if table else b""
        self.symbols = [
            _Symbol(text_at(names, name), info >> 4 >= _STB_GLOBAL, section, value)
            for name, info, _, section, value, _ in SYMBOL.iter_unpack(table.data if table else b"")
        ]
        self.base: dict[int, int] = {}  # section number -> offset in the image

    def loaded(self, *, executable: bool) -> list[int]:
        """Numbers of the sections that belong into the image: those with code, or those with constants."""
        numbers = []
        for number, section in enumerate(self.sections):
            if section.name == ".eh_frame" or not section.flags & _SHF_ALLOC:
                continue
            if section.flags & (_SHF_WRITE | _SHF_TLS) or section.type != _SHT_PROGBITS:
                raise ImageError(f"kernels may hold code and constants only, but there is a section {section.name}")
            if bool(section.flags & _SHF_EXECINSTR) == executable:
                numbers.append(number)
        return numbers


def link(objects: Sequence[bytes]) -> Image:
    """One image of all objects' code (first) and constants, every reference resolved.

    ImageError: objects of different machines or that are not ELF; writable data; a name defined twice or nowhere; a
    relocation that an image at an unknown address cannot have.
    """
    parts = [_Object(data) for data in objects]
    machines = {part.machine for part in parts}
    if len(machines) != 1:
        raise ImageError(f"expected objects for one machine, got {', '.join(sorted(machines)) or 'none'}")
    machine = machines.pop()
    code = bytearray()
    for executable in (True, False):
        code.extend(bytes(-len(code) % 64))  # constants do not share a cache line with code
        for part in parts:
            for number in part.loaded(executable=executable):
                section = part.sections[number]
                code.extend(bytes(-len(code) % section.align))
                part.base[number] = len(code)
                code.extend(section.data)
    symbols = _exported(parts)
    for part in parts:
        _relocate(part, code, symbols, _RELOCATIONS[machine])
    return Image(machine, bytes(code), symbols)


def _exported(parts: Sequence[_Object]) -> dict[str, int]:
    """Global names and their offsets. ImageError names what is undefined, or defined twice."""
    symbols: dict[str, int] = {}
    wanted: set[str] = set()
    for part in parts:
        for symbol in part.symbols:
            if symbol.section == _SHN_UNDEF:
                wanted.add(symbol.name)
            elif symbol.is_global and symbol.section in part.base:
                if symbol.name in symbols:
                    raise ImageError(f"the kernels define {symbol.name} twice")
                symbols[symbol.name] = part.base[symbol.section] + symbol.value
    missing = sorted(wanted - symbols.keys() - {""})
    if missing:
        raise ImageError(f"the kernels call functions that they do not contain: {', '.join(missing)}")
    return symbols


def _relocate(part: _Object, code: bytearray, symbols: Mapping[str, int], kinds: Mapping[int, _Relocation]) -> None:
    """Resolve the references of one object's loaded sections inside `code`."""
    for section in part.sections:
        if section.type != _SHT_RELA or section.info not in part.base:
            continue
        for offset, info, addend in _RELA.iter_unpack(section.data):
            kind, symbol, place = info & 0xFFFFFFFF, part.symbols[info >> 32], part.base[section.info] + offset
            if symbol.section in part.base:
                target = part.base[symbol.section] + symbol.value + addend
            elif symbol.section == _SHN_UNDEF:
                target = symbols[symbol.name] + addend
            else:
                raise ImageError(f"the kernels refer to {symbol.name}, which is not part of the image")
            if kind not in kinds:
                raise ImageError(f"relocation type {kind} (to {symbol.name}) has no meaning in a position-independent image")
            try:
                kinds[kind](code, place, target)
            except (struct.error, OverflowError) as error:
                raise ImageError(f"the reference to {symbol.name} does not reach: the image is too large") from error


def text_at(table: bytes, offset: int) -> str:
    return table[offset : table.index(0, offset)].decode()


# A relocation writes, at offset `place` of the image, a reference to offset `target`. Sources: System V x86-64 psABI,
# table 4.10; ELF for the Arm 64-bit Architecture (AAELF64), section 5.7.
_Relocation = Callable[[bytearray, int, int], None]


def _relative(code: bytearray, place: int, target: int, *, form: str) -> None:
    """The distance, as a plain signed number."""
    struct.pack_into(form, code, place, target - place)


def _field(value: int, bits: int, shift: int) -> int:
    """A signed value of so many bits, as an instruction's field starting at bit `shift`. OverflowError: it does not fit."""
    if not -(1 << bits - 1) <= value < 1 << bits - 1:
        raise OverflowError
    return (value & (1 << bits) - 1) << shift


def _set(code: bytearray, place: int, mask: int, value: int) -> None:
    """Replace the bits of `mask` in the aarch64 instruction at `place`."""
    (word,) = struct.unpack_from("<I", code, place)
    struct.pack_into("<I", code, place, word & ~mask | value)


def _branch(code: bytearray, place: int, target: int, *, bits: int, shift: int) -> None:
    """The distance in instructions, in a field of so many bits."""
    if (target - place) % 4:
        raise OverflowError
    _set(code, place, (1 << bits) - 1 << shift, _field(target - place >> 2, bits, shift))


def _adr(code: bytearray, place: int, target: int, *, page: int) -> None:
    """ADR and ADRP: the distance in units of 2**page bytes, its two lowest bits apart from the rest."""
    distance = (target >> page) - (place >> page)
    _field(distance, 21, 0)
    _set(code, place, 0x60FFFFE0, (distance & 3) << 29 | (distance >> 2 & 0x7FFFF) << 5)


def _low12(code: bytearray, place: int, target: int, *, scale: int) -> None:
    """The offset within a 4096-byte page, in units of 2**scale bytes: images start at a page."""
    if target % (1 << scale):
        raise OverflowError
    _set(code, place, 0xFFF << 10, ((target & 0xFFF) >> scale) << 10)


_RELOCATIONS: dict[str, dict[int, _Relocation]] = {
    "x86_64": {
        2: partial(_relative, form="<i"),  # R_X86_64_PC32
        4: partial(_relative, form="<i"),  # R_X86_64_PLT32: no table in between
        24: partial(_relative, form="<q"),  # R_X86_64_PC64
    },
    "aarch64": {
        260: partial(_relative, form="<q"),  # R_AARCH64_PREL64
        261: partial(_relative, form="<i"),  # R_AARCH64_PREL32
        273: partial(_branch, bits=19, shift=5),  # R_AARCH64_LD_PREL_LO19
        274: partial(_adr, page=0),  # R_AARCH64_ADR_PREL_LO21
        275: partial(_adr, page=12),  # R_AARCH64_ADR_PREL_PG_HI21
        277: partial(_low12, scale=0),  # R_AARCH64_ADD_ABS_LO12_NC
        278: partial(_low12, scale=0),  # R_AARCH64_LDST8_ABS_LO12_NC
        279: partial(_branch, bits=14, shift=5),  # R_AARCH64_TSTBR14
        280: partial(_branch, bits=19, shift=5),  # R_AARCH64_CONDBR19
        282: partial(_branch, bits=26, shift=0),  # R_AARCH64_JUMP26
        283: partial(_branch, bits=26, shift=0),  # R_AARCH64_CALL26
        284: partial(_low12, scale=1),  # R_AARCH64_LDST16_ABS_LO12_NC
        285: partial(_low12, scale=2),  # R_AARCH64_LDST32_ABS_LO12_NC
        286: partial(_low12, scale=3),  # R_AARCH64_LDST64_ABS_LO12_NC
        299: partial(_low12, scale=4),  # R_AARCH64_LDST128_ABS_LO12_NC
    },
}


# ---- the container ---------------------------------------------------------------------------------------------------

_MAGIC = b"plmcode1"
_PREFIX = struct.Struct("<8s32sII")  # magic and version, sha256 of all that follows the prefix, bytes of JSON, bytes of code


def to_bytes(image: Image) -> bytes:
    """The image as bytes to store: prefix, JSON ({"machine": ..., "symbols": {name: offset}}), code."""
    header = json.dumps({"machine": image.machine, "symbols": dict(image.symbols)}, separators=(",", ":")).encode()
    body = header + image.code
    return _PREFIX.pack(_MAGIC, hashlib.sha256(body).digest(), len(header), len(image.code)) + body


def from_bytes(data: bytes) -> Image:
    """The stored image. ImageError if a byte is missing, added or wrong."""
    if len(data) < _PREFIX.size or data[:8] != _MAGIC:
        raise ImageError("not a code image of this version")
    _, digest, header_size, code_size = _PREFIX.unpack_from(data)
    body = data[_PREFIX.size :]
    if len(body) != header_size + code_size or hashlib.sha256(body).digest() != digest:
        raise ImageError("the code image is damaged")
    try:
        header = json.loads(body[:header_size])
        image = Image(header["machine"], bytes(body[header_size:]), header["symbols"])
        if image.machine in _RELOCATIONS and all(type(o) is int and 0 <= o < code_size for o in image.symbols.values()):
            return image
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ImageError("the code image's header makes no sense")


# ---- running ---------------------------------------------------------------------------------------------------------


class Loaded:
    """An image in executable memory. `close` unmaps it: no function of it may run then, or be called any more."""

    def __init__(self, image: Image, pages: CodePages):
        self._symbols, self._pages = image.symbols, pages

    def address(self, symbol: str) -> int:
        """Where a function is. KeyError if the image has no such function."""
        return self._pages.address + self._symbols[symbol]

    def function(self, symbol: str, restype: Any, *argtypes: Any, alone: bool = False) -> Any:
        """A function to call, with ctypes types. Other Python threads run meanwhile, unless `alone`: the interpreter's lock is
        kept then. That is for what takes microseconds: to get the lock back from another thread takes longer.
        """
        make = ctypes.PYFUNCTYPE if alone else ctypes.CFUNCTYPE
        return make(restype, *argtypes)(self.address(symbol))

    def close(self) -> None:
        """Give the memory back."""
        self._pages.close()


def load(image: Image) -> Loaded:
    """Map an image into executable memory. NativeUnavailable: it is for another machine, or the system refuses."""
    if image.machine != host_machine():
        raise NativeUnavailable(f"the code image is for {image.machine}, this program runs on {host_machine()}")
    return Loaded(image, map_code(image.code))
