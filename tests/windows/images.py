"""The few programs and libraries that no wheel holds and a Python for Windows under wine wants, written byte by byte.

In: nothing, or the functions of a library. Out: PE files for x86-64 ("PE Format", Microsoft). Nothing of this is ever sent.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

_ADDRESS, _UNIT = 0x1000, 0x200  # where the only section is in memory; what lengths in the file are multiples of
_PROGRAM, _LIBRARY = 0x22, 0x2022
_CONSOLE, _ANYTHING = 3, 0xE0000060  # subsystem; a section that is code and data, to read, write and run


def python_exe(library: str) -> bytes:
    """A console program that is nothing but Py_Main(number of arguments, arguments), as CPython's own is.

    The C library is told that it is one: else files put in the place of the standard ones are not what is inherited.
    """
    code = """
        4883EC38        sub rsp, 56
        B901000000      mov ecx, _crt_console_app
        FF15            _set_app_type
        FF15            GetCommandLineW
        488D542430      lea rdx, [rsp + 48]
        4889C1          mov rcx, rax
        FF15            CommandLineToArgvW
        8B4C2430        mov ecx, [rsp + 48]
        4889C2          mov rdx, rax
        FF15            Py_Main
        89C1            mov ecx, eax
        FF15            ExitProcess
    """
    imports = {"kernel32.dll": ["GetCommandLineW", "ExitProcess"], "shell32.dll": ["CommandLineToArgvW"],
               "ucrtbase.dll": ["_set_app_type"], library: ["Py_Main"]}  # fmt: skip
    return _image(_PROGRAM, code, imports)


def empty_exe() -> bytes:
    """A console program that ends."""
    code = """
        4883EC38        sub rsp, 56
        31C9            xor ecx, ecx
        FF15            ExitProcess
    """
    return _image(_PROGRAM, code, {"kernel32.dll": ["ExitProcess"]})


def random_numbers() -> bytes:
    """bcryptprimitives.dll, which Windows has and wine 8 has not: ProcessPrng(buffer, bytes), by RtlGenRandom."""
    return _image(_LIBRARY, "FF25 SystemFunction036", {"advapi32.dll": ["SystemFunction036"]}, "bcryptprimitives.dll",
                  {"ProcessPrng": None})  # fmt: skip


def stable_abi(library: str, functions: Iterable[str]) -> bytes:
    """python3.dll: all that python311.dll offers, under the name that suits every Python 3."""
    owner = library.removesuffix(".dll")
    return _image(_LIBRARY, "", {}, "python3.dll", {function: f"{owner}.{function}" for function in functions})


def _image(
    flags: int, code: str, imports: Mapping[str, Iterable[str]], name: str = "", exports: Mapping[str, str | None] | None = None
) -> bytes:
    """A file with one section: tables, then the code, with which it begins. `exports`: the library and function that a name
    stands for, None for the code. In `code`, FF15 and FF25 (call, jump) go through the address of the import they name."""
    import_table, addresses = _imports(imports, _ADDRESS)
    export_at = _ADDRESS + len(import_table)
    code_at = export_at + len(_exports(name, exports or {}, export_at, 0))
    export_table = _exports(name, exports or {}, export_at, code_at)
    instructions = bytearray()
    for line in code.strip().splitlines():
        digits, _, rest = line.strip().partition(" ")
        instructions += bytes.fromhex(digits)
        if digits in ("FF15", "FF25"):  # relative to the next instruction
            instructions += struct.pack("<i", addresses[rest.strip()] - (code_at + len(instructions) + 4))
    section = import_table + export_table + bytes(instructions)
    length = -(-len(section) // _UNIT) * _UNIT
    end = _ADDRESS + -(-len(section) // _ADDRESS) * _ADDRESS
    file = struct.pack("<HHIIIHH", 0x8664, 1, 0, 0, 0, 240, flags)
    optional = struct.pack(
        "<HBBIIIIIQIIHHHHHHIIIIHHQQQQII", 0x20B, 0, 0, length, 0, 0, code_at if flags == _PROGRAM else 0, _ADDRESS, 0x180000000,
        _ADDRESS, _UNIT, 6, 0, 0, 0, 6, 0, 0, end, _UNIT * 2, 0, _CONSOLE, 0x160, 0x800000, 0x1000, 0x100000, 0x1000, 0, 16,
    )  # fmt: skip
    directories = struct.pack("<4I", export_at, len(export_table), _ADDRESS, len(import_table)) if exports else struct.pack(
        "<4I", 0, 0, _ADDRESS, len(import_table))  # fmt: skip
    row = struct.pack("<8sIIIIIIHHI", b".text", len(section), _ADDRESS, length, _UNIT * 2, 0, 0, 0, 0, _ANYTHING)
    head = b"MZ".ljust(60, b"\0") + struct.pack("<I", 64) + b"PE\0\0" + file + optional + directories.ljust(128, b"\0") + row
    return head.ljust(_UNIT * 2, b"\0") + section.ljust(length, b"\0")


def _imports(libraries: Mapping[str, Iterable[str]], address: int) -> tuple[bytes, dict[str, int]]:
    """The import directory for `address`, and where each function's address will be."""
    directory, rows, texts, places = bytearray(), bytearray(), bytearray(), {}
    rows_at = address + 20 * (len(libraries) + 1)
    texts_at = rows_at + 8 * sum(len(list(names)) + 1 for names in libraries.values())
    for library, names in libraries.items():
        directory += struct.pack("<5I", 0, 0, 0, texts_at + len(texts), rows_at + len(rows))
        texts += library.encode() + b"\0"
        for name in names:
            texts += bytes(len(texts) % 2)
            places[name] = rows_at + len(rows)
            rows += struct.pack("<Q", texts_at + len(texts))
            texts += b"\0\0" + name.encode() + b"\0"
        rows += bytes(8)
    return bytes(directory) + bytes(20) + bytes(rows) + bytes(texts), places


def _exports(library: str, exports: Mapping[str, str | None], address: int, code_at: int) -> bytes:
    """The export directory for `address`; an address within it is a text, the name of the function meant."""
    names = sorted(exports)
    n, texts = len(names), bytearray()
    texts_at = address + 40 + 10 * n

    def text(value: str) -> int:
        texts.extend(value.encode() + b"\0")
        return texts_at + len(texts) - len(value) - 1

    own, places = text(library), [text(name) for name in names]
    meant = [text(other) if (other := exports[name]) else code_at for name in names]
    tables = address + 40, address + 40 + 4 * n, address + 40 + 8 * n
    return struct.pack(f"<IIHH7I{n}I{n}I{n}H", 0, 0, 0, 0, own, 1, n, n, *tables, *meant, *places, *range(n)) + bytes(texts)
