"""Stages of operations that no product takes along: norms from buffer to buffer, and functions of single numbers.

In: the run's and an operation's record (records.py), a task number. Out: IR functions. Knows no formats and no cache.
"""

from __future__ import annotations

from pocketlm.runtime.native import sizes
from pocketlm.runtime.native.ir import F32, I64, PTR, Function, Module, Value
from pocketlm.runtime.native.matrix import ROW
from pocketlm.runtime.native.record_reader import Records
from pocketlm.runtime.native.sizes import LANES, LAYER_NORM
from pocketlm.runtime.native.vector_math import ACTIVATIONS, clamped_beside, exp, tanh


def define(module: Module) -> None:
    """Define `activate(kind, x)`, `beside(kind, up)` and `softcap(x, cap)`, on 16 numbers."""
    with module.function("activate", {"kind": I64, "x": ROW}, returns=ROW) as f:
        kind, x = f.args()
        for number, name in enumerate(sizes.ACTIVATIONS, 1):
            with f.when(kind.equals(number)):
                f.ret(ACTIVATIONS[name](f, x), ROW)
        f.ret(x, ROW)
    with module.function("beside", {"kind": I64, "up": ROW}, returns=ROW) as f:
        kind, up = f.args()
        with f.when(kind.equals(1 + sizes.ACTIVATIONS.index("swiglu_clamped"))):
            f.ret(clamped_beside(f, up), ROW)
        f.ret(up, ROW)
    with module.function("softcap", {"x": ROW, "cap": F32}, returns=ROW) as f:
        x, cap = f.args()
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
    whole, n, mean = width & -LANES, f.cast("sitofp", width, F32), f.var(F32, 0.0)
    sums, rest = f.var(ROW, 0.0), f.var(F32, 0.0)
    with f.when(r.op("source").equals(LAYER_NORM)):
        with f.range(0, whole, LANES) as i:
            sums.set(sums.get() + f.load(ROW, x + i * 4, 4))
        with f.range(whole, width) as i:
            rest.set(rest.get() + f.load(F32, x + i * 4))
        mean.set((f.reduce(sums.get(), "add") + rest.get()) / n)
    squares, rest_squares = f.var(ROW, 0.0), f.var(F32, 0.0)
    with f.range(0, whole, LANES) as i:
        v = f.load(ROW, x + i * 4, 4) - f.splat(mean.get(), LANES)
        squares.set(f.fma(v, v, squares.get()))
    with f.range(whole, width) as i:
        v = f.load(F32, x + i * 4) - mean.get()
        rest_squares.set(f.fma(v, v, rest_squares.get()))
    square = (f.reduce(squares.get(), "add") + rest_squares.get()) / n
    scale = 1.0 / f.intrinsic("sqrt", square + r.op("epsilon", F32))

    def piece(i: Value, load, splat) -> None:
        v = (load(x + i * 4) - splat(mean.get())) * splat(scale)
        v = v * load(weight + i * 4) if bias is None else f.fma(v, load(weight + i * 4), load(bias + i * 4))
        if add is not None:
            v = v + f.select(add, load(to + i * 4), splat(f.const(F32, 0.0)))
        f.store(v, to + i * 4, 4)

    with f.range(0, whole, LANES) as i:
        piece(i, lambda at: f.load(ROW, at, 4), lambda value: f.splat(value, LANES))
    with f.range(whole, width) as i:
        piece(i, lambda at: f.load(F32, at), lambda value: value)


def gate(f: Function, level: str, r: Records, own: Value, task: Value, n: Value) -> None:
    """The groups of a row: out + factor · sigmoid(weight · x) · y. All gates are made first: x may be out."""
    x, y, to = (r.op(name, PTR) + task * r.op(f"{name}_stride") for name in ("x", "y", "out"))
    width, stride, whole = r.op("n"), r.op("weight_stride"), r.op("n") & -LANES
    with f.range(0, r.op("n_groups")) as i:
        weight, total = r.op("weight", PTR) + i * stride, f.var(F32, 0.0)
        with f.range(0, stride, 4) as at:
            total.set(f.fma(f.load(F32, weight + at), f.load(F32, x + at), total.get()))
        power = f.extract(exp(f, f.splat(0.0 - total.get(), LANES)), 0)
        f.store(r.op("factor", F32) / (power + 1.0), own + i * 4)
    with f.range(0, r.op("n_groups")) as i:
        share, start = f.load(F32, own + i * 4), i * width

        def piece(at: Value, load, splat, share: Value = share) -> None:
            f.store(f.fma(load(y + at * 4), splat(share), load(to + at * 4)), to + at * 4, 4)

        with f.range(0, whole, LANES) as k:
            piece(start + k, lambda at: f.load(ROW, at, 4), lambda value: f.splat(value, LANES))
        with f.range(whole, width) as k:
            piece(start + k, lambda at: f.load(F32, at), lambda value: value)


def each(f: Function, level: str, r: Records, own: Value, task: Value, n: Value) -> None:
    """COLUMNS numbers of a row: scaled, added, capped or activated (and gated)."""
    width, how = r.op("n"), r.op("source")
    pieces = (width + (sizes.COLUMNS - 1)) // sizes.COLUMNS
    row, start = task // pieces, (task % pieces) * sizes.COLUMNS
    x, out = (r.op(name, PTR) + row * r.op(f"{name}_stride") + start * 4 for name in ("x", "out"))
    count, factor = f.minimum(width - start, f.const(I64, sizes.COLUMNS)), r.op("factor", F32)
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
