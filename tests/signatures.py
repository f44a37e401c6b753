"""Checks the signature and the segments of a macOS program as its kernel and codesign do; written from Apple's headers anew."""

import hashlib
import mmap
import struct


def check_signature(data: bytes | mmap.mmap) -> list[str]:
    """What is wrong with an ad-hoc signed Mach-O file for one processor; nothing, if it may run."""
    wrong = []
    magic, _, _, kind, n_commands, n_bytes = struct.unpack_from("<6I", data)
    commands, at = [], 32
    for _ in range(n_commands):
        number, size = struct.unpack_from("<II", data, at)
        commands.append((number, data[at : at + size]))
        at += size
    if magic != 0xFEEDFACF or kind != 2 or at != 32 + n_bytes:
        wrong.append("header")
    segments = {}
    for number, command in commands:
        if number == 0x19:
            segments[command[8:24].rstrip(b"\0")] = struct.unpack_from("<QQQQ", command, 24)  # address, memory, offset, length
            for i in range(struct.unpack_from("<I", command, 64)[0]):
                offset = struct.unpack_from("<I", command, 72 + 80 * i + 48)[0]
                if 0 < offset < at:
                    wrong.append("load commands lie over a section")
    previous = None
    for address, memory, offset, length in segments.values():
        if length > memory or address % 4096 or offset % 4096 or (previous is not None and address < previous):
            wrong.append("segments")
        previous = address + memory
    _, _, linkedit, linkedit_bytes = segments[b"__LINKEDIT"]
    if linkedit + linkedit_bytes != len(data):
        wrong.append("__LINKEDIT does not end with the file")
    (signature,) = [command for number, command in commands if number == 0x1D]
    start, length = struct.unpack_from("<II", signature, 8)
    (symbols,) = [command for number, command in commands if number == 0x2]
    strings, n_strings = struct.unpack_from("<II", symbols, 16)
    if start % 16 or start + length != len(data) or strings + n_strings != start:
        wrong.append("the signature's place")
    magic, total, count = struct.unpack_from(">III", data, start)
    slot, offset = struct.unpack_from(">II", data, start + 12)
    if (magic, count, slot) != (0xFADE0CC0, 1, 0) or total > length:
        wrong.append("the list of blobs")
    directory = start + offset
    magic, size, version, flags, hashes, name, special, n, limit = struct.unpack_from(">9I", data, directory)
    hash_bytes, hash_kind, _, page_bits = struct.unpack_from(">4B", data, directory + 36)
    limit64, exec_base, exec_limit, exec_flags = struct.unpack_from(">4Q", data, directory + 56)
    if (magic, version, special, hash_bytes, hash_kind, page_bits) != (0xFADE0C02, 0x20400, 0, 32, 2, 12):
        wrong.append("the code directory")
    if not flags & 2 or exec_flags != 1 or limit64 or limit != start or directory + size > start + total:
        wrong.append("flags and limits")
    if (exec_base, exec_limit) != segments[b"__TEXT"][2:]:
        wrong.append("the executable segment")
    if not data[directory + name : data.find(b"\0", directory + name)].isascii() or n != -(-limit // 4096):
        wrong.append("identifier or number of pages")
    for page in range(n):
        place = directory + hashes + 32 * page
        if hashlib.sha256(data[4096 * page : min(4096 * (page + 1), limit)]).digest() != data[place : place + 32]:
            wrong.append(f"page {page}")
    return wrong
