"""How each weight format's blocks become numbers: one short function per format, 16 rows at a time.

In: pointers to the planes of one block of 16 rows (tiling.py), and what to do with each run of columns that share a
scale: the matrix kernel multiplies it with activations, the embedding kernel writes one row of it out. Format facts: the
`gguf` package and the ggml repository.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from pocketlm.runtime.formats import IQ4_STEPS, MXFP4_STEPS
from pocketlm.runtime.native.dot import SIGNED_ZERO, Words
from pocketlm.runtime.native.ir import F16, F32, I1, I8, I16, I32, I64, Function, Value
from pocketlm.runtime.native.vector_math import AVX512, from_half, look_up

BYTES = I8.vec(64)


@dataclass(frozen=True)
class Run:
    """`count` columns from `column` on: weight = scale · (byte - zero) + offset, scale and offset one a row."""

    column: Value | int
    count: int
    words: Words  # functions that unpack four columns each, and the first column of these within the run
    scale: Value  # <16 x float>
    offset: Value | None
    zero: int
    biggest: int  # bytes are 0..biggest, unsigned; 128: signed bytes


Planes = Mapping[str, Value]
Each = Callable[[Run], None]
Runs = Callable[[Function, str, Planes, Each], None]


def _halves(f: Function, level: str, address: Value) -> Value:
    return from_half(f, level, f.load(F16.vec(16), address, 32))


def _fours(unpack: Callable[[int], Value], n: int) -> Words:
    return [(partial(unpack, k), 4 * k) for k in range(n)]


def _q8_0(f: Function, level: str, p: Planes, each: Each) -> None:
    each(Run(0, 32, _fours(lambda k: f.load(BYTES, p["q"] + 64 * k, 32), 8), _halves(f, level, p["d"]), None, 0, 128))


def _spread(f: Function, level: str, address: Value) -> Value:
    """64 bits as <64 x i8>: 16 where a bit is set, else 0."""
    if level not in ("dotprod", "neon"):
        return f.select(f.bitcast(f.load(I64, address, 8), I1.vec(64)), f.const(BYTES, 16), f.const(BYTES, 0))
    # NEON has no masks, and LLVM takes 64 bits apart one by one: each byte eight times, tested for a bit of its own
    repeated = f.shuffle(f.load(I8.vec(8), address, 8), [lane // 8 for lane in range(64)])
    bits = repeated & f.vector(BYTES, [1 << lane % 8 for lane in range(64)])
    return f.select(bits.equals(0), f.const(BYTES, 0), f.const(BYTES, 16))


def _nibbles(f: Function, q: Value, become: Callable[[int, Value], Value]) -> Words:
    """Words of 32 columns, the first 16 in low halves, the others in high ones: what the codes of the k-th `become`."""
    packed: dict[int, Value] = {}

    def unpack(k: int) -> Value:
        if k % 4 not in packed:
            packed[k % 4] = f.load(BYTES, q + 64 * (k % 4), 32)
        return become(k, packed[k % 4] >> 4 if k >= 4 else packed[k % 4] & 15)

    words = _fours(unpack, 8)
    return [words[k] for k in (0, 4, 1, 5, 2, 6, 3, 7)]  # the two that lie in the same bytes one after the other


def _simple(f: Function, level: str, p: Planes, each: Each, *, fifth: bool, minimum: bool) -> None:
    """Q4_0, Q4_1, Q5_0, Q5_1: one scale for 32 columns."""
    words = _nibbles(f, p["q"], lambda k, code: code | _spread(f, level, p["h"] + 8 * k) if fifth else code)
    offset = _halves(f, level, p["m"]) if minimum else None
    zero = 0 if minimum else 16 if fifth else 8
    each(Run(0, 32, words, _halves(f, level, p["d"]), offset, zero, 31 if fifth else 15))


def _six_bit_scales(f: Function, s: Value) -> tuple[list[Value], list[Value]]:
    """Eight scales and eight minima of 6 bits from 12 bytes, as <16 x i8> each."""
    b = [f.load(I8.vec(16), s + 16 * i, 16) for i in range(12)]
    scales = [b[j] & 63 for j in range(4)] + [(b[8 + j] & 15) | ((b[j] >> 6) << 4) for j in range(4)]
    minima = [b[4 + j] & 63 for j in range(4)] + [(b[8 + j] >> 4) | ((b[4 + j] >> 6) << 4) for j in range(4)]
    return scales, minima


def _for_each(f: Function, level: str, n: int, body: Callable[[Value | int], None]) -> None:
    """`body` of 0 … n - 1: one after the other where registers hold what a loop would keep in memory, else a loop."""
    if level in AVX512:
        for i in range(n):
            body(i)
    else:
        with f.range(0, n) as i:
            body(i)


def _shifted(f: Function, x: Value, bits: Value | int) -> Value:
    """64 bytes shifted right. Where `bits` is a loop's, a neighbour's bits come in: x86 shifts words, no bytes."""
    if isinstance(bits, int):
        return x >> bits
    words = I16.vec(32)
    return f.bitcast(f.bitcast(x, words) >> f.splat(f.cast("trunc", bits, I16), 32), BYTES)


def _parts(f: Function, level: str, body: Callable[[Value | int, Value | int, int], None]) -> None:
    """Emit `body(half, odd, quarter)` for both halves of 256 columns and, in each, for the even runs of 16 of its quarters and
    for the odd ones.
    """

    def quarters(part: Value | int, odd: Value | int) -> None:
        for quarter in range(4):
            body(part, odd, quarter)

    _for_each(f, level, 2, lambda part: _for_each(f, level, 2, lambda odd: quarters(part, odd)))


def _k_quant(f: Function, level: str, p: Planes, each: Each, *, fifth: bool) -> None:
    """Q4_K, Q5_K: 256 columns in eight runs of 32, each with a 6-bit scale and minimum."""
    d, m = _halves(f, level, p["d"]), _halves(f, level, p["m"])
    table = f.stack(F32.vec(16), 16)  # scales and offsets of the eight runs, so that a loop can pick them
    for j, (scale, minimum) in enumerate(zip(*_six_bit_scales(f, p["s"]), strict=True)):
        f.store(d * f.cast("uitofp", scale, F32), table + 128 * j, 64)
        f.store(0.0 - m * f.cast("uitofp", minimum, F32), table + (128 * j + 64), 64)

    def pair(i: Value | int) -> None:  # runs 2i and 2i + 1 share 32 bytes: the low halves and the high halves
        for odd in (0, 1):

            def unpack(k: int, odd: int = odd) -> Value:
                packed = f.load(BYTES, p["q"] + (i * 512 + 64 * k), 32)
                v = packed >> 4 if odd else packed & 15
                return v | (((_shifted(f, f.load(BYTES, p["h"] + 64 * k, 32), i * 2) >> odd) & 1) << 4) if fifth else v

            scale, offset = (f.load(F32.vec(16), table + (i * 256 + 128 * odd + at), 64) for at in (0, 64))
            each(Run(i * 64 + 32 * odd, 32, _fours(unpack, 8), scale, offset, 0, 31 if fifth else 15))

    _for_each(f, level, 4, pair)


def _q6_k(f: Function, level: str, p: Planes, each: Each) -> None:
    d = _halves(f, level, p["d"])
    # 16 columns a scale; 128 columns (a part) share 64 bytes of low and 32 bytes of high bits, in quarters of 32

    def run(part: Value | int, odd: Value | int, quarter: int) -> None:
        def unpack(k: int) -> Value:
            low = f.load(BYTES, p["q"] + (part * 1024 + odd * 256 + 512 * (quarter % 2) + 64 * k), 32)
            high = f.load(BYTES, p["h"] + (part * 512 + odd * 256 + 64 * k), 32)
            return (low >> 4 if quarter >= 2 else low & 15) | (((high >> (2 * quarter)) & 3) << 4)

        scale = f.load(I8.vec(16), p["s"] + (part * 128 + odd * 16 + 32 * quarter), 16)
        column = part * 128 + odd * 16 + 32 * quarter
        each(Run(column, 16, _fours(unpack, 4), d * f.cast("sitofp", scale, F32), None, 32, 63))

    _parts(f, level, run)


def _q2_k(f: Function, level: str, p: Planes, each: Each) -> None:
    d, m = _halves(f, level, p["d"]), _halves(f, level, p["m"])
    # 16 columns a scale; 128 columns (a part) share 32 bytes, in quarters of 32

    def run(part: Value | int, odd: Value | int, quarter: int) -> None:
        def unpack(k: int) -> Value:
            return (f.load(BYTES, p["q"] + (part * 512 + odd * 256 + 64 * k), 32) >> (2 * quarter)) & 3

        packed = f.load(I8.vec(16), p["s"] + (part * 128 + odd * 16 + 32 * quarter), 16)
        scale, minimum = (f.cast("uitofp", bits, F32) for bits in (packed & 15, packed >> 4))
        column = part * 128 + odd * 16 + 32 * quarter
        each(Run(column, 16, _fours(unpack, 4), d * scale, 0.0 - m * minimum, 0, 3))

    _parts(f, level, run)


def _q3_k(f: Function, level: str, p: Planes, each: Each) -> None:
    d, b = _halves(f, level, p["d"]), [f.load(I8.vec(16), p["s"] + 16 * i, 16) for i in range(12)]
    table = f.stack(F32.vec(16), 16)  # the scales of the sixteen runs, so that loops can pick them
    for i in range(16):
        low = b[i] & 15 if i < 8 else b[i - 8] >> 4
        six = low | (((b[8 + i % 4] >> (i // 4 * 2)) & 3) << 4)
        f.store(d * f.cast("sitofp", six - 32, F32), table + 64 * i, 64)

    def run(part: Value | int, odd: Value | int, quarter: int) -> None:
        def unpack(k: int) -> Value:
            low = (f.load(BYTES, p["q"] + (part * 512 + odd * 256 + 64 * k), 32) >> (2 * quarter)) & 3
            high = _shifted(f, f.load(BYTES, p["h"] + (odd * 256 + 64 * k), 32), part * 4)
            return low | (((high >> quarter) & 1) << 2)

        scale = f.load(F32.vec(16), table + (part * 512 + odd * 64 + 128 * quarter), 64)
        each(Run(part * 128 + odd * 16 + 32 * quarter, 16, _fours(unpack, 4), scale, None, 4, 7))

    _parts(f, level, run)


def _steps(f: Function, level: str, steps: Sequence[int], q: Value) -> tuple[Words, int, int]:
    """Words of 32 columns whose codes are looked up in `steps`; their zero point and largest byte.

    The table holds step + zero point, so that unpacked bytes are what the level's products take: 16 makes steps below 16
    unsigned; larger ones get the zero point that the level needs for signed bytes.
    """
    zero = 16 if max(map(abs, steps)) < 16 else SIGNED_ZERO.get(level, 0)
    table = [(step + zero) & 255 for step in steps]
    return _nibbles(f, q, lambda _, code: look_up(f, level, table, code)), zero, max(table) if zero else 128


def _iq4_nl(f: Function, level: str, p: Planes, each: Each) -> None:
    words, zero, biggest = _steps(f, level, IQ4_STEPS, p["q"])
    each(Run(0, 32, words, _halves(f, level, p["d"]), None, zero, biggest))


def _iq4_xs(f: Function, level: str, p: Planes, each: Each) -> None:
    d, high = _halves(f, level, p["d"]), f.load(I16.vec(16), p["h"], 32)
    table = f.stack(F32.vec(16), 8)
    for i in range(8):
        low = f.load(I8.vec(16), p["s"] + 16 * (i // 2), 16)
        six = f.cast("zext", low >> 4 if i % 2 else low & 15, I16) | (((high >> (2 * i)) & 3) << 4)
        f.store(d * f.cast("sitofp", six - 32, F32), table + 64 * i, 64)
    with f.range(0, 8) as i:
        words, zero, biggest = _steps(f, level, IQ4_STEPS, p["q"] + i * 256)
        each(Run(i * 32, 32, words, f.load(F32.vec(16), table + i * 64, 64), None, zero, biggest))


def _mxfp4(f: Function, level: str, p: Planes, each: Each) -> None:
    words, zero, biggest = _steps(f, level, MXFP4_STEPS, p["q"])
    # 2^(e - 128): below 2^-126 the exponent's field is 0 and the fraction's highest bits say it
    e = f.cast("zext", f.load(I8.vec(16), p["e"], 16), I32)
    bits = f.select(e < 2, f.const(e.type, 0x00200000) << e, (e - 1) << 23)
    each(Run(0, 32, words, f.bitcast(bits, F32.vec(16)), None, zero, biggest))


RUNS: dict[str, Runs] = {
    "Q8_0": _q8_0,
    "Q4_0": partial(_simple, fifth=False, minimum=False),
    "Q4_1": partial(_simple, fifth=False, minimum=True),
    "Q5_0": partial(_simple, fifth=True, minimum=False),
    "Q5_1": partial(_simple, fifth=True, minimum=True),
    "Q4_K": partial(_k_quant, fifth=False),
    "Q5_K": partial(_k_quant, fifth=True),
    "Q6_K": _q6_k,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}


SHORT_RUNS = ("Q6_K", "Q2_K", "Q3_K")  # of 16 columns; the others' have 32


def _bf16(f: Function, level: str, x: Value) -> Value:
    lanes = x.type.lanes
    return f.bitcast(f.cast("zext", f.bitcast(x, I16.vec(lanes)), I32) << 16, F32.vec(lanes))


FLOATS: dict[str, Callable[[Function, str, Value], Value]] = {  # how a loaded element or vector becomes float32
    "F32": lambda f, level, x: x,
    "F16": from_half,
    "BF16": _bf16,
}
FLOAT_TYPES = {"F32": F32, "F16": F16, "BF16": F16}
