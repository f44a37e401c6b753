"""The likeliest of a vocabulary's logits without sorting all of them, as IR.

In: a module. Out: the functions that `define` lists, `top_k` for Python, the others for draw.py. Knows logits and the SAMPLER
record's memory; not what the candidates are for.

The largest of every sizes.CHUNK logits stands for its chunk: where it is below a bound, so are all others of the chunk. The
k-th largest of these is a lower bound of the k-th largest logit, and few other logits are above it.
"""

from __future__ import annotations

import math

from pocketlm.runtime.native.ir import F32, I16, I32, I64, PTR, VOID, Function, Module, Value
from pocketlm.runtime.native.matrix import ROW
from pocketlm.runtime.native.record_reader import of_sampler as _get
from pocketlm.runtime.native.sizes import CHUNK
from pocketlm.runtime.native.tiling import ROWS

FLT_MAX = (2 - 2**-23) * 2.0**127
DIGIT = 8  # bits by which the candidates are sorted at a time; an even number of times, so that they end where they began


def define(module: Module) -> None:
    """top_k(sampler, logits, k): the k <= n_vocab likeliest, sorted, in the record's `values` and `ids`; equals by their ids.

    survey(s, logits) -> the largest; that of every chunk is in the record's `chunks`. Infinite where one is NaN.
    largest(s) -> the largest of `chunks`.
    chunk(logits, n, i): the largest of the i-th chunk, in the same way.
    greedy(logits, chunks, best): the first of the largest.

    Of logits that are surveyed:
    candidates(s, logits, bound) -> how many there are: those >= `bound` in `values` and `ids`, by their ids.
    sort(s, n): the first n of `values` and `ids`, the largest first, equals as they were.
    first(s, logits, k, least) -> how many there are: the k likeliest as `top_k` has them, of those >= `least`.
    """
    _define_chunk(module)
    with module.function("largest", {"s": PTR}, returns=F32) as (f, s):
        chunks, value = _get(f, s, "chunks", PTR), f.var(F32, -math.inf)
        with f.range(0, _n_chunks(_get(f, s, "n_vocab"))) as i:
            x = f.load(F32, chunks + i * 4, 4)
            value.set(f.select(value.get() >= x, value.get(), x))
        f.ret(value.get(), F32)
    with module.function("survey", {"s": PTR, "logits": PTR}, returns=F32) as (f, s, logits):
        n_vocab, chunks = _get(f, s, "n_vocab"), _get(f, s, "chunks", PTR)
        with f.range(0, _n_chunks(n_vocab)) as i:
            f.store(f.call(F32, "chunk", logits, n_vocab, i), chunks + i * 4, 4)
        f.ret(f.call(F32, "largest", s), F32)
    _define_greedy(module)
    _define_count(module)
    _define_kth(module)
    _define_candidates(module)
    _define_sort(module)
    _define_first(module)
    with module.function("top_k", {"s": PTR, "logits": PTR, "k": I64}, linkage="entry") as (f, s, logits, k):
        f.call(F32, "survey", s, logits)
        f.call(I64, "first", s, logits, k, f.const(F32, -math.inf))


def _lanes(f: Function, condition: Value) -> Value:
    return f.bitcast(condition, I16)


def _n_chunks(n: Value) -> Value:
    return (n + (CHUNK - 1)) // CHUNK


def _define_chunk(module: Module) -> None:
    """chunk(logits, n, i): the largest of the i-th chunk; infinite where one of them is NaN."""
    with module.function("chunk", {"logits": PTR, "n": I64, "i": I64}, returns=F32) as (f, logits, n, i):
        start = i * CHUNK
        stop = f.minimum(start + CHUNK, n)
        whole = stop - (stop - start) % ROWS
        largest, numbers = f.var(ROW, -math.inf), f.var(I16, -1)
        with f.range(start, whole, ROWS) as j:
            v = f.load(ROW, logits + j * 4, 4)
            largest.set(f.select(largest.get() >= v, largest.get(), v))
            numbers.set(numbers.get() & _lanes(f, v <= FLT_MAX))
        result = f.var(F32, f.reduce(largest.get(), "max"))
        with f.range(whole, stop) as j:
            x = f.load(F32, logits + j * 4, 4)
            result.set(f.select(result.get() >= x, result.get(), x))
            with f.when(~(x <= FLT_MAX)):
                numbers.set(0)
        f.ret(f.select(numbers.get().equals(-1), result.get(), math.inf), F32)


def _define_count(module: Module) -> None:
    """count(values, n, bound): how many of the values, filled up with -inf to whole vectors, are at least `bound` > -inf."""
    with module.function("count", {"values": PTR, "n": I64, "bound": F32}, returns=I64) as (f, values, n, bound):
        total, high = f.var(I32.vec(ROWS), 0), f.splat(bound, ROWS)
        with f.range(0, n, ROWS) as i:
            total.set(total.get() + f.cast("zext", f.load(ROW, values + i * 4, 4) >= high, I32))
        f.ret(f.cast("zext", f.reduce(total.get(), "add"), I64))


def _ordered(f: Function, bits: Value) -> Value:
    """The bits of a float32 as an integer in the same order, and back."""
    sign = f.emit(I32, f"ashr i32 {bits}, 31")
    return bits ^ (sign & 0x7FFFFFFF)


def _define_kth(module: Module) -> None:
    """kth(values, n, k, most): the k-th largest of n >= k values; or a bound that k to `most` of them reach."""
    with module.function("kth", {"values": PTR, "n": I64, "k": I64, "most": I64}, returns=F32) as (f, values, n, k, most):
        # n_low >= k values reach `low`, fewer than k reach `high`
        low, high = f.var(I64), f.var(I64)
        low.set(f.cast("sext", _ordered(f, f.bitcast(f.const(F32, -math.inf), I32)), I64))
        high.set(f.cast("sext", _ordered(f, f.bitcast(f.const(F32, math.inf), I32)), I64))
        n_low = f.var(I64, n)
        with f.loop_while(lambda: (high.get() - low.get() > 1) & (n_low.get() > most)):
            middle = low.get() + ((high.get() - low.get()) >> 1)
            bound = f.bitcast(_ordered(f, f.cast("trunc", middle, I32)), F32)
            found = f.call(I64, "count", values, n, bound)
            with f.when(found >= k):
                low.set(middle)
                n_low.set(found)
            with f.when(found < k):
                high.set(middle)
        f.ret(f.bitcast(_ordered(f, f.cast("trunc", low.get(), I32)), F32), F32)


def _define_greedy(module: Module) -> None:
    """greedy(logits, chunks, best): the first of the largest."""
    with module.function("greedy", {"logits": PTR, "chunks": PTR, "best": F32}, returns=I64) as (f, logits, chunks, best):
        at = f.var(I64, 0)
        with f.loop_while(lambda: f.load(F32, chunks + at.get() * 4, 4) < best):
            at.set(at.get() + 1)
        at.set(at.get() * CHUNK)
        with f.loop_while(lambda: f.load(F32, logits + at.get() * 4, 4) < best):
            at.set(at.get() + 1)
        f.ret(at.get())


def _define_candidates(module: Module) -> None:
    with module.function("candidates", {"s": PTR, "logits": PTR, "bound": F32}, returns=I64) as (f, s, logits, bound):
        n_vocab, chunks = _get(f, s, "n_vocab"), _get(f, s, "chunks", PTR)
        values, ids, count = _get(f, s, "values", PTR), _get(f, s, "ids", PTR), f.var(I64, 0)

        def take(j: Value, x: Value) -> None:
            at = count.get()
            f.store(x, values + at * 4, 4)
            f.store(f.cast("trunc", j, I32), ids + at * 4, 4)
            count.set(at + f.cast("zext", x >= bound, I64))

        with f.range(0, _n_chunks(n_vocab)) as i, f.when(f.load(F32, chunks + i * 4, 4) >= bound):
            start = i * CHUNK
            stop = f.minimum(start + CHUNK, n_vocab)
            whole = stop - (stop - start) % ROWS
            high = f.splat(bound, ROWS)
            with f.range(start, whole, ROWS) as j:
                some = _lanes(f, f.load(ROW, logits + j * 4, 4) >= high)
                with f.when(some.differs(0)), f.range(j, j + ROWS) as lane:
                    take(lane, f.load(F32, logits + lane * 4, 4))
            with f.range(whole, stop) as j:
                take(j, f.load(F32, logits + j * 4, 4))
        f.ret(count.get())


def _define_sort(module: Module) -> None:
    """By digits of the values' bits, the lowest first (a radix sort): every pass keeps the order of equals."""
    with module.function("sort", {"s": PTR, "n": I64}) as (f, s, n):
        x, ids, to_x, to_ids = (f.var(PTR, _get(f, s, name, PTR)) for name in ("values", "ids", "sorted", "sorted_ids"))
        places = f.stack(I64, 1 << DIGIT)
        with f.range(0, 32, DIGIT) as shift:

            def place(i: Value) -> Value:
                bits = f.bitcast(f.load(F32, x.get() + i * 4, 4) + 0.0, I32)  # -0.0 is as large as 0.0
                digit = f.cast("zext", _ordered(f, bits) ^ 0x7FFFFFFF, I64) >> shift
                return places + (digit & ((1 << DIGIT) - 1)) * 8

            with f.range(0, 1 << DIGIT) as digit:
                f.store(f.const(I64, 0), places + digit * 8, 8)
            with f.range(0, n) as i:
                at = place(i)
                f.store(f.load(I64, at, 8) + 1, at, 8)
            before = f.var(I64, 0)
            with f.range(0, 1 << DIGIT) as digit:
                at = places + digit * 8
                here = f.load(I64, at, 8)
                f.store(before.get(), at, 8)
                before.set(before.get() + here)
            with f.range(0, n) as i:
                at = place(i)
                to = f.load(I64, at, 8)
                f.store(to + 1, at, 8)
                f.store(f.load(F32, x.get() + i * 4, 4), to_x.get() + to * 4, 4)
                f.store(f.load(I32, ids.get() + i * 4, 4), to_ids.get() + to * 4, 4)
            for one, other in ((x, to_x), (ids, to_ids)):
                kept = one.get()
                one.set(other.get())
                other.set(kept)


def _define_first(module: Module) -> None:
    with module.function("first", {"s": PTR, "logits": PTR, "k": I64, "least": F32}, returns=I64) as (f, s, logits, k, least):
        chunks, values = _get(f, s, "chunks", PTR), _get(f, s, "values", PTR)
        n_chunks, bound = _n_chunks(_get(f, s, "n_vocab")), f.var(F32, least)
        with f.when(n_chunks >= k):
            bound.set(f.maximum(least, f.call(F32, "kth", chunks, n_chunks, k, k + k)))
        n = f.var(I64, f.call(I64, "candidates", s, logits, bound.get()))
        with f.when(n.get() > k * 4):
            f.store(f.splat(f.const(F32, -math.inf), ROWS), values + n.get() * 4, 4)
            bound.set(f.maximum(least, f.call(F32, "kth", values, n.get(), k, k + k)))
            n.set(f.call(I64, "candidates", s, logits, bound.get()))
        f.call(VOID, "sort", s, n.get())
        f.ret(f.minimum(n.get(), k))
