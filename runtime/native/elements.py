"""Stages of operations that no product takes along: norms from buffer to buffer, and functions of single numbers.

In: the run's and an operation's record (records.py), a task number. Out: IR functions. Knows no formats and no cache.
"""

from __future__ import annotations

from collections.abc import Callable

from pocketlm.runtime.native import sizes
from pocketlm.runtime.native.ir import F32, I64, PTR, Function, Module, Type, Value
from pocketlm.runtime.native.matrix import ROW
from pocketlm.runtime.native.record_reader import Records, each_number
from pocketlm.runtime.native.sizes import LANES, LAYER_NORM
from pocketlm.runtime.native.vector_math import ACTIVATIONS, clamped_beside, exp, tanh


def define(module: Module) -> None:
    """Define `activate(kind, x)`, `beside(kind, up)` and `softcap(x, cap)`, on 16 numbers."""
    with module.function("activate", {"kind": I64, "x": ROW}, returns=ROW) as (f, kind, x):
        for number, name in enumerate(sizes.ACTIVATIONS, 1):
            with f.when(kind.equals(number)):
                f.ret(ACTIVATIONS[name](f, x), ROW)
        f.ret(x, ROW)
    with module.function("beside", {"kind": I64, "up": ROW}, returns=ROW) as (f, kind, up):
        with f.when(kind.equals(1 + sizes.ACTIVATIONS.index("swiglu_clamped"))):
            f.ret(clamped_beside(f, up), ROW)
        f.ret(up, ROW)
    with module.function("softcap", {"x": ROW, "cap": F32}, returns=ROW) as (f, x, cap):
        f.ret(tanh(f, x / f.splat(cap, LANES)) * f.splat(cap, LANES), ROW)


def norm(f: Function, level: str, r: Records, own: Value, task: Value, n: Value) -> None:
    """The vectors of a row, from x to out, or added to it."""
    x, to = (r.op(name, PTR) + task * r.op(f"{name}_stride") for name in ("x", "out"))
    width, step = r.op("n"), r.op("weight_stride")
    with f.range(0, r.op("n_groups")) as i:
        weight, bias = (r.op(name, PTR) + i * step for name in ("weight", "bias"))
        at = i * width * 4
        normalise(f, r, x + at, to + at, weight, bias, width, r.op("add").equals(1))


def normalise(
    f: Function, r: Records, x: Value, to: Value, weight: Value, bias: Value | None, width: Value, add: Value | None = None
) -> None:
    """`width` numbers at x, which may be followed by others: (x - mean) / sqrt(mean square + epsilon) · weight + bias."""
    n, mean = f.cast("sitofp", width, F32), f.var(F32, 0.0)

    def at(address: Value, type: Type, i: Value) -> Value:
        return f.load(type, address + i * 4, 4)

    def total(add: Callable[[Value, Value], Value]) -> Value:
        """All numbers folded by `add(sum so far, number)`."""
        sums = {type: f.var(type, 0.0) for type in (ROW, F32)}
        each_number(f, 0, width, lambda type, i: sums[type].set(add(sums[type].get(), at(x, type, i))))
        return f.reduce(sums[ROW].get(), "add") + sums[F32].get()

    def add_square(sum: Value, v: Value) -> Value:
        distance = v - f.splat(mean.get(), v.type.lanes)
        return f.fma(distance, distance, sum)

    with f.when(r.op("source").equals(LAYER_NORM)):
        mean.set(total(lambda sum, v: sum + v) / n)
    scale = 1.0 / f.intrinsic("sqrt", total(add_square) / n + r.op("epsilon", F32))

    def write(type: Type, i: Value) -> None:
        v = (at(x, type, i) - f.splat(mean.get(), type.lanes)) * f.splat(scale, type.lanes)
        v = v * at(weight, type, i) if bias is None else f.fma(v, at(weight, type, i), at(bias, type, i))
        if add is not None:
            v = v + f.select(add, at(to, type, i), 0.0)
        f.store(v, to + i * 4, 4)

    each_number(f, 0, width, write)


def gate(f: Function, level: str, r: Records, own: Value, task: Value, n: Value) -> None:
    """The groups of a row: out + factor · sigmoid(weight · x) · y. All gates are made first: x may be out."""
    x, y, to = (r.op(name, PTR) + task * r.op(f"{name}_stride") for name in ("x", "y", "out"))
    width, stride = r.op("n"), r.op("weight_stride")
    with f.range(0, r.op("n_groups")) as i:
        weight, total = r.op("weight", PTR) + i * stride, f.var(F32, 0.0)
        with f.range(0, stride, 4) as at:
            total.set(f.fma(f.load(F32, weight + at), f.load(F32, x + at), total.get()))
        power = f.extract(exp(f, f.splat(0.0 - total.get(), LANES)), 0)
        f.store(r.op("factor", F32) / (power + 1.0), own + i * 4)
    with f.range(0, r.op("n_groups")) as i:
        share, start = f.load(F32, own + i * 4), i * width

        def write(type: Type, k: Value) -> None:
            at = (start + k) * 4
            f.store(f.fma(f.load(type, y + at, 4), f.splat(share, type.lanes), f.load(type, to + at, 4)), to + at, 4)

        each_number(f, 0, width, write)


def each(f: Function, level: str, r: Records, own: Value, task: Value, n: Value) -> None:
    """COLUMNS numbers of a row: scaled, added, capped or activated (and gated)."""
    width, how = r.op("n"), r.op("source")
    pieces = (width + (sizes.COLUMNS - 1)) // sizes.COLUMNS
    row, start = task // pieces, (task % pieces) * sizes.COLUMNS
    x, out = (r.op(name, PTR) + row * r.op(f"{name}_stride") + start * 4 for name in ("x", "out"))
    count, factor = f.minimum(width - start, sizes.COLUMNS), r.op("factor", F32)
    lanes = f.stack(F32, LANES)

    def value(at: Value, load) -> Value:
        v, result = load(x + at), f.var(ROW, 0.0)
        with f.when(how.equals(sizes.SCALE)):
            result.set(v * f.splat(factor, LANES))
        with f.when(how.equals(sizes.ADD)):
            result.set(v * f.splat(factor, LANES) + load(out + at))
        with f.when(how.equals(sizes.SOFTCAP)):
            result.set(f.call(ROW, "softcap", v, factor))
        with f.when(how.equals(sizes.ACTIVATE)):
            result.set(f.call(ROW, "activate", r.op("activation"), v))
            with f.when(r.op("add").equals(1)):  # gated: the other half of the row
                result.set(result.get() * f.call(ROW, "beside", r.op("activation"), load(x + (at + width * 4))))
        return result.get()

    whole = count & -LANES
    with f.range(0, whole, LANES) as i:
        f.store(value(i * 4, lambda at: f.load(ROW, at, 4)), out + i * 4, 4)
    with f.when(whole < count):  # the numbers behind may be another's

        def some(at: Value) -> Value:
            with f.range(0, count - whole) as i:
                f.store(f.load(F32, at + i * 4), lanes + i * 4)
            return f.load(ROW, lanes, 64)

        f.store(f.const(ROW, 0.0), lanes, 64)
        f.store(value(whole * 4, some), lanes, 64)
        with f.range(0, count - whole) as i:
            f.store(f.load(F32, lanes + i * 4), out + (whole + i) * 4)
