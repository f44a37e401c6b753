"""The largest of a vocabulary's logits, and the sum of all exp, as IR: what selection.py calls.

In: a module. Out: three functions in it. Knows logits, not ids.
"""

from __future__ import annotations

import math

from pocketlm.runtime.native.ir import F32, I1, I16, I64, PTR, Function, Module, Value
from pocketlm.runtime.native.matrix import ROW
from pocketlm.runtime.native.sizes import CHUNK
from pocketlm.runtime.native.tiling import ROWS
from pocketlm.runtime.native.vector_math import exp_of_negative


def define(module: Module) -> None:
    """largest_of(x, n, out), at_least(x, n, bound, ids) -> count over whole vectors of x; sum_exp(x, n, top) -> float,
    where no x is above `top`.
    """
    with module.function("largest_of", {"x": PTR, "n": I64, "out": PTR}, linkage="entry") as f:
        x, n, out = f.args()
        with f.range(0, n, CHUNK) as i:
            largest = f.var(ROW, -math.inf)
            with f.range(i, f.minimum(i + CHUNK, n), ROWS) as j:
                v = f.load(ROW, x + j * 4, 4)
                # a NaN must win, so that whoever looks at the result sees it
                largest.set(f.select(largest.get() >= v, largest.get(), v))
            f.store(f.reduce(largest.get(), "max"), out + (i // CHUNK) * 4, 4)
    with module.function("at_least", {"x": PTR, "n": I64, "bound": F32, "ids": PTR}, returns=I64, linkage="entry") as f:
        x, n, bound, ids = f.args()
        count = f.var(I64, 0)
        with f.range(0, n, ROWS) as i:
            some = _any(f, f.load(ROW, x + i * 4, 4) >= f.splat(bound, ROWS))
            with f.when(some), f.range(i, i + ROWS) as j:
                f.store(j, ids + count.get() * 8, 8)
                count.set(count.get() + f.cast("zext", f.load(F32, x + j * 4, 4) >= bound, I64))
        f.ret(count.get())
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


def _any(f: Function, lanes: Value) -> Value:
    return f.bitcast(lanes, I16).equals(0) ^ f.const(I1, 1)
