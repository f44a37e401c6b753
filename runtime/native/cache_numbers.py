"""How a cache keeps its numbers, as IR: float16, or int8 with a float32 scale for each head and position.

In: addresses of a head's rows in a layer. Out: keys and values as float32, and back. Rows come in groups of 16: a group of keys
has a column's 16 numbers after the other's, a group of values a row after the other. A group of int8 ends with its 16 scales.
"""

from __future__ import annotations

from pocketlm.runtime.kv_cache import SPREAD
from pocketlm.runtime.native.ir import F16, F32, I8, I32, I64, Function, Type, Value
from pocketlm.runtime.native.matrix import ROW
from pocketlm.runtime.native.sizes import LANES
from pocketlm.runtime.native.vector_math import from_half, to_half

MAX_HALF = 65504.0  # the largest number of float16


def limited(f: Function, x: Value) -> Value:
    """An infinite key would make the whole answer NaN; a NaN stays one."""
    return f.maximum(f.const(x.type, -MAX_HALF), f.minimum(f.const(x.type, MAX_HALF), x))


class Halves:
    """float16."""

    n_bytes = 2  # of a number
    has_scales = False

    def row_bytes(self, padded: Value) -> Value:
        """Bytes of a position's key, or value, in one head."""
        return padded * 2

    def load(self, f: Function, level: str, at: Value) -> Value:
        """16 numbers as they are kept."""
        return from_half(f, level, f.load(F16.vec(LANES), at, 32))

    def value_row(self, values: Value, row: Value, padded: Value) -> Value:
        """Where the row's value begins."""
        return values + row * (padded * 2)

    def scaled(self, f: Function, x: Value, group: Value, padded: Value) -> Value:
        """What is one of 16 numbers each, of the positions of a group, times their scales."""
        return x

    def scale(self, f: Function, vector: Value, dim: Value, group: Value, lane: Value, padded: Value) -> Value:
        """Keep the scale of a vector of `dim` numbers; what they are to be multiplied with before `kept`."""
        return f.const(F32, 1.0)

    def spread(self, f: Function, vector: Value, dim: Value) -> None:
        """Make a query or a key of `dim` numbers, in place, what keys are kept as."""

    def kept(self, f: Function, level: str, x: Value, inverse: Value) -> Value:
        """float32, one or 16, as they are kept."""
        return to_half(f, level, limited(f, x))


class Bytes(Halves):
    """int8, and a scale of 16 bits in a float32, so that numbers that are read and kept again stay the same. Keys are spread
    as `kv_cache.spread` says.
    """

    n_bytes = 1
    has_scales = True

    def row_bytes(self, padded: Value) -> Value:
        return padded + 4

    def load(self, f: Function, level: str, at: Value) -> Value:
        return f.cast("sitofp", f.load(I8.vec(LANES), at), F32)

    def value_row(self, values: Value, row: Value, padded: Value) -> Value:
        return values + row * padded + (row >> 4) * (4 * LANES)

    def scaled(self, f: Function, x: Value, group: Value, padded: Value) -> Value:
        return x * f.load(ROW, group + padded * LANES, 4)

    def spread(self, f: Function, vector: Value, dim: Value) -> None:
        n = dim & (0 - dim)
        with f.when((dim & (SPREAD - 1)).equals(0)):
            factor = f.splat(1.0 / f.intrinsic("sqrt", f.cast("sitofp", n, F32)), LANES)
            with f.range(0, dim, LANES) as d:
                x = limited(f, f.load(ROW, vector + d * 4, 4)) * factor
                for h in (1, 2, 4, 8):
                    signs = f.vector(I32.vec(LANES), [-(1 << 31) if lane & h else 0 for lane in range(LANES)])
                    own = f.bitcast(f.bitcast(x, I32.vec(LANES)) ^ signs, ROW)
                    x = f.shuffle(x, [lane ^ h for lane in range(LANES)]) + own
                f.store(x, vector + d * 4, 4)
            h = f.var(I64, LANES)
            with f.loop_while(lambda: h.get() < n):
                with f.range(0, dim >> 1, LANES) as pair:  # of columns h apart
                    low = vector + ((pair & (h.get() - 1)) + ((pair & (0 - h.get())) << 1)) * 4
                    high = low + h.get() * 4
                    a, b = f.load(ROW, low, 4), f.load(ROW, high, 4)
                    f.store(a + b, low, 4)
                    f.store(a - b, high, 4)
                h.set(h.get() << 1)

    def scale(self, f: Function, vector: Value, dim: Value, group: Value, lane: Value, padded: Value) -> Value:
        largest, whole = f.var(I32, 0), dim & -LANES  # compared as integers, where NaN is larger than every number

        def look(type: Type, at: Value) -> None:
            bits = f.bitcast(f.intrinsic("fabs", limited(f, f.load(type, at, 4))), I32.vec(type.lanes))
            largest.set(f.maximum(largest.get(), f.reduce(bits, "max") if type.lanes > 1 else bits))

        with f.range(0, whole, LANES) as d:
            look(ROW, vector + d * 4)
        with f.range(whole, dim) as d:
            look(F32, vector + d * 4)
        bits = f.bitcast(f.bitcast(largest.get(), F32) * (1 / 127), I32)
        scale = f.bitcast((bits + 0x80) & -0x100, F32)
        f.store(scale, group + padded * LANES + lane * 4, 4)
        return f.select(scale > 1e-30, 1.0 / scale, 0.0)

    def kept(self, f: Function, level: str, x: Value, inverse: Value) -> Value:
        many = inverse if x.type.lanes == 1 else f.splat(inverse, x.type.lanes)
        rounded = f.cast("fptosi", f.intrinsic("rint", limited(f, x) * many), I32)
        return f.cast("trunc", f.emit(rounded.type, f"freeze {rounded.type} {rounded}"), I8)  # NaN has no integer


KINDS = {"f16": Halves(), "q8": Bytes()}
