"""Linked code: every level's programs give Python's results; what cannot be linked is refused by name."""

import ctypes
import operator
import struct
from itertools import pairwise

import numpy as np
import pytest
from aarch64_runner import CPUS, QEMU, call_aarch64, needs_qemu
from elf_objects import object_file
from plain_calls import plain_function

from pocketlm.errors import PocketlmError
from pocketlm.runtime.native import levels
from pocketlm.runtime.native.compiler import compile_object
from pocketlm.runtime.native.levels import LEVELS, Level
from pocketlm.runtime.native.linker import Image, ImageError, link, load

HOST = levels.detect()


@pytest.fixture(params=LEVELS.values(), ids=LEVELS.keys())
def level(request) -> Level:
    """Each level that can be executed here, an aarch64 one under the emulator."""
    if request.param.machine == levels.host_machine():
        if not request.param.needs <= levels.cpu_flags(request.param.machine):
            pytest.skip("this CPU lacks the level's instructions")
    elif request.param.name not in CPUS or QEMU is None:
        pytest.skip("needs qemu-aarch64 (Debian package qemu-user)" if request.param.name in CPUS else "no emulator for x86-64")
    return request.param


def call(level: Level, code: Image, symbol: str, *args: "int | bytes") -> tuple[int, list[bytes]]:
    """The function's integer result, and the contents of the buffers among its arguments afterwards."""
    if level.machine != levels.host_machine():
        return call_aarch64(code, symbol, args, CPUS[level.name])
    loaded = load(code)
    try:
        contents = {k: arg for k, arg in enumerate(args) if isinstance(arg, bytes)}
        buffers = {k: ctypes.create_string_buffer(content, len(content)) for k, content in contents.items()}
        values = [ctypes.addressof(buffers[k]) if k in buffers else arg for k, arg in enumerate(args)]
        result = plain_function(loaded.address(symbol), len(args))(*values)
        return result, [buffer.raw for buffer in buffers.values()]
    finally:
        loaded.close()


def build(level: Level, *texts: str) -> Image:
    return link([compile_object(text, level) for text in texts])


def relocation_types(data: bytes) -> set[int]:
    """Relocation types in the loaded sections of an object file, read apart from the linker."""
    (shoff,) = struct.unpack_from("<Q", data, 40)
    (count,) = struct.unpack_from("<H", data, 60)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, shoff + 64 * k) for k in range(count)]
    tables = [h for h in headers if h[1] == 4 and headers[h[7]][2] & 2]
    return {info & 0xFFFFFFFF for h in tables for _, info, _ in struct.iter_unpack("<QQq", data[h[4] : h[4] + h[5]])}


# ---- programs --------------------------------------------------------------------------------------------------------

POLYNOMIAL = """
define void @polynomial(ptr %x, ptr %y, i64 %n) nounwind "no-builtins" {
entry:
  %i = alloca i64
  store i64 0, ptr %i
  br label %head
head:
  %k = load i64, ptr %i
  %more = icmp slt i64 %k, %n
  br i1 %more, label %body, label %done
body:
  %from = getelementptr float, ptr %x, i64 %k
  %to = getelementptr float, ptr %y, i64 %k
  %v = load <8 x float>, ptr %from, align 4
  %a = fmul <8 x float> %v, <float 1.5, float 2.5, float 3.5, float 4.5, float -1.5, float -2.5, float -3.5, float -4.5>
  %b = fadd <8 x float> %a, <float 0.25, float 0.5, float 0.75, float 1.0, float 1.25, float 1.5, float 1.75, float 2.0>
  %c = fmul <8 x float> %b, %v
  store <8 x float> %c, ptr %to, align 4
  %next = add i64 %k, 8
  store i64 %next, ptr %i
  br label %head
done:
  ret void
}"""


def test_a_loop_over_vectors_with_constant_pools(level):
    x = np.random.default_rng(0).standard_normal(8 * 37).astype(np.float32)
    _, (_, y) = call(level, build(level, POLYNOMIAL), "polynomial", x.tobytes(), bytes(x.nbytes), len(x))
    factor = np.array([1.5, 2.5, 3.5, 4.5, -1.5, -2.5, -3.5, -4.5])
    offset = np.arange(1, 9) / 4
    expected = ((x.reshape(-1, 8).astype(np.float64) * factor + offset) * x.reshape(-1, 8)).reshape(-1)
    np.testing.assert_allclose(np.frombuffer(y, np.float32), expected, rtol=1e-6, atol=1e-6)


CASES = [(3 * k + 1, ("add", "mul", "xor", "sub", "or")[k % 5]) for k in range(24)]
SWITCH = (
    'define i64 @choose(i64 %k, i64 %x) nounwind "no-builtins" {\nentry:\n  switch i64 %k, label %other ['
    + "".join(f" i64 {k}, label %case{k}" for k in range(len(CASES)))
    + " ]\n"
    + "".join(f"case{k}:\n  %r{k} = {op} i64 %x, {n}\n  ret i64 %r{k}\n" for k, (n, op) in enumerate(CASES))
    + "other:\n  ret i64 -1\n}"
)


def test_a_jump_table_reaches_every_case(level):
    code = build(level, SWITCH)
    assert relocation_types(compile_object(SWITCH, level)) == ({2} if level.machine == "x86_64" else {275, 277})
    python = {"add": operator.add, "mul": operator.mul, "xor": operator.xor, "sub": operator.sub, "or": operator.or_}
    cases = range(-1, len(CASES) + 1) if level.machine == HOST.machine else (-1, 0, 7, 23, 24)  # an emulator starts slowly
    for k in cases:
        expected = python[CASES[k][1]](12345, CASES[k][0]) if 0 <= k < len(CASES) else -1
        assert call(level, code, "choose", k, 12345)[0] == expected


CALLER = """
@scale = constant [4 x i64] [i64 2, i64 3, i64 5, i64 7]
declare i64 @twice(i64)
define i64 @scaled(i64 %x, i64 %k) nounwind noinline "no-builtins" {
  %p = getelementptr i64, ptr @scale, i64 %k
  %s = load i64, ptr %p
  %m = mul i64 %x, %s
  ret i64 %m
}
define i64 @outer(i64 %x) nounwind "no-builtins" {
  %a = call i64 @twice(i64 %x)
  %b = call i64 @scaled(i64 %a, i64 3)
  %c = add i64 %b, 1
  %d = tail call i64 @twice(i64 %c)
  ret i64 %d
}"""
CALLED = """
@scale = external constant [4 x i64]
declare i64 @scaled(i64, i64)
define i64 @twice(i64 %x) nounwind "no-builtins" {
  %p = getelementptr i64, ptr @scale, i64 %x
  %first = load i64, ptr @scale
  %a = call i64 @scaled(i64 %x, i64 0)
  %b = add i64 %a, %first
  ret i64 %b
}"""


def test_objects_call_each_other_and_share_constants(level):
    objects = [compile_object(text, level) for text in (CALLER, CALLED)]
    assert set().union(*map(relocation_types, objects)) >= ({2, 4} if level.machine == "x86_64" else {275, 277, 282, 283})
    expected = (2 * (11 * 2 + 2) * 7 + 2) + 2
    for order in (objects, objects[::-1]):
        assert call(level, link(order), "outer", 11)[0] == expected


RELATIVE = """
@table32 = constant [2 x i32] [
  i32 trunc (i64 sub (i64 ptrtoint (ptr @plus to i64), i64 ptrtoint (ptr @table32 to i64)) to i32),
  i32 trunc (i64 sub (i64 ptrtoint (ptr @minus to i64), i64 ptrtoint (ptr @table32 to i64)) to i32)]
@table64 = constant [1 x i64] [i64 sub (i64 ptrtoint (ptr @minus to i64), i64 ptrtoint (ptr @table64 to i64))]
define i64 @plus(i64 %x) nounwind "no-builtins" {
  %r = add i64 %x, 1000
  ret i64 %r
}
define i64 @minus(i64 %x) nounwind "no-builtins" {
  %r = sub i64 %x, 1000
  ret i64 %r
}
define i64 @through32(i64 %k, i64 %x) nounwind "no-builtins" {
  %p = getelementptr i32, ptr @table32, i64 %k
  %d32 = load volatile i32, ptr %p
  %d = sext i32 %d32 to i64
  %f = getelementptr i8, ptr @table32, i64 %d
  %r = call i64 %f(i64 %x)
  ret i64 %r
}
define i64 @through64(i64 %x) nounwind "no-builtins" {
  %d = load volatile i64, ptr @table64
  %f = getelementptr i8, ptr @table64, i64 %d
  %r = tail call i64 %f(i64 %x)
  ret i64 %r
}"""


def test_distances_between_code_and_constants(level):
    code = build(level, RELATIVE)
    assert relocation_types(compile_object(RELATIVE, level)) >= ({24, 2} if level.machine == "x86_64" else {260, 261})
    assert call(level, code, "through32", 0, 5)[0] == 1005
    assert call(level, code, "through32", 1, 5)[0] == -995
    assert call(level, code, "through64", 5)[0] == -995


WIDTHS = """
@c8 = constant i8 -17
@c16 = constant i16 -3000
@c32 = constant i32 -200000
@c64 = constant i64 -5000000000
@c128 = constant <2 x i64> <i64 41, i64 43>, align 16
@pad = constant [3 x i8] c"abc", align 1
define i64 @widths(ptr %out, i64 %k) nounwind "no-builtins" {
  %b = load volatile i8, ptr @c8
  %h = load volatile i16, ptr @c16
  %w = load volatile i32, ptr @c32
  %d = load volatile i64, ptr @c64
  %q = load volatile <2 x i64>, ptr @c128
  store <2 x i64> %q, ptr %out, align 1
  %p = getelementptr i8, ptr @pad, i64 %k
  %c = load i8, ptr %p
  %b1 = sext i8 %b to i64
  %h1 = sext i16 %h to i64
  %w1 = sext i32 %w to i64
  %c1 = zext i8 %c to i64
  %s1 = add i64 %b1, %h1
  %s2 = add i64 %s1, %w1
  %s3 = add i64 %s2, %d
  %s4 = add i64 %s3, %c1
  ret i64 %s4
}"""


def test_constants_of_every_width(level):
    if level.machine == "aarch64":  # the page of each, and its offset for a load of each width
        assert relocation_types(compile_object(WIDTHS, level)) == {275, 277, 278, 284, 285, 286, 299}
    result, (pair,) = call(level, build(level, WIDTHS), "widths", bytes(16), 1)
    assert (result, struct.unpack("<2q", pair)) == (-17 - 3000 - 200000 - 5000000000 + ord("b"), (41, 43))


DOT = """
declare <4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8(<4 x i32>, <16 x i8>, <16 x i8>)
define void @dot(ptr %a, ptr %b, ptr %out) nounwind "no-builtins" {
  %x = load <16 x i8>, ptr %a
  %y = load <16 x i8>, ptr %b
  %s = call <4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8(<4 x i32> zeroinitializer, <16 x i8> %x, <16 x i8> %y)
  store <4 x i32> %s, ptr %out
  ret void
}"""


@needs_qemu
def test_dot_products_on_a_core_that_has_them_and_no_other():
    a, b = np.random.default_rng(1).integers(-128, 128, (2, 16), dtype=np.int8)
    code = build(LEVELS["dotprod"], DOT)
    _, (_, _, out) = call_aarch64(code, "dot", [a.tobytes(), b.tobytes(), bytes(16)], CPUS["dotprod"])
    assert np.frombuffer(out, np.int32).tolist() == (a.astype(int) * b).reshape(4, 4).sum(1).tolist()
    with pytest.raises(AssertionError, match="signal 4"):  # illegal instruction
        call_aarch64(code, "dot", [a.tobytes(), b.tobytes(), bytes(16)], CPUS["neon"])


# ---- relocations that LLVM emits rarely or never in these programs, from objects made by hand ------------------------

NOP, RET = 0xD503201F, 0xD65F03C0
MOV_X0_5, MOV_X0_6 = 0xD28000A0, 0xD28000C0
BY_HAND = {  # instruction with an empty field, and the type that fills it; followed by code that returns 5, and 6 if skipped
    "condbr19 (cbz xzr)": (280, 0xB400001F, 6),
    "tstbr14 (tbz xzr)": (279, 0x3600001F, 6),
    "jump26 (b)": (282, 0x14000000, 6),
    "ld_prel_lo19 (ldr x0)": (273, 0x58000000, 0x1122334455667788),
    "adr_prel_lo21 (adr x0)": (274, 0x10000000, 28),
}


@needs_qemu
@pytest.mark.parametrize("kind", BY_HAND)
def test_aarch64_references_made_by_hand(kind):
    number, word, expected = BY_HAND[kind]
    program = [word, RET if "x0)" in kind else NOP, MOV_X0_5, RET, MOV_X0_6, RET]
    constant = struct.pack("<6I", *program) + bytes(8) + struct.pack("<Q", 0x1122334455667788)
    symbol, addend = ("value", 0) if "ldr" in kind else ("skip", 12) if "adr" in kind else ("skip", 0)
    code = link([object_file("aarch64", constant, {"f": 0, "skip": 16, "value": 32}, [(0, number, symbol, addend)])])
    result, _ = call_aarch64(code, "f", [])
    if "adr " in kind:  # an address: where the function is, plus the distance
        result &= 0xFFF
    assert result == expected


@pytest.mark.parametrize(
    ("machine", "kind"), [("x86_64", 1), ("x86_64", 9), ("x86_64", 10), ("x86_64", 42), ("aarch64", 257), ("aarch64", 311)]
)
def test_absolute_addresses_and_offset_tables_are_refused(machine, kind):
    with pytest.raises(ImageError, match=rf"relocation type {kind} \(to somewhere\)"):
        link([object_file(machine, bytes(16), {"f": 0, "somewhere": 8}, [(0, kind, "somewhere", 0)])])


def test_a_reference_that_does_not_reach_is_refused():
    far = object_file("aarch64", bytes(1 << 21), {"f": 0, "far": (1 << 21) - 4}, [(0, 280, "far", 0)])
    with pytest.raises(ImageError, match="reference to far does not reach"):
        link([far])
    odd = object_file("aarch64", bytes(32), {"f": 0, "odd": 9}, [(0, 286, "odd", 0)])
    with pytest.raises(ImageError, match="reference to odd does not reach"):
        link([odd])


def test_sections_keep_their_alignment():
    alignments = {1: 1, 3: 64, 7: 32, 5: 16}  # of sections with so many bytes
    code = link([object_file("x86_64", b"\xc3" * size, {f"f{size}": 0}, align=align) for size, align in alignments.items()])
    assert [code.symbols[f"f{size}"] % align for size, align in alignments.items()] == [0, 0, 0, 0]
    ends = sorted((code.symbols[f"f{size}"], code.symbols[f"f{size}"] + size) for size in (1, 3, 7, 5))
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))


# ---- what is refused -------------------------------------------------------------------------------------------------

MEMSET = """
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
define void @clear(ptr %p, i64 %n) nounwind "no-builtins" {
  call void @llvm.memset.p0.i64(ptr %p, i8 0, i64 %n, i1 false)
  ret void
}"""
EXPF = """
declare <4 x float> @llvm.exp.v4f32(<4 x float>)
define void @exp(ptr %p) nounwind "no-builtins" {
  %v = load <4 x float>, ptr %p
  %e = call <4 x float> @llvm.exp.v4f32(<4 x float> %v)
  store <4 x float> %e, ptr %p
  ret void
}"""
HALF = """
define float @widen(ptr %p) nounwind "no-builtins" {
  %h = load half, ptr %p
  %f = fpext half %h to float
  ret float %f
}"""
DATA = '@state = global i64 1\ndefine ptr @f() nounwind "no-builtins" {\n  ret ptr @state\n}'


@pytest.mark.parametrize(
    ("text", "level_name", "names"),
    [
        (MEMSET, "avx2", "memset"),
        (MEMSET, "neon", "memset"),
        (EXPF, "avx2", "expf"),
        (HALF, "sse4", "__extendhfsf2"),
        (DATA, "avx2", r"\.data"),
        (DATA.replace("i64 1", "i64 0"), "neon", r"\.bss"),
        (DATA.replace("global", "thread_local global").replace("ret ptr @state", "ret ptr null"), "avx2", r"\.tdata"),
    ],
)
def test_calls_to_libraries_and_writable_data_are_refused_by_name(text, level_name, names):
    with pytest.raises(ImageError, match=rf"\b{names}\b" if names[0] != "\\" else names):
        build(LEVELS[level_name], text)


def test_objects_that_do_not_fit_together_are_refused():
    one = object_file("x86_64", b"\xc3", {"f": 0})
    for objects, words in (
        ([one, one], "define f twice"),
        ([one, object_file("aarch64", bytes(4), {"g": 0})], "one machine, got aarch64, x86_64"),
        ([], "got none"),
        ([b"MZ" + bytes(100)], "not an object file"),
        ([one[:16] + b"\3" + one[17:]], "not relocatable"),
    ):
        with pytest.raises(ImageError, match=words):
            link(objects)


LEAF = """
define i64 @leaf(i64 %x, i64 %k) nounwind "no-builtins" {
  %p = alloca [8 x i64]
  %to = getelementptr i64, ptr %p, i64 %k
  store volatile i64 %x, ptr %to
  %y = load volatile i64, ptr %p
  ret i64 %y
}"""


def test_x86_code_keeps_off_the_red_zone():
    """Windows may write below the stack pointer: also functions that call nothing put their locals above it."""
    assert b"\x48\x83\xec" in build(LEVELS["sse4"], LEAF).code  # sub rsp, n


def test_ir_that_llvm_does_not_accept_is_one_line():
    with pytest.raises(PocketlmError) as error:
        compile_object("define void @f() {\n  ret i32 0\n}", LEVELS["avx2"])
    assert "\n" not in str(error.value)
