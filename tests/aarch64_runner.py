"""Runs a function of an aarch64 code image on any machine: in a small executable, under qemu's user-mode emulator.

The executable is built here: the image, an entry that calls the function and writes what came of it to stdout, and one
mapping for each buffer, which ends at most 63 bytes in front of a page that nobody may touch.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from find_qemu import find_qemu

from pocketlm.runtime.native.compiler import compile_object
from pocketlm.runtime.native.levels import LEVELS
from pocketlm.runtime.native.linker import Image, link

QEMU = find_qemu(anywhere=False)
needs_qemu = pytest.mark.skipif(QEMU is None, reason="needs qemu-aarch64 (Debian package qemu-user)")
CPUS = {"neon": "cortex-a72", "dotprod": "cortex-a76"}  # what to emulate for a level: the plainest core that has it
PAGE = 4096
_SYSCALL, _STUB, IMAGE_AT, BUFFERS_AT = 0x400000, 0x401000, 0x500000, 0x40000000  # addresses
_SYSCALL_CODE = struct.pack("<3I", 0xAA0303E8, 0xD4000001, 0xD65F03C0)  # mov x8, x3; svc 0; ret
_SVC = 0xD4000001

# void spawn(flags, top of the stack, function, a, b): a thread, in the same memory, that calls function(a, b) and ends
SPAWN_AT = _SYSCALL + 0x100
_SPAWN_CODE = struct.pack(
    "<15I",
    0xAA0203E9, 0xAA0303EA, 0xAA0403EB,  # mov x9, x2; mov x10, x3; mov x11, x4: a child gets all registers
    0xD2800002, 0xD2800003, 0xD2800004,  # mov x2, 0; mov x3, 0; mov x4, 0
    0xD2801B88, _SVC,                    # mov x8, 220 (clone); svc 0
    0xB4000040, 0xD65F03C0,              # cbz x0, child; ret
    0xAA0A03E0, 0xAA0B03E1, 0xD63F0120,  # child: mov x0, x10; mov x1, x11; blr x9
    0xD2800BA8, _SVC,                    # mov x8, 93 (exit, of this thread); svc 0
)  # fmt: skip
CLONE_FLAGS = 0x50F00  # CLONE_VM | FS | FILES | SIGHAND | THREAD | SYSVSEM, as a thread library asks for them

# int32 give_way(): sched_yield, which may change no register but the result's; Linux keeps them all but x0
GIVE_WAY_AT = _SYSCALL + 0x200
_GIVE_WAY_CODE = struct.pack("<3I", 0xD2800F88, _SVC, 0xD65F03C0)  # mov x8, 124; svc 0; ret
_OWN_CODE = _SYSCALL_CODE.ljust(0x100, b"\0") + _SPAWN_CODE.ljust(0x100, b"\0") + _GIVE_WAY_CODE


def run_aarch64(
    image: Image, symbol: str, args: Sequence[int | bytes | bytearray], cpu: str = "cortex-a72", seconds: float = 60
) -> list[bytes]:
    """Call `symbol` with up to 8 arguments, integers or buffers (passed as pointers, 64-byte aligned).

    Returns the buffers' contents after the call, in the order of the arguments. AssertionError with the emulator's words
    if the program faults.
    """
    return call_aarch64(image, symbol, args, cpu, seconds)[1]


def call_aarch64(
    image: Image, symbol: str, args: Sequence[int | bytes | bytearray], cpu: str = "cortex-a72", seconds: float = 60
) -> tuple[int, list[bytes]]:
    """The same, with the register of the function's integer result (signed, 64 bits) in front."""
    assert QEMU, "qemu-aarch64 is missing"
    assert image.machine == "aarch64"
    assert len(args) <= 8, "more arguments would travel on the stack"
    values, buffers, segments, free = [], [], [], BUFFERS_AT
    for arg in args:
        if isinstance(arg, int):
            values.append(arg)
            continue
        size = -(-max(len(arg), 1) // 64) * 64
        end = free + -(-size // PAGE) * PAGE
        values.append(end - size)
        buffers.append((end - size, len(arg)))
        segments.append((free, bytes(end - size - free) + bytes(arg) + bytes(size - len(arg)), 6))
        free = end + PAGE
    stub = link([compile_object(_stub_ir(IMAGE_AT + image.symbols[symbol], values, buffers), LEVELS["neon"])])
    segments = [(_SYSCALL, _OWN_CODE, 5), (_STUB, stub.code, 5), (IMAGE_AT, image.code, 5), *segments]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program")
        program.write_bytes(_executable(_STUB + stub.symbols["_start"], segments))
        program.chmod(0o700)
        # in the folder, for the emulator leaves a core file where it is
        done = subprocess.run([QEMU, "-cpu", cpu, program], capture_output=True, timeout=seconds, cwd=folder)
    assert done.returncode == 0, f"{symbol} on {cpu}: exit status {done.returncode}, {done.stderr.decode()}"
    (result,) = struct.unpack_from("<q", done.stdout)
    contents, position = [], 8
    for _, size in buffers:
        contents.append(done.stdout[position : position + size])
        position += size
    assert position == len(done.stdout)
    return result, contents


def _stub_ir(function: int, values: Sequence[int], buffers: Sequence[tuple[int, int]]) -> str:
    """The entry: call, write the result and the buffers to file 1, exit. Linux's numbers: 64 write, 94 exit_group."""
    arguments = ", ".join(f"i64 {value}" for value in values)
    writes = "".join(f"  call void @write(ptr inttoptr (i64 {start} to ptr), i64 {size})\n" for start, size in buffers)
    return f"""
define internal void @write(ptr %start, i64 %size) nounwind "no-builtins" {{
entry:
  %end = getelementptr i8, ptr %start, i64 %size
  br label %head
head:
  %p = phi ptr [ %start, %entry ], [ %next, %more ]
  %done = icmp uge ptr %p, %end
  br i1 %done, label %exit, label %more
more:
  %from = ptrtoint ptr %p to i64
  %to = ptrtoint ptr %end to i64
  %left = sub i64 %to, %from
  %n = call i64 inttoptr (i64 {_SYSCALL} to ptr)(i64 1, i64 %from, i64 %left, i64 64)
  %next = getelementptr i8, ptr %p, i64 %n
  br label %head
exit:
  ret void
}}
define void @_start() noreturn nounwind "no-builtins" {{
  %result = alloca i64
  %r = call i64 inttoptr (i64 {function} to ptr)({arguments})
  store i64 %r, ptr %result
  call void @write(ptr %result, i64 8)
{writes}  call i64 inttoptr (i64 {_SYSCALL} to ptr)(i64 0, i64 0, i64 0, i64 94)
  unreachable
}}
"""


def _executable(entry: int, segments: Sequence[tuple[int, bytes, int]]) -> bytes:
    """A static ELF64 program from (page-aligned address, content, rights: 4 read, 2 write, 1 execute)."""
    ident, count = b"\x7fELF\x02\x01\x01", len(segments)
    headers = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 183, 1, entry, 64, 0, 0, 64, 56, count, 0, 0, 0)
    content, offset = b"", PAGE
    for address, data, rights in segments:
        headers += struct.pack("<IIQQQQQQ", 1, rights, offset, address, address, len(data), len(data), PAGE)
        padded = data + bytes(-len(data) % PAGE)
        content += padded
        offset += len(padded)
    return headers.ljust(PAGE, b"\0") + content
