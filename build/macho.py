"""macOS' executables: one processor's part of a file, what a library wants, and a packed program's header and signature.

In: the bytes of Mach-O files. Out: bytes, names; or, for a finished program, its header and an ad-hoc signature, in place.
Knows nothing else. Sources: Apple's mach-o/loader.h, mach-o/fat.h and kern/cs_blobs.h.

Apple's processors run nothing unsigned, and a signature must cover the whole file: the last segment, __LINKEDIT, has to end
where the file ends, with the table of symbol names in front of the signature. So that table is extended to span the model; the
bytes behind the names are never read. An ad-hoc signature holds hashes only: of all the bytes before it, page by page.
"""

from __future__ import annotations

import hashlib
import struct
from typing import BinaryIO

from pocketlm.runtime.memory import round_up

MAGIC = b"\xcf\xfa\xed\xfe"  # 64 bits, little-endian
_UNIVERSAL = b"\xca\xfe\xba\xbe"  # several processors; this part is big-endian
_PROCESSORS = {"aarch64": 0x0100000C, "x86_64": 0x01000007}
_HEADER = struct.Struct("<8I")  # magic, processor (2), type, commands, bytes of commands, flags, reserved
_SEGMENT = struct.Struct("<II16sQQQQ")  # command, size, name, address, bytes in memory, offset in the file, bytes in the file
_SECTION = struct.Struct("<16s16sQQI")  # name, segment, address, bytes, offset in the file, of 80 bytes
_SYMBOLS = struct.Struct("<IIIIII")  # command, size, symbols' offset and number, strings' offset and bytes
_SIGNATURE = struct.Struct("<IIII")  # command, size, offset, bytes
_LC_SYMTAB, _LC_LOAD_DYLIB, _LC_SEGMENT_64, _LC_CODE_SIGNATURE = 0x2, 0xC, 0x19, 0x1D
_SEGMENT_UNIT, _HASHED_PAGE = 1 << 14, 1 << 12
_MOST = 1 << 16  # bytes of load commands

# The signature, big-endian: a list of one blob; the code directory, its identifier, the hashes
_LIST = struct.Struct(">IIIII")  # magic, bytes, number of blobs; kind and offset of the first
_DIRECTORY = struct.Struct(">9I4B4I4Q")
_LIST_MAGIC, _DIRECTORY_MAGIC, _VERSION = 0xFADE0CC0, 0xFADE0C02, 0x20400
_AD_HOC_BY_LINKER, _SHA256, _MAIN_PROGRAM = 0x20002, 2, 1
IDENTIFIER = b"pocketlm"


class UnreadableHeader(Exception):
    """The load commands are not what a Mach-O executable has."""


def part_for(data: bytes, machine: str) -> bytes:
    """The part of a file for a processor, "aarch64" or "x86_64". Raises UnreadableHeader if there is none."""
    wanted = _PROCESSORS[machine]
    if data.startswith(MAGIC) and struct.unpack_from("<I", data, 4)[0] == wanted:
        return data
    if data.startswith(_UNIVERSAL):
        for i in range(struct.unpack_from(">I", data, 4)[0]):
            processor, _, offset, length, _ = struct.unpack_from(">5I", data, 8 + 20 * i)
            if processor == wanted:
                return data[offset : offset + length]
    raise UnreadableHeader(f"there is nothing for {machine} in it")


def needed(library: bytes) -> list[str]:
    """The file names of the libraries that a library needs."""
    _, commands, _ = _commands(library)
    paths = [command[struct.unpack_from("<I", command, 8)[0] :] for kind, command in commands if kind == _LC_LOAD_DYLIB]
    return [path.partition(b"\0")[0].decode().rpartition("/")[2] for path in paths]


def sign(file: BinaryIO) -> None:
    """Change the header of a finished program so that it covers the whole file, and append a signature.

    `file` is open for reading and writing. Raises UnreadableHeader for a header that makes no sense or has no room for one
    more load command.
    """
    end = file.seek(0, 2)
    file.write(bytes(-end % 16))
    code_bytes = file.tell()
    file.seek(0)
    head = file.read(_HEADER.size)
    head += file.read(min(_HEADER.unpack(head)[5], _MOST) + _SIGNATURE.size if len(head) == _HEADER.size else 0)
    head, text = _covered(head, code_bytes, _signature_bytes(code_bytes))
    file.seek(0)
    file.write(head)
    file.seek(0)
    hashes = bytearray()
    while page := file.read(_HASHED_PAGE):
        hashes += hashlib.sha256(page).digest()
    file.write(_signature(bytes(hashes), code_bytes, text).ljust(_signature_bytes(code_bytes), b"\0"))


def signed_bytes(length: int) -> int:
    """The length that a program of `length` bytes has once it is signed."""
    code_bytes = round_up(length, 16)
    return code_bytes + _signature_bytes(code_bytes)


def _commands(data: bytes) -> tuple[tuple[int, ...], list[tuple[int, bytes]], int]:
    """The header's fields, the load commands with their kinds, and where these end."""
    try:
        header = _HEADER.unpack_from(data)
        commands, at, end = [], _HEADER.size, _HEADER.size + header[5]
        for _ in range(header[4]):
            kind, size = struct.unpack_from("<II", data, at)
            if size < 8 or at + size > min(end, len(data)):
                raise UnreadableHeader("the boot loader's load commands make no sense")
            commands.append((kind, bytes(data[at : at + size])))
            at += size
    except struct.error:
        raise UnreadableHeader("the boot loader's header makes no sense") from None
    if not data.startswith(MAGIC):
        raise UnreadableHeader("the boot loader's header makes no sense")
    return header, commands, end


def _covered(data: bytes, code_bytes: int, signature_bytes: int) -> tuple[bytes, tuple[int, int]]:
    """The header, with load commands for a file that consists of code and a signature; and the offset and length of __TEXT."""
    header, commands, end = _commands(data)
    out, text, first = bytearray(), (0, 0), len(data)
    for kind, old in commands:
        command = bytearray(old)
        if kind == _LC_CODE_SIGNATURE:
            continue
        if kind == _LC_SEGMENT_64:
            *start, address, memory, offset, length = _SEGMENT.unpack_from(command)
            name = start[2].rstrip(b"\0")
            if name == b"__TEXT":
                text, first = (offset, length), min(first, *_section_offsets(old, len(data)))
            elif name == b"__LINKEDIT":
                length = code_bytes + signature_bytes - offset
                memory = round_up(length, _SEGMENT_UNIT)
                _SEGMENT.pack_into(command, 0, *start, address, memory, offset, length)
        elif kind == _LC_SYMTAB:
            *symbols, strings, _ = _SYMBOLS.unpack_from(command)
            _SYMBOLS.pack_into(command, 0, *symbols, strings, code_bytes - strings)
        out += command
    out += _SIGNATURE.pack(_LC_CODE_SIGNATURE, _SIGNATURE.size, code_bytes, signature_bytes)
    if _HEADER.size + len(out) > max(first, end):
        raise UnreadableHeader("the boot loader's header has no room for a signature")
    count = sum(kind != _LC_CODE_SIGNATURE for kind, _ in commands) + 1
    result = _HEADER.pack(*header[:4], count, len(out), *header[6:]) + bytes(out)
    return result.ljust(end, b"\0"), text


def _section_offsets(segment: bytes, default: int) -> list[int]:
    """The file offsets of a segment's sections: the load commands must end before the first."""
    count = struct.unpack_from("<I", segment, 64)[0]
    offsets = [_SECTION.unpack_from(segment, 72 + 80 * i)[4] for i in range(count) if 72 + 80 * (i + 1) <= len(segment)]
    return [offset for offset in offsets if offset] or [default]


def _signature_bytes(code_bytes: int) -> int:
    n = _LIST.size + _DIRECTORY.size + len(IDENTIFIER) + 1 + 32 * -(-code_bytes // _HASHED_PAGE)
    return round_up(n, 16)


def _signature(hashes: bytes, code_bytes: int, text: tuple[int, int]) -> bytes:
    hashes_at = _DIRECTORY.size + len(IDENTIFIER) + 1
    length = hashes_at + len(hashes)
    directory = _DIRECTORY.pack(
        _DIRECTORY_MAGIC, length, _VERSION, _AD_HOC_BY_LINKER, hashes_at, _DIRECTORY.size, 0, len(hashes) // 32, code_bytes,
        32, _SHA256, 0, _HASHED_PAGE.bit_length() - 1, 0, 0, 0, 0, 0, *text, _MAIN_PROGRAM,
    )  # fmt: skip
    start = _LIST.pack(_LIST_MAGIC, _LIST.size + length, 1, 0, _LIST.size)
    return start + directory + IDENTIFIER + b"\0" + hashes
