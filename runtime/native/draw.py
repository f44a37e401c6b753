"""Drawing a token in compiled code, as IR: what sampling.py says with NumPy, for every chain but for a caller's own step.

In: a module. Out: the function `draw` in it, and those of likeliest.py and softmax.py that it calls. Knows logits and the
SAMPLER record, not where random numbers come from.

The vocabulary is never sorted: filters keep the likeliest, and those alone are looked for. Weights and sums are float64 in the
same order as NumPy's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from pocketlm.runtime.native import likeliest, softmax
from pocketlm.runtime.native.ir import F32, F64, I1, I8, I32, I64, PTR, VOID, Function, Module, Value, Var
from pocketlm.runtime.native.likeliest import FLT_MAX
from pocketlm.runtime.native.matrix import ROW
from pocketlm.runtime.native.record_reader import fill
from pocketlm.runtime.native.record_reader import of_sampler as _get
from pocketlm.runtime.native.records import SAMPLER
from pocketlm.runtime.native.sizes import ALL, BROKEN, CHUNK, FORBIDDEN, NO_CHOICE, UNKNOWN_ID
from pocketlm.runtime.native.softmax import below, exp64
from pocketlm.runtime.native.tiling import ROWS

FIRST_DEPTH, STEP = 4.0, 2.0  # top-p without top-k looks so far below the largest logit first, then so much further


def define(module: Module) -> None:
    """draw(sampler, logits, ids, n_ids, u) -> id, or one of sizes' reasons why there is none.

    `ids`: int32, the text so far; `u`: uniform in [0, 1). The logits are edited for the while of the call. With the record's
    `logprobs`, its `logit` is the drawn token's minus the largest, `sum` is that of all exp(logit - largest).
    """
    softmax.define(module)
    likeliest.define(module)
    _define_penalise(module)
    _define_restrict(module)
    _define_nucleus(module)
    _define_choose(module)
    _define_among(module)
    with module.function(
        "draw", {"s": PTR, "logits": PTR, "ids": PTR, "n_ids": I64, "u": F64}, returns=I64, linkage="entry"
    ) as f:
        _draw(f)


def _define_penalise(module: Module) -> None:
    """penalise(s, logits, ids, n, chunks) -> 0, or UNKNOWN_ID: bias and penalties; what was there before is kept in `saved`.

    restore(s, logits, ids, n): the logits as they were.
    """
    arguments = {"s": PTR, "logits": PTR, "ids": PTR, "n": I64}
    with module.function("penalise", arguments, returns=I64) as (f, s, logits, ids, n):
        n_vocab = _get(f, s, "n_vocab")
        saved = f.var(PTR, _get(f, s, "saved", PTR))

        def keep(x: Value) -> None:
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
        with f.when(frequency.differs(0.0)), _penalised(f, s, ids, n) as (i, id):
            f.store(f.load(F32, logits + id * 4, 4) - frequency, logits + id * 4, 4)
        f.ret(0)
    with module.function("restore", arguments) as (f, s, logits, ids, n):
        n_bias, kept = _get(f, s, "n_bias"), _get(f, s, "saved", PTR)
        with f.range(0, n) as i:
            id = f.cast("zext", f.load(I32, ids + i * 4, 4), I64)
            f.store(f.load(F32, kept + (n_bias + i) * 4, 4), logits + id * 4, 4)
        with f.range(0, n_bias) as i:
            id = f.load(I64, _get(f, s, "bias_ids", PTR) + i * 8, 8)
            f.store(f.load(F32, kept + i * 4, 4), logits + id * 4, 4)
    with module.function("recount", arguments) as f:  # the chunks' largest, of those that penalise or restore has changed
        s, logits, ids, n = f.args()
        n_vocab, chunks = _get(f, s, "n_vocab"), _get(f, s, "chunks", PTR)

        def again(id: Value) -> None:
            f.store(f.call(F32, "chunk", logits, n_vocab, id // CHUNK), chunks + id // CHUNK * 4, 4)

        with f.range(0, n) as i:
            again(f.cast("zext", f.load(I32, ids + i * 4, 4), I64))
        with f.range(0, _get(f, s, "n_bias")) as i:
            again(f.load(I64, _get(f, s, "bias_ids", PTR) + i * 8, 8))


def _define_restrict(module: Module) -> None:
    """restrict(s, logits) -> a copy of them with -inf for every token that may not be drawn."""
    with module.function("restrict", {"s": PTR, "logits": PTR}, returns=PTR) as (f, s, logits):
        n_vocab, allowed, n_allowed = _get(f, s, "n_vocab"), _get(f, s, "allowed", PTR), _get(f, s, "n_allowed")
        to, whole = _get(f, s, "masked", PTR), n_vocab & -ROWS
        nothing = f.const(ROW, -math.inf)
        with f.when(n_allowed.equals(FORBIDDEN)):
            with f.range(0, whole, ROWS) as i:
                is_left = f.load(I8.vec(ROWS), allowed + i, 1).equals(0)
                f.store(f.select(is_left, f.load(ROW, logits + i * 4, 4), nothing), to + i * 4, 4)
            with f.range(whole, n_vocab) as i:
                x = f.select(f.load(I8, allowed + i, 1).equals(0), f.load(F32, logits + i * 4, 4), -math.inf)
                f.store(x, to + i * 4, 4)
        with f.when(n_allowed >= 0):
            with f.range(0, n_vocab, ROWS) as i:
                f.store(nothing, to + i * 4, 4)
            with f.range(0, n_allowed) as i:
                at = f.load(I64, allowed + i * 8, 8) * 4
                f.store(f.load(F32, logits + at, 4), to + at, 4)
        f.ret(to, PTR)


@contextmanager
def _penalised(f: Function, s: Value, ids: Value, n: Value) -> Iterator[tuple[Value, Value]]:
    """(i, id) of those that are not exempt."""
    exempt, n_exempt = _get(f, s, "exempt", PTR), _get(f, s, "n_exempt")
    with f.range(0, n) as i:
        id, free = f.cast("zext", f.load(I32, ids + i * 4, 4), I64), f.var(I1, 0)
        with f.range(0, n_exempt) as j:
            free.set(free.get() | f.load(I64, exempt + j * 8, 8).equals(id))
        with f.when(~free.get()):
            yield i, id


def _define_nucleus(module: Module) -> None:
    """nucleus(s, logits, best, total) -> how many candidates there are, sorted: all that top-p and min-p keep are among them,
    where the weights of all tokens have the sum `total` (0: top-p is off).

    Further and further below the best, until those found have what top-p wants; `reach` is where nothing is kept any more.
    """
    with module.function("nucleus", {"s": PTR, "logits": PTR, "best": F64, "total": F64}, returns=I64) as f:
        s, logits, best, total = f.args()
        values, columns, reach = _get(f, s, "values", PTR), _get(f, s, "columns", PTR), _get(f, s, "reach", F64)
        enough = total * _get(f, s, "top_p", F64) * (1 + 1e-9)  # sums in another order may differ in their last bits
        depth, n, more = f.var(F64, f.select(total > 0.0, f.minimum(reach, FIRST_DEPTH), reach)), f.var(I64), f.var(I1, 1)
        with f.loop_while(more.get):
            n.set(f.call(I64, "candidates", s, logits, f.cast("fptrunc", best - depth.get(), F32)))
            more.set(depth.get() < reach)
            with f.when(more.get()):
                found = f.call(F64, "weigh", values, n.get(), best, f.const(F64, 1.0), columns)
                more.set(found < enough)
                depth.set(f.minimum(depth.get() + STEP, reach))
        f.call(VOID, "sort", s, n.get())
        f.ret(n.get())


def _define_choose(module: Module) -> None:
    """choose(s, n, total, u) -> id: top-p, min-p, temperature and the draw among the n sorted candidates. `total`: the sum of
    weights that top-p is a share of; 0 for the sum of the candidates' own.
    """
    with module.function("choose", {"s": PTR, "n": I64, "total": F64, "u": F64}, returns=I64) as (f, s, n, total, u):
        x, columns = _get(f, s, "values", PTR), _get(f, s, "columns", PTR)
        best, kept = f.cast("fpext", f.load(F32, x, 4), F64), f.var(I64, n)
        top_p, limit = _get(f, s, "top_p", F64), _get(f, s, "min_p", F64)
        with f.when(top_p < 1.0):
            all_weights, sum, at = f.var(F64, total), f.var(F64, 0.0), f.var(I64, 0)

            def add(to: Var, i: Value) -> None:
                to.set(to.get() + exp64(f, below(f, x + i * 4, best)))

            with f.when(total.equals(0.0)), f.range(0, n) as i:
                add(all_weights, i)
            enough = all_weights.get() * top_p
            with f.loop_while(lambda: (at.get() < n) & (sum.get() < enough)):
                add(sum, at.get())
                at.set(at.get() + 1)
            kept.set(at.get())
        with f.loop_while(lambda: (kept.get() > 1) & (below(f, x + (kept.get() - 1) * 4, best) < 0.0 - limit)):
            kept.set(kept.get() - 1)
        i = f.call(I64, "pick", x, kept.get(), best, _get(f, s, "scale", F64), columns, u)
        f.ret(f.cast("zext", f.load(I32, _get(f, s, "ids", PTR) + i * 4, 4), I64))


def _define_among(module: Module) -> None:
    """draw_among(s, logits, largest, u) -> id: the chain behind the penalties. Where it takes the sum of all weights, that is
    the record's `sum`.
    """
    with module.function("draw_among", {"s": PTR, "logits": PTR, "largest": F32, "u": F64}, returns=I64) as f:
        s, logits, largest, u = f.args()
        n_vocab, columns = _get(f, s, "n_vocab"), _get(f, s, "columns", PTR)
        k, best = f.minimum(_get(f, s, "k"), n_vocab), f.cast("fpext", largest, F64)
        with f.when(k.equals(1)):
            f.ret(f.call(I64, "greedy", logits, _get(f, s, "chunks", PTR), largest))
        with f.when(k > 1):
            n = f.call(I64, "first", s, logits, k, f.const(F32, -FLT_MAX))  # a token of -inf is no candidate
            f.ret(f.call(I64, "choose", s, n, f.const(F64, 0.0), u))
        with f.when(_get(f, s, "reach", F64).equals(math.inf)):
            f.ret(f.call(I64, "pick", logits, n_vocab, best, _get(f, s, "scale", F64), columns, u))
        total = f.var(F64, 0.0)
        with f.when(_get(f, s, "top_p", F64) < 1.0):
            total.set(f.call(F64, "weigh", logits, n_vocab, best, f.const(F64, 1.0), columns))
            fill(f, SAMPLER, s, sum=total.get())
        n = f.call(I64, "nucleus", s, logits, best, total.get())
        f.ret(f.call(I64, "choose", s, n, total.get(), u))


def _draw(f: Function) -> None:
    s, logits, ids, n_ids, u = f.args()
    plain = f.call(F32, "survey", s, logits)
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
        best.set(f.call(F32, "largest", s))
    used, is_restricted = f.var(PTR, logits), _get(f, s, "n_allowed").differs(ALL)
    with f.when(is_restricted):
        used.set(f.call(PTR, "restrict", s, logits))
        best.set(f.call(F32, "survey", s, used.get()))
    result = f.var(I64, NO_CHOICE)
    with f.when(best.get().equals(math.inf)):
        result.set(BROKEN)
    fill(f, SAMPLER, s, sum=f.const(F64, 0.0))
    with f.when((best.get() > -math.inf) & (best.get() < math.inf)):
        result.set(f.call(I64, "draw_among", s, used.get(), best.get(), u))
    with f.when(edits):
        f.call(VOID, "restore", s, logits, recent, n)
    with f.when((result.get() >= 0) & _get(f, s, "logprobs").equals(1)):
        logit = f.load(F32, logits + result.get() * 4, 4) - plain
        fill(f, SAMPLER, s, logit=f.cast("fpext", logit, F64))
        with f.when(edits | is_restricted | _get(f, s, "sum", F64).equals(0.0)):
            sum = f.call(F32, "sum_exp", logits, _get(f, s, "n_vocab"), plain)
            fill(f, SAMPLER, s, sum=f.cast("fpext", sum, F64))
    f.ret(result.get())
