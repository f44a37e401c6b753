"""e^x of logits, sums of it, and the draw by its shares, as IR.

In: a module. Out: the functions `sum_exp`, `weigh` and `pick` in it. Knows logits and a random number; no filter, no record.

Weights are float64, and sums are in an order that NumPy can keep (`sampling.py`): the numbers are seen as N_ROWS rows,
so that sums of columns are vectors' and go through memory from its beginning to its end, and no sum runs across lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pocketlm.runtime.native.ir import F32, F64, I64, PTR, Function, Module, Value
from pocketlm.runtime.native.matrix import ROW
from pocketlm.runtime.native.tiling import ROWS
from pocketlm.runtime.native.vector_math import exp_of_negative
from pocketlm.runtime.sampling import N_ROWS

LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # of float64: the high part has trailing zeros
EXP_MIN = -708.0  # below, e^x is no normal float64: 0
TERMS = 13  # of e^x's series, for |x| up to ln(2) / 2: the next is 4e-18
TO_INTEGER = 1.5 * 2.0**52  # a number to which this is added has its nearest integer in the lowest bits
LANES = 8


def define(module: Module) -> None:
    """sum_exp(x, n, top) -> float32, the sum of exp(x - top), where no x is above `top`.

    weigh(x, n, best, scale, columns) -> float64, the sum of exp((x - best) * scale), where no x is above `best`; `columns`,
    float64 [n / N_ROWS, rounded up], gets the sums of columns.
    pick(x, n, best, scale, columns, u) -> the index that `u` in [0, 1) falls on, where each has the share of its weight.
    """
    with module.function("sum_exp", {"x": PTR, "n": I64, "top": F32}, returns=F32, linkage="entry") as (f, x, n, top):
        total, high = f.var(ROW, 0.0), f.splat(top, ROWS)
        whole = n - n % ROWS
        with f.range(0, whole, ROWS) as i:
            total.set(total.get() + exp_of_negative(f, f.load(ROW, x + i * 4, 4) - high))
        rest = f.var(F32, f.reduce(total.get(), "add"))
        with f.range(whole, n) as i:
            rest.set(rest.get() + exp_of_negative(f, f.load(F32, x + i * 4, 4) - top))
        f.ret(rest.get(), F32)
    numbers = {"x": PTR, "n": I64, "best": F64, "scale": F64, "columns": PTR}
    with module.function("weigh", numbers, returns=F64) as f:
        _weigh(f)
    with module.function("pick", {**numbers, "u": F64}, returns=I64) as f:
        _pick(f)


def exp64(f: Function, x: Value) -> Value:
    """e^x of float64, one or a vector, for x <= 0: within 1 ulp; 1 for 0, 0 below EXP_MIN."""
    k = x * math.log2(math.e) + TO_INTEGER
    n = k - TO_INTEGER
    r = f.fma(n, f.const(x.type, -LN2_LOW), f.fma(n, f.const(x.type, -LN2_HIGH), x))
    series = f.const(x.type, 1 / math.factorial(TERMS))
    for term in range(TERMS - 1, 1, -1):
        series = f.fma(series, r, f.const(x.type, 1 / math.factorial(term)))
    y = f.fma(series, r * r, r) + 1.0
    integers = I64.vec(x.type.lanes)
    return f.select(x >= EXP_MIN, f.bitcast(f.bitcast(y, integers) + (f.bitcast(k, integers) << 52), x.type), 0.0)


def below(f: Function, x: Value, best: Value) -> Value:
    """What is at an address, minus the largest: float64."""
    return f.cast("fpext", f.load(F32, x, 4), F64) - best


def _falls_on(f: Function, n: Value, weight: Callable[[Value], Value], aim: Value) -> tuple[Value, Value]:
    """The first of n whose cumulative weight is above `aim`, or the last that has any; and the weight before it."""
    i, at = f.var(I64, 0), f.var(I64, 0)
    total, before = f.var(F64, 0.0), f.var(F64, 0.0)
    with f.loop_while(lambda: (i.get() < n) & (total.get() <= aim)):
        more = total.get() + weight(i.get())
        with f.when(more > total.get()):
            at.set(i.get())
            before.set(total.get())
        total.set(more)
        i.set(i.get() + 1)
    return at.get(), before.get()


def _n_columns(n: Value) -> Value:
    return (n + (N_ROWS - 1)) // N_ROWS


def _weigh(f: Function) -> None:
    x, n, best, scale, columns = f.args()
    n_columns, highest, scales = _n_columns(n), f.splat(best, LANES), f.splat(scale, LANES)
    with f.range(0, n_columns) as i:
        f.store(f.const(F64, 0.0), columns + i * 8, 8)
    with f.range(0, n, n_columns) as start:
        row, width = x + start * 4, f.minimum(n_columns, n - start)
        whole = width - width % LANES
        with f.range(0, whole, LANES) as i:
            at = columns + i * 8
            y = f.cast("fpext", f.load(F32.vec(LANES), row + i * 4, 4), F64) - highest
            f.store(f.load(F64.vec(LANES), at, 8) + exp64(f, y * scales), at, 8)
        with f.range(whole, width) as i:
            at = columns + i * 8
            f.store(f.load(F64, at, 8) + exp64(f, below(f, row + i * 4, best) * scale), at, 8)
    total = f.var(F64, 0.0)
    with f.range(0, n_columns) as i:
        total.set(total.get() + f.load(F64, columns + i * 8, 8))
    f.ret(total.get(), F64)


def _pick(f: Function) -> None:
    x, n, best, scale, columns, u = f.args()
    aim, n_columns = f.call(F64, "weigh", x, n, best, scale, columns) * u, _n_columns(n)
    column, before = _falls_on(f, n_columns, lambda i: f.load(F64, columns + i * 8, 8), aim)
    n_rows = (n - column + n_columns - 1) // n_columns
    first = x + column * 4
    row, _ = _falls_on(f, n_rows, lambda i: exp64(f, below(f, first + i * n_columns * 4, best) * scale), aim - before)
    f.ret(row * n_columns + column)
