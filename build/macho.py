"""A macOS boot loader with a model behind it, made ready to be signed.

In: the first bytes of a Mach-O executable and the length of the whole file. Out: the bytes with a header that covers the
file. Knows nothing else. Source: Apple's mach-o/loader.h. codesign takes only files whose last segment, __LINKEDIT, ends
where the file ends, with the string table as its last part; a signature that covered less is taken out of the list.
"""

from __future__ import annotations

import struct

MAGIC = b"\xcf\xfa\xed\xfe"  # 64 bits, little-endian
_HEADER = struct.Struct("<8I")  # magic, processor (2), type, commands, bytes of commands, flags, reserved
_SEGMENT = struct.Struct("<II16sQQQQ")  # command, size, name, address, bytes in memory, offset in the file, bytes in the file
_SYMBOLS = struct.Struct("<IIIIII")  # command, size, symbols' offset and number, strings' offset and bytes
_LC_SYMTAB, _LC_SEGMENT_64, _LC_CODE_SIGNATURE = 0x2, 0x19, 0x1D
_PAGE = 1 << 14


class UnreadableHeader(Exception):
    """The load commands are not what a Mach-O executable has."""


def cover(boot: bytes, file_bytes: int) -> bytes:
    """`boot` with a header that says the file has `file_bytes`; of the same length. UnreadableHeader if it makes no sense."""
    data = bytearray(boot)
    try:
        *start, n_commands, n_bytes, flags, reserved = _HEADER.unpack_from(data)
        commands, at = [], _HEADER.size
        for _ in range(n_commands):
            kind, size = struct.unpack_from("<II", data, at)
            if size < 8 or at + size > _HEADER.size + n_bytes:
                raise UnreadableHeader("the boot loader's load commands make no sense")
            command = data[at : at + size]
            at += size
            if kind == _LC_SEGMENT_64 and command[8:24].rstrip(b"\0") == b"__LINKEDIT":
                *segment, address, _, offset, _ = _SEGMENT.unpack_from(command)
                length = file_bytes - offset
                _SEGMENT.pack_into(command, 0, *segment, address, -(-length // _PAGE) * _PAGE, offset, length)
            elif kind == _LC_SYMTAB:
                *symbols, strings, _ = _SYMBOLS.unpack_from(command)
                _SYMBOLS.pack_into(command, 0, *symbols, strings, file_bytes - strings)
            if kind != _LC_CODE_SIGNATURE:
                commands.append(bytes(command))
    except struct.error:
        raise UnreadableHeader("the boot loader's header makes no sense") from None
    kept = b"".join(commands)
    _HEADER.pack_into(data, 0, *start, len(commands), len(kept), flags, reserved)
    data[_HEADER.size : _HEADER.size + n_bytes] = kept.ljust(n_bytes, b"\0")
    return bytes(data)
