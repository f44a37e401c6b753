"""Integer dot products, one way for every level: 16 rows of unsigned or signed bytes times one row of 16-bit activations.

In: words, each a function that unpacks four columns of 16 rows to <64 x i8>, and the number of the first of these columns; the
activations of some tokens. Out: <16 x i32> for each token. Sums are exact, so their order does not matter.
An activation is x = 256 · high + low: the products of both signed bytes are summed apart and joined at the end, except on x86
without VNNI, which multiplies by x itself. Knows instructions, not formats.

Bytes of weights up to 6 bits are unsigned and below 64. Those of Q8_0 are signed; `SIGNED_ZERO` says how a level takes
them: avx512-vnni, amx and avx-vnni only multiply unsigned by signed bytes, so there the weights are moved up by 128.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pocketlm.runtime.native.ir import I8, I16, I32, VOID, Function, Value

Words = list[tuple[Callable[[], Value], int]]
SIGNED_ZERO = {"avx512-vnni": 128, "amx": 128, "avx-vnni": 128}
WHOLE = ("avx2", "sse4")  # these take activations as int16, the others byte by byte
PAIRS_ADDED = {32: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.sse2.pmadd.wd"}  # of int16, by the bytes of a register
# These take tokens one by one, words unpacked for each: unpacked words fill the registers, and to keep them in memory takes
# longer (by llvm-mca 1.3 times on a Cortex-A72, 2.1 times on a Cortex-A53)
ONE_BY_ONE = ("neon",)


@dataclass(frozen=True)
class Activations:
    """Pointers to one token's activations, at the first column of a run: low bytes and high bytes, or whole int16."""

    low: Value
    high: Value
    whole: Value


def dots(
    f: Function, level: str, words: Words, xs: Sequence[Activations], biggest: int, starts: Sequence[Value | None]
) -> list[Value]:
    """<16 x i32> for every token of `xs`: its start plus the sum over the words of weight · x.

    Weights are of magnitude up to `biggest`; a start is an i32, None is zero.
    """
    return _DOTS[level](f, words, xs, biggest, starts)


def _start(f: Function, start: Value | None, lanes: int) -> Value:
    return f.const(I32.vec(lanes), 0) if start is None else f.splat(start, lanes)


def _here(f: Function, sums: Sequence[Value]) -> list[Value]:
    """The same values, two or more, behind a barrier for the optimiser (x86): all of them are computed before any is used. It
    would otherwise finish one sum after the other, which takes more registers than there are.
    """
    types, values = ", ".join(str(v.type) for v in sums), ", ".join(f"{v.type} {v}" for v in sums)
    places = ",".join(["=x"] * len(sums) + [str(i) for i in range(len(sums))])
    both = f.emit(VOID, f'call {{{types}}} asm "", "{places}"({values})')
    return [f.emit(v.type, f"extractvalue {{{types}}} {both}, {i}") for i, v in enumerate(sums)]


def _broadcast(f: Function, address: Value, lanes: int) -> Value:
    """Four bytes repeated over a vector of `lanes` bytes."""
    return f.bitcast(f.splat(f.load(I32, address), lanes // 4), I8.vec(lanes))


def _together(
    f: Function, words: Words, xs: Sequence[Activations], biggest: int, starts: Sequence[Value | None]
) -> list[Value]:
    """AVX-512: a word is multiplied with all tokens as soon as it is unpacked. The sums of low and of high bytes are
    independent, which hides an instruction's latency; one or two tokens with many words have twice as many sums, used in turn.

    The first `later` tokens do their high bytes first and then begin the sums of their low bytes with 256 times the result.
    That takes fewer additions, and fewer registers at a time: the K formats would not have enough otherwise. Of eight tokens
    with many words half do so, for with all the processor would wait for its own sums, and none does where the sums begin with
    a number, which would be one addition more.
    """
    zero, turns = f.const(I32.vec(16), 0), 2 if len(xs) <= 2 and len(words) > 4 else 1
    later = (4 if len(xs) == 8 and starts[0] is None else 0) if len(words) > 4 else len(xs) if len(xs) > 2 else 0
    low = [[_start(f, start, 16), *[zero] * (turns - 1)] for start in starts]
    high = [[zero] * turns for _ in xs]

    def meet(total: Value, word: Value, bytes_: Value) -> Value:
        return f.call(zero.type, "llvm.x86.avx512.vpdpbusd.512", total, word, _broadcast(f, bytes_, 64))

    unpacked = []
    for i, (unpack, column) in enumerate(words):
        word, own = unpack(), i % turns
        unpacked.append((word, column))
        for t, x in enumerate(xs):
            high[t][own] = meet(high[t][own], word, x.high + column)
            if t >= later:
                low[t][own] = meet(low[t][own], word, x.low + column)

    def joined(t: int) -> Value:
        return sum(low[t][1:], low[t][0]) + (sum(high[t][1:], high[t][0]) << 8)

    found = [joined(t) for t in range(later)]
    for word, column in unpacked:
        found = [meet(total, word, x.low + column) for total, x in zip(found, xs[:later], strict=True)]
    return found + [joined(t) for t in range(later, len(xs))]


def _vnni_256(
    f: Function, words: Words, xs: Sequence[Activations], biggest: int, starts: Sequence[Value | None]
) -> list[Value]:
    """AVX-VNNI has AVX-512's instruction, which multiplies four bytes and adds the products to an i32, for registers of half
    the size, and half as many of these. They hold the sums of both bytes of one or two tokens. Of four tokens the high bytes
    come first, and the sums of the low bytes begin with 256 times the result.
    """
    zeros = [f.const(I32.vec(8), 0)] * 2
    low = [[_start(f, start, 8)] * 2 for start in starts]
    high = [zeros for _ in xs]

    def meet(sums: list[Value], parts: list[Value], bytes_: Value) -> list[Value]:
        four = _broadcast(f, bytes_, 32)
        both = zip(sums, parts, strict=True)
        return _here(f, [f.call(s.type, "llvm.x86.avx512.vpdpbusd.256", s, part, four) for s, part in both])

    later = len(xs) > 2
    for unpack, column in words:
        parts = f.split(unpack(), 32)
        high = [meet(sums, parts, x.high + column) for sums, x in zip(high, xs, strict=True)]
        if not later:
            low = [meet(sums, parts, x.low + column) for sums, x in zip(low, xs, strict=True)]
    found = [[a + (b << 8) for a, b in zip(*own, strict=True)] for own in zip(low, high, strict=True)]
    for unpack, column in words if later else []:
        parts = f.split(unpack(), 32)
        found = [meet(sums, parts, x.low + column) for sums, x in zip(found, xs, strict=True)]
    return [f.join(sums) for sums in found]


def _sixteen(f: Function, bytes_: Value) -> Callable[[int], Value]:
    """Column → the four activations from there on, in all lanes of <16 x i8>, for dot products of aarch64. Sixteen are loaded
    at once: the instruction can name the four that it multiplies by, while loading four into all lanes is an instruction more.
    """
    loaded: dict[int, Value] = {}

    def four(column: int) -> Value:
        first, lane = column - column % 16, column % 16 // 4
        if first not in loaded:
            loaded[first] = f.load(I32.vec(4), bytes_ + first)
        return f.bitcast(f.shuffle(loaded[first], [lane] * 4), I8.vec(16))

    return four


def _by_lane(f: Function, words: Words, xs: Sequence[Activations], biggest: int, starts: Sequence[Value | None]) -> list[Value]:
    """aarch64 with dotprod. One token with many words: a word, in four registers, is multiplied with low and high bytes as soon
    as it is unpacked. Otherwise all words are unpacked first and stay in registers, so that there are not enough for eight
    sums: a token's high bytes come first, and the sums of its low bytes begin with 256 times the result. (Four words are too
    few to gain from eight sums.)
    """
    zeros = [f.const(I32.vec(4), 0)] * 4

    def meet(sums: list[Value], parts: list[Value], four: Value) -> list[Value]:
        sdot = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        return [f.call(s.type, sdot, s, part, four) for s, part in zip(sums, parts, strict=True)]

    if len(xs) == 1 and len(words) > 4:
        low, high = [_start(f, starts[0], 4)] * 4, zeros
        low_bytes, high_bytes = _sixteen(f, xs[0].low), _sixteen(f, xs[0].high)
        for unpack, column in words:
            parts = f.split(unpack(), 16)
            low, high = meet(low, parts, low_bytes(column)), meet(high, parts, high_bytes(column))
        # LLVM would make a multiplication by 256 that it knows two instructions, a shift and an addition
        place = f.unknown(high[0].type, 256)
        return [f.join([l + h * place for l, h in zip(low, high, strict=True)])]

    unpacked = [(f.split(unpack(), 16), column) for unpack, column in words]

    def chain(sums: list[Value], bytes_: Value) -> list[Value]:
        four = _sixteen(f, bytes_)
        for parts, column in unpacked:
            sums = meet(sums, parts, four(column))
        return sums

    found = []
    for x, start in zip(xs, starts, strict=True):
        high = [s << 8 for s in chain(zeros, x.high)]
        found.append(f.join(chain(high if start is None else [s + f.splat(start, 4) for s in high], x.low)))
    return found


def _add_pairs(f: Function, parts: list[Value]) -> Value:
    """Neighbouring lanes added; the parts become one vector."""
    both = f.join(parts)
    lanes = range(0, both.type.lanes, 2)
    return f.shuffle(both, lanes) + f.shuffle(both, [i + 1 for i in lanes])


def _pairs(
    f: Function, words: Words, xs: Sequence[Activations], biggest: int, starts: Sequence[Value | None], *, width: int
) -> list[Value]:
    """x86 without VNNI, with registers of `width` bytes: two columns of a row, as i16, times activations of int16.

    The 16 rows are taken in parts, so that there are eight sums at a time: these, the words and the activations fit into the
    sixteen registers.
    """
    lanes, step = width // 2, min(8 // len(xs), 64 // width)
    found: list[list[Value]] = [[] for _ in xs]
    for first in range(0, 64 // width, step):
        sums = [[_start(f, start, lanes // 2)] * step for start in starts]
        # or LLVM would keep what it has loaded for other rows
        wholes = [f.opaque(x.whole) if step < 64 // width else x.whole for x in xs]
        for unpack, column in words:
            fours = [f.bitcast(part, I16.vec(lanes)) for part in f.split(unpack(), width)[first : first + step]]
            for odd in (0, 1):  # the columns 0 and 2 of four, then 1 and 3
                twos, at = [_bytes_as_words(f, four, odd, biggest > 63) for four in fours], 2 * column + 4 * odd
                for own, whole in zip(sums, wholes, strict=True):
                    pair = f.bitcast(f.splat(f.load(I32, whole + at), lanes // 2), I16.vec(lanes))
                    own[:] = _here(f, [_add_products(f, s, two, pair) for s, two in zip(own, twos, strict=True)])
        for all_of, own in zip(found, sums, strict=True):
            all_of += own
    return [f.join(parts) for parts in found]


def _add_products(f: Function, total: Value, x: Value, pair: Value) -> Value:
    """x86 without VNNI: a register of sums, i32, plus the products of pairs of int16."""
    x, pair = (f.bitcast(v, I16.vec(2 * total.type.lanes)) for v in (x, pair))
    return total + f.call(total.type, PAIRS_ADDED[total.type.bytes], x, pair)


def _bytes_as_words(f: Function, x: Value, odd: int, is_signed: bool) -> Value:
    """The even or the odd bytes of a vector of i16."""
    if not is_signed:
        return x >> 8 if odd else x & 255
    moved = x if odd else x << 8
    return f.emit(x.type, f"ashr {x.type} {moved}, {f.const(x.type, 8)}")


def _neon(f: Function, words: Words, xs: Sequence[Activations], biggest: int, starts: Sequence[Value | None]) -> list[Value]:
    """aarch64 without dotprod, one token: products of bytes are i16; at most `safe` are added before sums become i32."""
    (x,), safe = xs, 32767 // (biggest * 128)
    unpacked = [(unpack(), column) for unpack, column in words]

    def products_of(word: Value, four: Value) -> list[Value]:
        halves = [zip(f.split(part, 8), f.split(four, 8), strict=True) for part in f.split(word, 16)]
        return [f.call(I16.vec(8), "llvm.aarch64.neon.smull.v8i16", a, b) for pairs in halves for a, b in pairs]

    def chain(bytes_: Value) -> Value:
        four = _sixteen(f, bytes_)
        totals = [f.const(I32.vec(4), 0)] * 8
        for first in range(0, len(words), safe):
            sums: list[Value] = []
            for word, column in unpacked[first : first + safe]:
                products = products_of(word, four(column))
                sums = [s + p for s, p in zip(sums, products, strict=True)] if sums else products
            pairs = [f.call(I32.vec(4), "llvm.aarch64.neon.saddlp.v4i32.v8i16", s) for s in sums]
            totals = [t + p for t, p in zip(totals, pairs, strict=True)]
        return _add_pairs(f, totals)

    total = chain(x.low) + (chain(x.high) << 8)
    return [total if starts[0] is None else total + f.splat(starts[0], 16)]


_DOTS: dict[str, Callable[..., list[Value]]] = {
    "avx512-vnni": _together,
    "amx": _together,
    "avx-vnni": _vnni_256,
    "avx2": partial(_pairs, width=32),
    "sse4": partial(_pairs, width=16),
    "dotprod": _by_lane,
    "neon": _neon,
}


# pairs of int16


def pair_dot(f: Function, level: str, total: Value, x: Value, pair: Value) -> Value:
    """<16 x i32> plus the products of pairs: x <32 x i16> by one pair, both of its int16 in an i32."""
    return f.join(_PAIR_DOTS[level](f, total, x, pair))


def _in_registers(
    f: Function, total: Value, x: Value, pair: Value, *, lanes: int, step: Callable[..., Value] = _add_products
) -> list[Value]:
    """x86: registers of so many i32, `step` adds a register's products to its sums."""
    other = f.splat(pair, lanes)
    sums, parts = f.split(total, lanes), f.split(f.bitcast(x, I32.vec(16)), lanes)
    return [step(f, s, part, other) for s, part in zip(sums, parts, strict=True)]


def _vnni(f: Function, total: Value, x: Value, pair: Value) -> Value:
    return f.call(total.type, f"llvm.x86.avx512.vpdpwssd.{8 * total.type.bytes}", total, x, pair)


def _long_products(f: Function, total: Value, x: Value, pair: Value) -> list[Value]:
    """aarch64: the first of all pairs by the first, the second by the second, in registers of four."""
    found = f.split(total, 4)
    for odd in (0, 1):
        those = f.split(f.shuffle(x, range(odd, 32, 2)), 4)
        factor = f.splat(f.cast("trunc", pair >> (16 * odd) if odd else pair, I16), 4)
        products = [f.call(I32.vec(4), "llvm.aarch64.neon.smull.v4i32", part, factor) for part in those]
        found = [s + product for s, product in zip(found, products, strict=True)]
    return found


_PAIR_DOTS: dict[str, Callable[..., list[Value]]] = {
    "avx512-vnni": partial(_in_registers, lanes=16, step=_vnni),
    "amx": partial(_in_registers, lanes=16, step=_vnni),
    "avx-vnni": partial(_in_registers, lanes=8, step=_vnni),
    "avx2": partial(_in_registers, lanes=8),
    "sse4": partial(_in_registers, lanes=4),
    "dotprod": _long_products,
    "neon": _long_products,
}
