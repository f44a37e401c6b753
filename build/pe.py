"""Windows' executables and libraries (PE): writes a small DLL and an .exe's resources, and lists what a file imports.

In: code and names; or a file's bytes. Out: a file's bytes; or names. Knows nothing of what the code does.
Sources: Microsoft's "PE Format"; for the version resource "VS_VERSIONINFO". Numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from pocketlm.runtime.memory import round_up

MAGIC = b"MZ"
_FILE = struct.Struct("<HHIIIHH")  # processor, sections, time, symbols (2), bytes of the optional header, flags
_SECTION = struct.Struct("<8sIIIIIIHHI")  # name, bytes in memory, address, bytes in the file, offset, (4 unused), flags
_DIRECTORY = struct.Struct("<II")  # address, bytes
_IMPORTS, _RESOURCES, _CERTIFICATES = 1, 2, 4  # numbers of directories
_MACHINE_X64, _PE32_PLUS = 0x8664, 0x20B
_CODE, _DATA = 0x60000020, 0x40000040  # executable and readable; initialised and readable
_CHECKSUM_AT, _DIRECTORIES_AT, _OPTIONAL_BYTES = 64, 112, 240  # in the optional header
_FILE_ALIGNMENT, _PAGE = 0x200, 0x1000
_ICON, _GROUP_ICON, _VERSION, _MANIFEST = 3, 14, 16, 24  # types of resources
_ENGLISH = 1033
_TITLE = 256  # characters of a title; lengths in the version resource have 16 bits


class UnreadableProgram(Exception):
    """The headers are not what a 64-bit Windows program has."""


@dataclass(frozen=True)
class _Section:
    """A row of the section table; `at` is where the row lies."""

    at: int
    name: str
    address: int
    memory: int
    offset: int
    length: int


class _File:
    """The headers of a PE file. Raises UnreadableProgram if they are not those of a 64-bit program."""

    def __init__(self, data: bytes | bytearray):
        try:
            start = struct.unpack_from("<I", data, 60)[0] if data[:2] == b"MZ" else -1
            if start < 0 or data[start : start + 4] != b"PE\0\0":
                raise UnreadableProgram("the boot loader's header makes no sense")
            _, count, _, _, _, optional_bytes, _ = _FILE.unpack_from(data, start + 4)
            self.coff, self.optional = start + 4, start + 4 + _FILE.size
            if struct.unpack_from("<H", data, self.optional)[0] != _PE32_PLUS or optional_bytes < _OPTIONAL_BYTES:
                raise UnreadableProgram("the boot loader is not for 64-bit Windows")
            table = self.optional + optional_bytes
            rows = [(at, *_SECTION.unpack_from(data, at)) for at in range(table, table + count * _SECTION.size, _SECTION.size)]
        except struct.error:
            raise UnreadableProgram("the boot loader's header makes no sense") from None
        self.data = data
        self.sections = [
            _Section(at, name.rstrip(b"\0").decode("latin-1"), address, memory, offset, length)
            for at, name, memory, address, length, offset, *_ in rows
        ]

    def directory(self, number: int) -> int:
        """The offset in the headers of a data directory's (address, length)."""
        return self.optional + _DIRECTORIES_AT + number * _DIRECTORY.size

    def offset(self, address: int) -> int:
        """The file offset of an address."""
        for section in self.sections:
            if section.address <= address < section.address + section.length:
                return address - section.address + section.offset
        raise UnreadableProgram("an address lies in no section")

    def text(self, address: int) -> str:
        start = self.offset(address)
        return bytes(self.data[start : self.data.index(0, start)]).decode("latin-1")


# ---- who wants what ----------------------------------------------------------------------------------------------------


def imports(library: bytes) -> dict[str, set[str]]:
    """The libraries that a file imports, by their names as written, and the names of the functions it imports from each."""
    file = _File(library)
    address = _DIRECTORY.unpack_from(library, file.directory(_IMPORTS))[0]
    found: dict[str, set[str]] = {}
    at = file.offset(address) if address else len(library)
    while at + 20 <= len(library):
        names, _, _, library_name, addresses = struct.unpack_from("<5I", library, at)
        if not library_name:
            break
        wanted = found.setdefault(file.text(library_name), set())
        row = file.offset(names or addresses)
        while entry := struct.unpack_from("<Q", library, row)[0]:
            if not entry >> 63:
                wanted.add(file.text(entry + 2))
            row += 8
        at += 20
    return found


# ---- a library ---------------------------------------------------------------------------------------------------------


def shared_library(name: str, code: bytes, symbols: Mapping[str, int]) -> bytes:
    """A DLL called `name` of position-independent x86-64 code; `symbols`: a function's name, and its offset in the code."""
    code_address = _PAGE
    table_address = code_address + round_up(len(code), _PAGE)
    table = _export_table(name, {symbol: code_address + offset for symbol, offset in symbols.items()}, table_address)
    sections = [(b".text", code_address, code, _CODE), (b".edata", table_address, table, _DATA)]
    headers = bytearray(round_up(64 + 4 + _FILE.size + _OPTIONAL_BYTES + len(sections) * _SECTION.size, _FILE_ALIGNMENT))
    headers[:2], headers[60:64], headers[64:68] = b"MZ", struct.pack("<I", 64), b"PE\0\0"
    flags = 0x2022  # executable, large addresses, a library
    _FILE.pack_into(headers, 68, _MACHINE_X64, len(sections), 0, 0, 0, _OPTIONAL_BYTES, flags)
    optional = 68 + _FILE.size
    end = table_address + round_up(len(table), _PAGE)
    struct.pack_into(
        "<HBBIIIIIQIIHHHHHHIIIIHHQQQQII", headers, optional,
        _PE32_PLUS, 0, 0, round_up(len(code), _FILE_ALIGNMENT), round_up(len(table), _FILE_ALIGNMENT), 0, 0, code_address,
        0x180000000, _PAGE, _FILE_ALIGNMENT, 6, 0, 0, 0, 6, 0, 0, end, len(headers), 0, 2,
        0x0160,  # addresses of more than 32 bits, any address, no code in data
        0x100000, 0x1000, 0x100000, 0x1000, 0, 16,
    )  # fmt: skip
    _DIRECTORY.pack_into(headers, optional + _DIRECTORIES_AT, table_address, len(table))
    out, at = headers, optional + _OPTIONAL_BYTES
    for section, address, data, rights in sections:
        length = round_up(len(data), _FILE_ALIGNMENT)
        _SECTION.pack_into(headers, at, section, len(data), address, length, len(out), 0, 0, 0, 0, rights)
        at += _SECTION.size
        out += data.ljust(length, b"\0")
    checksum_at = optional + _CHECKSUM_AT
    struct.pack_into("<I", out, checksum_at, _sum(0, out) + len(out))
    return bytes(out)


def _export_table(name: str, symbols: Mapping[str, int], address: int) -> bytes:
    names = sorted(symbols)  # as bytes: the loader searches by halves
    rows = 40
    addresses_at, names_at, numbers_at = rows, rows + 4 * len(names), rows + 8 * len(names)
    texts_at = numbers_at + 2 * len(names)
    texts, places = bytearray(name.encode() + b"\0"), []
    for symbol in names:
        places.append(address + texts_at + len(texts))
        texts += symbol.encode() + b"\0"
    n = len(names)
    tables = (address + at for at in (addresses_at, names_at, numbers_at))
    head = struct.pack("<IIHHIIIIIII", 0, 0, 0, 0, address + texts_at, 1, n, n, *tables)
    rest = struct.pack(f"<{n}I{n}I{n}H", *(symbols[symbol] for symbol in names), *places, *range(n))
    return head + rest + bytes(texts)


# ---- resources ---------------------------------------------------------------------------------------------------------

MANIFEST = """\
<?xml version="1.0" encoding="UTF-8" standalone="yes"?>
<assembly xmlns="urn:schemas-microsoft-com:asm.v1" manifestVersion="1.0">
  <trustInfo xmlns="urn:schemas-microsoft-com:asm.v3"><security><requestedPrivileges>
    <requestedExecutionLevel level="asInvoker" uiAccess="false"/>
  </requestedPrivileges></security></trustInfo>
  <compatibility xmlns="urn:schemas-microsoft-com:compatibility.v1"><application>
    <supportedOS Id="{8e0f7a12-bfb3-4fe8-b9a5-48fd50a15a9a}"/>
  </application></compatibility>
  <application xmlns="urn:schemas-microsoft-com:asm.v3"><windowsSettings>
    <longPathAware xmlns="http://schemas.microsoft.com/SMI/2016/WindowsSettings">true</longPathAware>
    <activeCodePage xmlns="http://schemas.microsoft.com/SMI/2019/WindowsSettings">UTF-8</activeCodePage>
  </windowsSettings></application>
</assembly>
"""


def with_resources(boot: bytes, title: str, version: str, images: Sequence[tuple[int, int, bytes]]) -> bytes:
    """The .exe `boot` with new resources: a manifest, title and version for its properties, and an icon.

    `images`: side in pixels, bits a pixel, and the image as in an .ico file. Raises UnreadableProgram.
    """
    data = bytearray(boot)
    file = _File(data)
    last = file.sections[-1]
    if last.name == ".rsrc":
        del data[last.offset :]
        row, address = last.at, last.address
    else:
        row, address = last.at + _SECTION.size, round_up(last.address + last.memory, _PAGE)
        struct.pack_into("<H", data, file.coff + 2, len(file.sections) + 1)
        if row + _SECTION.size > min(section.offset for section in file.sections if section.length):
            raise UnreadableProgram("the boot loader's header has no room for another section")
    group = struct.pack("<HHH", 0, 1, len(images)) + b"".join(
        struct.pack("<BBBBHHIH", side % 256, side % 256, 0, 0, 1, bits, len(image), number)
        for number, (side, bits, image) in enumerate(images, 1)
    )
    resources = {
        _ICON: {number: image for number, (_, _, image) in enumerate(images, 1)}, _GROUP_ICON: {1: group},
        _VERSION: {1: _version(title, version)}, _MANIFEST: {1: MANIFEST.encode()},
    }  # fmt: skip
    content = _resource_tree(resources, address)
    data += bytes(-len(data) % _FILE_ALIGNMENT)
    length = round_up(len(content), _FILE_ALIGNMENT)
    _SECTION.pack_into(data, row, b".rsrc", len(content), address, length, len(data), 0, 0, 0, 0, _DATA)
    _DIRECTORY.pack_into(data, file.directory(_RESOURCES), address, len(content))
    _DIRECTORY.pack_into(data, file.directory(_CERTIFICATES), 0, 0)
    struct.pack_into("<I", data, file.optional + 56, address + round_up(len(content), _PAGE))  # bytes of the whole in memory
    struct.pack_into("<I", data, file.coff + 4, 0)  # the time it was made
    return bytes(data + content.ljust(length, b"\0"))


def _resource_tree(resources: Mapping[int, Mapping[int, bytes]], address: int) -> bytes:
    """The resource section: tables by type, by number and by language, then a row for each resource, then the resources."""

    def table(rows: Sequence[tuple[int, int]]) -> bytes:
        return struct.pack("<IIHHHH", 0, 0, 0, 0, 0, len(rows)) + b"".join(struct.pack("<II", *row) for row in rows)

    sizes = [16 + 8 * len(resources), *(16 + 8 * len(numbers) for numbers in resources.values())]
    count = sum(map(len, resources.values()))
    languages_at = sum(sizes)
    rows_at = languages_at + 24 * count
    content_at = round_up(rows_at + 16 * count, 16)
    types, middle, languages, rows, content = [], b"", b"", b"", bytearray()
    done, at = 0, sizes[0]
    below = 1 << 31  # marks a table
    for kind, numbers in sorted(resources.items()):
        types.append((kind, at | below))
        at += 16 + 8 * len(numbers)
        names = []
        for number, item in sorted(numbers.items()):
            names.append((number, languages_at + 24 * done | below))
            languages += table([(_ENGLISH, rows_at + 16 * done)])
            rows += struct.pack("<IIII", address + content_at + len(content), len(item), 0, 0)
            content += item + bytes(-len(item) % 16)
            done += 1
        middle += table(names)
    return (table(types) + middle + languages + rows).ljust(content_at, b"\0") + bytes(content)


def _version(title: str, version: str) -> bytes:
    """VS_VERSIONINFO: what Windows shows in a file's properties."""
    numbers = [int(part) if part.isdecimal() else 0 for part in version.split(".")][:4]
    high, low = ((a << 16) | b for a, b in zip(*[iter(numbers + [0] * (4 - len(numbers)))] * 2, strict=True))
    fixed = struct.pack("<13I", 0xFEEF04BD, 0x10000, high, low, high, low, 0x3F, 0, 0x40004, 1, 0, 0, 0)
    title = title[:_TITLE]
    texts = {"FileDescription": title, "ProductName": title, "FileVersion": version, "ProductVersion": version,
             "Comments": "pocketlm"}  # fmt: skip
    strings = b"".join(_padded(_block(key, _wide(value), len(_wide(value)) // 2)) for key, value in texts.items())
    table = _block("040904b0", strings, text=True)  # English, Unicode
    languages = _block("VarFileInfo", _block("Translation", struct.pack("<HH", 0x409, 1200), 4, text=False), text=True)
    info = _padded(_block("StringFileInfo", table, text=True)) + languages
    return _block("VS_VERSION_INFO", _padded(fixed) + info, len(fixed), text=False)


def _block(key: str, content: bytes, value_length: int = 0, text: bool = True) -> bytes:
    """A block of the version resource: its length, the value's length, whether that is text, the key, padding, the content."""
    head = _padded(struct.pack("<HHH", 0, value_length, text) + _wide(key))
    return struct.pack("<H", len(head) + len(content)) + head[2:] + content


def _wide(text: str) -> bytes:
    return text.encode("utf-16-le", "replace") + b"\0\0"


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


# ---- the checksum ------------------------------------------------------------------------------------------------------


def write_checksum(file: BinaryIO) -> None:
    """Compute the checksum of a finished .exe, and write it into the header. The file is read from end to end.

    The header's entry for a signature is cleared: if there was one, it was another file's.
    """
    file.seek(0)
    head = _File(file.read(_PAGE))
    file.seek(head.directory(_CERTIFICATES))
    file.write(bytes(_DIRECTORY.size))
    place = head.optional + _CHECKSUM_AT
    file.seek(place)
    file.write(bytes(4))
    file.seek(0)
    total, length = 0, 0
    while chunk := file.read(1 << 22):
        total, length = _sum(total, chunk), length + len(chunk)
    file.seek(place)
    file.write(struct.pack("<I", total + length & 0xFFFFFFFF))


def _sum(total: int, data: bytes | bytearray) -> int:
    """The ones' complement sum of all 16-bit words, in which the carry is added again: the sum modulo 2**16 - 1."""
    number = int.from_bytes(data, "little")
    total += number % 0xFFFF
    return total % 0xFFFF or (0xFFFF if total or number else 0)
