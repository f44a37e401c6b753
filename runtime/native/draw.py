"""Drawing a token in compiled code, as IR: what sampling.py says with NumPy, for chains that begin with top-k.

In: a module. Out: the function `draw` in it, and for other chains `top_k` and `sum_exp`. Knows logits and the SAMPLER record,
not where random numbers come from.

The k likeliest are found without sorting the vocabulary: the k-th largest of the largest logits of its chunks is a bound on
the k-th largest of all, and few others are above it. Weights and sums are float64 in the same order as NumPy's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from pocketlm.runtime.native.ir import F32, F64, I1, I16, I32, I64, PTR, VOID, Function, Module, Value, Var
from pocketlm.runtime.native.matrix import ROW
from pocketlm.runtime.native.record_reader import of_sampler as _get
from pocketlm.runtime.native.records import SAMPLER, offset
from pocketlm.runtime.native.sizes import BROKEN, CHUNK, NO_CHOICE, UNKNOWN_ID
from pocketlm.runtime.native.tiling import ROWS
from pocketlm.runtime.native.vector_math import exp_of_negative

FLT_MAX = (2 - 2**-23) * 2.0**127
LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # of float64: the high part has trailing zeros
EXP_MIN = -708.0  # below, e^x is no normal float64: 0
TERMS = 13  # of e^x's series, for |x| up to ln(2) / 2: the next is 4e-18


def define(module: Module) -> None:
    """draw(sampler, logits, ids, n_ids, u) -> id, or one of sizes' reasons why there is none.

    `ids`: int32, the text so far; `u`: uniform in [0, 1). The logits are edited for the while of the call. With the record's
    `logprobs`, its `logit` is the drawn token's minus the largest, `sum` is that of all exp(logit - largest).

    top_k(sampler, logits, k): the k <= n_vocab likeliest, sorted, in the record's `top_x` and `top_ids`; equals by their ids.
    sum_exp(x, n, top) -> float, where no x is above `top`.
    """
    _define_sum_exp(module)
    _define_chunk(module)
    _define_count(module)
    _define_kth(module)
    _define_exp(module)
    _define_penalise(module)
    _define_greedy(module)
    _define_candidates(module)
    with module.function("top_k", {"s": PTR, "logits": PTR, "k": I64}, linkage="entry") as f:
        s, logits, k = f.args()
        _survey(f, s, logits)
        f.call(VOID, "candidates", s, logits, k)
    _define_choose(module)
    with module.function(
        "draw", {"s": PTR, "logits": PTR, "ids": PTR, "n_ids": I64, "u": F64}, returns=I64, linkage="entry"
    ) as f:
        _draw(f)


@contextmanager
def _chunks(f: Function, n: Value) -> Iterator[Value]:
    with f.range(0, (n + CHUNK - 1) // CHUNK) as i:
        yield i


def _not(f: Function, condition: Value) -> Value:
    return condition ^ f.const(I1, 1)


def _lanes(f: Function, condition: Value) -> Value:
    return f.bitcast(condition, I16)


def _define_sum_exp(module: Module) -> None:
    with module.function("sum_exp", {"x": PTR, "n": I64, "top": F32}, returns=F32, linkage="entry") as f:
        x, n, top = f.args()
        total, high = f.var(ROW, 0.0), f.splat(top, ROWS)
        whole = n - n % ROWS
        with f.range(0, whole, ROWS) as i:
            total.set(total.get() + exp_of_negative(f, f.load(ROW, x + i * 4, 4) - high))
        rest = f.var(F32, f.reduce(total.get(), "add"))
        with f.range(whole, n) as i:
            rest.set(rest.get() + exp_of_negative(f, f.load(F32, x + i * 4, 4) - top))
        f.ret(rest.get(), F32)


def _survey(f: Function, s: Value, logits: Value) -> None:
    """The largest of every chunk, into the record's `chunks`."""
    n_vocab, chunks = _get(f, s, "n_vocab"), _get(f, s, "chunks", PTR)
    with _chunks(f, n_vocab) as i:
        f.store(f.call(F32, "chunk", logits, n_vocab, i), chunks + i * 4, 4)


def _define_chunk(module: Module) -> None:
    """chunk(logits, n, i): the largest of the i-th chunk; infinite where one of them is NaN."""
    with module.function("chunk", {"logits": PTR, "n": I64, "i": I64}, returns=F32) as f:
        logits, n, i = f.args()
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
            with f.when(_not(f, x <= FLT_MAX)):
                numbers.set(0)
        f.ret(f.select(numbers.get().equals(-1), result.get(), math.inf), F32)


def _define_count(module: Module) -> None:
    """count(values, n, bound): how many of the values, filled up with -inf to whole vectors, are at least `bound` > -inf."""
    with module.function("count", {"values": PTR, "n": I64, "bound": F32}, returns=I64) as f:
        values, n, bound = f.args()
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
    with module.function("kth", {"values": PTR, "n": I64, "k": I64, "most": I64}, returns=F32) as f:
        values, n, k, most = f.args()
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


def _define_exp(module: Module) -> None:
    """exp64(x): e^x for x <= 0, within 1 ulp of float64; 1 for 0, 0 below EXP_MIN."""
    with module.function("exp64", {"x": F64}, returns=F64) as f:
        (x,) = f.args()
        with f.when(_not(f, x >= EXP_MIN)):
            f.ret(f.const(F64, 0.0), F64)
        n = f.intrinsic("rint", x * math.log2(math.e))
        r = f.fma(n, f.const(F64, -LN2_LOW), f.fma(n, f.const(F64, -LN2_HIGH), x))
        series = f.const(F64, 1 / math.factorial(TERMS))
        for term in range(TERMS - 1, 1, -1):
            series = f.fma(series, r, f.const(F64, 1 / math.factorial(term)))
        y = f.fma(series, r * r, r) + 1.0
        f.ret(y * f.bitcast((f.cast("fptosi", n, I64) + 1023) << 52, F64), F64)


def _define_penalise(module: Module) -> None:
    """penalise(s, logits, ids, n, chunks) -> 0, or UNKNOWN_ID: bias and penalties; what was there before is kept in `saved`.

    restore(s, logits, ids, n): the logits as they were.
    """
    arguments = {"s": PTR, "logits": PTR, "ids": PTR, "n": I64}
    with module.function("penalise", arguments, returns=I64) as f:
        s, logits, ids, n = f.args()
        n_vocab = _get(f, s, "n_vocab")
        saved = f.var(PTR, _get(f, s, "saved", PTR))

        def keep(x: Value, saved: Var = saved) -> None:
            f.store(x, saved.get(), 4)
            saved.set(saved.get() + 4)

        with f.range(0, n) as i:
            id = f.cast("zext", f.load(I32, ids + i * 4, 4), I64)
            with f.when(id >= n_vocab):
                f.ret(UNKNOWN_ID)
        bias_ids, biases = _get(f, s, "bias_ids", PTR), _get(f, s, "biases", PTR)
        with f.range(0, _get(f, s, "n_bias")) as i:
            at = logits + f.load(I64, bias_ids + i * 8, 8) * 4
            keep(f.load(F32, at, 4))
            f.store(f.load(F32, at, 4) + f.load(F32, biases + i * 4, 4), at, 4)
        # an id that is there twice is kept twice before it is changed, and gets the same twice
        unpenalised = saved.get()
        with f.range(0, n) as i:
            keep(f.load(F32, logits + f.cast("zext", f.load(I32, ids + i * 4, 4), I64) * 4, 4))
        repeat, presence, frequency = (_get(f, s, name, F32) for name in ("repeat", "presence", "frequency"))
        with _penalised(f, s, ids, n) as (i, id):
            x = f.load(F32, unpenalised + i * 4, 4)
            f.store(f.select(x > 0.0, x / repeat, x * repeat) - presence, logits + id * 4, 4)
        with f.when(_not(f, frequency.equals(0.0))), _penalised(f, s, ids, n) as (i, id):
            f.store(f.load(F32, logits + id * 4, 4) - frequency, logits + id * 4, 4)
        f.ret(0)
    with module.function("restore", arguments) as f:
        s, logits, ids, n = f.args()
        n_bias, saved = _get(f, s, "n_bias"), _get(f, s, "saved", PTR)
        with f.range(0, n) as i:
            id = f.cast("zext", f.load(I32, ids + i * 4, 4), I64)
            f.store(f.load(F32, saved + (n_bias + i) * 4, 4), logits + id * 4, 4)
        with f.range(0, n_bias) as i:
            id = f.load(I64, _get(f, s, "bias_ids", PTR) + i * 8, 8)
            f.store(f.load(F32, saved + i * 4, 4), logits + id * 4, 4)
    with module.function("recount", arguments) as f:  # the chunks' largest, of those that penalise or restore has changed
        s, logits, ids, n = f.args()
        n_vocab, chunks = _get(f, s, "n_vocab"), _get(f, s, "chunks", PTR)

        def again(id: Value) -> None:
            f.store(f.call(F32, "chunk", logits, n_vocab, id // CHUNK), chunks + id // CHUNK * 4, 4)

        with f.range(0, n) as i:
            again(f.cast("zext", f.load(I32, ids + i * 4, 4), I64))
        with f.range(0, _get(f, s, "n_bias")) as i:
            again(f.load(I64, _get(f, s, "bias_ids", PTR) + i * 8, 8))


@contextmanager
def _penalised(f: Function, s: Value, ids: Value, n: Value) -> Iterator[tuple[Value, Value]]:
    """(i, id) of those that are not exempt."""
    exempt, n_exempt = _get(f, s, "exempt", PTR), _get(f, s, "n_exempt")
    with f.range(0, n) as i:
        id, free = f.cast("zext", f.load(I32, ids + i * 4, 4), I64), f.var(I1, 0)
        with f.range(0, n_exempt) as j:
            free.set(free.get() | f.load(I64, exempt + j * 8, 8).equals(id))
        with f.when(_not(f, free.get())):
            yield i, id


def _define_greedy(module: Module) -> None:
    """greedy(logits, chunks, best): the first of the largest."""
    with module.function("greedy", {"logits": PTR, "chunks": PTR, "best": F32}, returns=I64) as f:
        logits, chunks, best = f.args()
        at = f.var(I64, 0)
        with f.loop_while(lambda: f.load(F32, chunks + at.get() * 4, 4) < best):
            at.set(at.get() + 1)
        at.set(at.get() * CHUNK)
        with f.loop_while(lambda: f.load(F32, logits + at.get() * 4, 4) < best):
            at.set(at.get() + 1)
        f.ret(at.get())


def _define_candidates(module: Module) -> None:
    """candidates(s, logits, k): what `top_k` says, of logits that are surveyed."""
    with module.function("candidates", {"s": PTR, "logits": PTR, "k": I64}) as f:
        s, logits, k = f.args()
        n_vocab, chunks = _get(f, s, "n_vocab"), _get(f, s, "chunks", PTR)
        values, ids, count = _get(f, s, "values", PTR), _get(f, s, "ids", PTR), f.var(I64, 0)
        n_chunks = (n_vocab + CHUNK - 1) // CHUNK
        bound = f.var(F32, -math.inf)
        with f.when(n_chunks >= k):
            bound.set(f.call(F32, "kth", chunks, n_chunks, k, k + k))

        def take(j: Value, x: Value) -> None:
            at = count.get()
            f.store(x, values + at * 4, 4)
            f.store(f.cast("trunc", j, I32), ids + at * 4, 4)
            count.set(at + f.cast("zext", x >= bound.get(), I64))

        with _chunks(f, n_vocab) as i, f.when(f.load(F32, chunks + i * 4, 4) >= bound.get()):
            start = i * CHUNK
            stop = f.minimum(start + CHUNK, n_vocab)
            whole = stop - (stop - start) % ROWS
            high = f.splat(bound.get(), ROWS)
            with f.range(start, whole, ROWS) as j:
                some = _lanes(f, f.load(ROW, logits + j * 4, 4) >= high)
                with f.when(_not(f, some.equals(0))), f.range(j, j + ROWS) as lane:
                    take(lane, f.load(F32, logits + lane * 4, 4))
            with f.range(whole, stop) as j:
                take(j, f.load(F32, logits + j * 4, 4))
        n = count.get()
        f.store(f.splat(f.const(F32, -math.inf), ROWS), values + n * 4, 4)
        least = f.call(F32, "kth", values, n, k, k)
        above = f.var(I64, 0)
        with f.range(0, n) as i:
            above.set(above.get() + f.cast("zext", f.load(F32, values + i * 4, 4) > least, I64))
        equals, kept = f.var(I64, k - above.get()), f.var(I64, 0)  # of those with the least value, the first stay
        top_x, top_ids = _get(f, s, "top_x", PTR), _get(f, s, "top_ids", PTR)
        with f.range(0, n) as i:
            x = f.load(F32, values + i * 4, 4)
            last = x.equals(least) & (equals.get() > 0)
            with f.when(last | (x > least)):
                equals.set(equals.get() - f.cast("zext", last, I64))
                _insert(f, top_x, top_ids, kept.get(), x, f.load(I32, ids + i * 4, 4))
                kept.set(kept.get() + 1)


def _insert(f: Function, top_x: Value, top_ids: Value, n: Value, x: Value, id: Value) -> None:
    """Put x behind the n values that are there and as large, the others move up."""
    at = f.var(I64, n)
    before = f.var(F32)

    def smaller() -> Value:
        before.set(f.load(F32, top_x + f.maximum(at.get() - 1, 0) * 4, 4))
        return (at.get() > 0) & (before.get() < x)

    with f.loop_while(smaller):
        f.store(before.get(), top_x + at.get() * 4, 4)
        f.store(f.load(I32, top_ids + (at.get() - 1) * 4, 4), top_ids + at.get() * 4, 4)
        at.set(at.get() - 1)
    f.store(x, top_x + at.get() * 4, 4)
    f.store(id, top_ids + at.get() * 4, 4)


def _define_choose(module: Module) -> None:
    """choose(s, k, u) -> id: top-p, min-p, temperature and the draw among the k sorted candidates."""
    with module.function("choose", {"s": PTR, "k": I64, "u": F64}, returns=I64) as f:
        s, k, u = f.args()
        top_x, weights = _get(f, s, "top_x", PTR), _get(f, s, "weights", PTR)
        best, kept = f.cast("fpext", f.load(F32, top_x, 4), F64), f.var(I64, k)

        def below(i: Value) -> Value:
            return f.cast("fpext", f.load(F32, top_x + i * 4, 4), F64) - best

        def cumulate(scale: Value) -> Value:
            total = f.var(F64, 0.0)
            with f.range(0, kept.get()) as i:
                total.set(total.get() + f.call(F64, "exp64", below(i) / scale))
                f.store(total.get(), weights + i * 8, 8)
            return total.get()

        def first(reached) -> Var:
            """The first whose cumulative weight is `reached`, or how many there are."""
            at = f.var(I64, 0)
            with f.loop_while(lambda: (at.get() < kept.get()) & _not(f, reached(f.load(F64, weights + at.get() * 8, 8)))):
                at.set(at.get() + 1)
            return at

        top_p, limit = _get(f, s, "top_p", F64), _get(f, s, "min_p", F64)
        with f.when(top_p < 1.0):
            enough = cumulate(f.const(F64, 1.0)) * top_p
            kept.set(f.minimum(first(lambda sum: sum >= enough).get() + 1, kept.get()))
        with f.loop_while(lambda: (kept.get() > 1) & (below(kept.get() - 1) < 0.0 - limit)):
            kept.set(kept.get() - 1)
        aim = cumulate(_get(f, s, "temperature", F64)) * u
        at = first(lambda sum: sum > aim)
        with f.when(at.get().equals(kept.get())):  # u * sum may round up to the sum
            at.set(0)
        f.ret(f.cast("zext", f.load(I32, _get(f, s, "top_ids", PTR) + at.get() * 4, 4), I64))


def _draw(f: Function) -> None:
    s, logits, ids, n_ids, u = f.args()
    n_vocab, chunks = _get(f, s, "n_vocab"), _get(f, s, "chunks", PTR)

    def largest() -> Value:
        value = f.var(F32, -math.inf)
        with _chunks(f, n_vocab) as i:
            x = f.load(F32, chunks + i * 4, 4)
            value.set(f.select(value.get() >= x, value.get(), x))
        return value.get()

    _survey(f, s, logits)
    plain = largest()
    with f.when(plain.equals(math.inf)):
        f.ret(BROKEN)
    # bias and penalties, where there are any
    edits = _get(f, s, "edits").equals(1)
    n = f.minimum(n_ids, _get(f, s, "last_n"))
    recent = ids + (n_ids - n) * 4
    best = f.var(F32, plain)
    with f.when(edits):
        with f.when(f.call(I64, "penalise", s, logits, recent, n).equals(UNKNOWN_ID)):
            f.ret(UNKNOWN_ID)
        f.call(VOID, "recount", s, logits, recent, n)
        best.set(largest())
    result = f.var(I64, NO_CHOICE)
    with f.when(best.get().equals(math.inf)):
        result.set(BROKEN)
    with f.when((best.get() > -math.inf) & (best.get() < math.inf)):
        k = f.minimum(_get(f, s, "k"), n_vocab)
        with f.when(k.equals(1)):
            result.set(f.call(I64, "greedy", logits, chunks, best.get()))
        with f.when(k > 1):
            f.call(VOID, "candidates", s, logits, k)
            result.set(f.call(I64, "choose", s, k, u))
    with f.when(edits):
        f.call(VOID, "restore", s, logits, recent, n)
    with f.when((result.get() >= 0) & _get(f, s, "logprobs").equals(1)):
        logit = f.load(F32, logits + result.get() * 4, 4) - plain
        f.store(f.cast("fpext", logit, F64), s + offset(SAMPLER, "logit"), 8)
        f.store(f.cast("fpext", f.call(F32, "sum_exp", logits, n_vocab, plain), F64), s + offset(SAMPLER, "sum"), 8)
    f.ret(result.get())
