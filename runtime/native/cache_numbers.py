"""How a cache keeps its numbers, as IR: int16 or int8, with a float32 scale for each head and position.

In: addresses of a head's rows in a layer, a row being a position. Out: keys and values as pairs of int16, and back. A group is
16 rows and ends with their 16 scales. Keys are [columns / 2, 16 rows, 2 columns], values [8, columns, 2 rows]: one instruction
multiplies both numbers of a pair and adds the products.

Sums of products must fit into 31 bits. So the length of a key is at most MAX_KEY (int8: 127 · √dim) and a query's MAX_QUERY,
and sizes.POSITIONS values of at most MAX_VALUE meet weights of at most MAX_WEIGHT.
"""

from __future__ import annotations

from collections.abc import Callable

from pocketlm.runtime.kv_cache import MAX_VALUE, SPREAD
from pocketlm.runtime.native.ir import F32, I8, I16, I32, I64, Function, Type, Value
from pocketlm.runtime.native.matrix import ROW
from pocketlm.runtime.native.record_reader import each_number
from pocketlm.runtime.native.sizes import LANES, SPAN
from pocketlm.runtime.native.vector_math import nearest

LIMIT = 65504.0  # of a key or value: the largest number of float16
MAX_KEY = 32700.0  # the rounded one is at most √dim / 2 longer, and below kv_cache.MAX_KEY: it stays what it is there
MAX_QUERY, MAX_WEIGHT = 65000.0, 16383.0
PAIRS = I16.vec(2 * LANES)


def limited(f: Function, x: Value) -> Value:
    """An infinite key would make the whole answer NaN; a NaN stays one."""
    return f.maximum(f.const(x.type, -LIMIT), f.minimum(f.const(x.type, LIMIT), x))


def rounded(f: Function, x: Value, inverse: Value, element: Type) -> Value:
    """x · inverse as integers, x one number or many."""
    many = inverse if x.type.lanes == 1 else f.splat(inverse, x.type.lanes)
    return f.cast("trunc", nearest(f, x * many), element)


def size_of(f: Function, vector: Value, dim: Value, limit: Callable[..., Value] = limited) -> tuple[Value, Value]:
    """The length and the largest magnitude of `dim` numbers, limited; a NaN among them is NaN in both."""
    found = {type: (f.var(type, 0.0), f.var(I32.vec(type.lanes), 0)) for type in (ROW, F32)}

    def look(type: Type, at: Value) -> None:
        x, (squares, largest) = limit(f, f.load(type, vector + at * 4, 4)), found[type]
        squares.set(f.fma(x, x, squares.get()))
        # compared as integers, where NaN is the largest
        largest.set(f.maximum(largest.get(), f.bitcast(f.intrinsic("fabs", x), largest.type)))

    each_number(f, 0, dim, look)
    (squares, largest), (rest, last) = found[ROW], found[F32]
    length = f.intrinsic("sqrt", f.reduce(squares.get(), "add") + rest.get())
    return length, f.bitcast(f.maximum(f.reduce(largest.get(), "max"), last.get()), F32)


class Words:
    """int16. Scales are powers of two: numbers that are read and kept again stay the same."""

    n_bytes = 2  # of a number
    element = I16

    def row_bytes(self, padded: Value) -> Value:
        """Bytes of a position's key, or value, in one head."""
        return padded * self.n_bytes + 4

    def span_bytes(self, padded: Value) -> Value:
        """From a span's keys to its values."""
        return self.row_bytes(padded) * SPAN

    def load(self, f: Function, at: Value) -> Value:
        """Two columns of 16 keys, or two rows of 16 columns of values."""
        return f.load(PAIRS, at, 4)

    def key_at(self, group: Value, lane: Value, d: Value) -> Value:
        """Where a number of a key is kept."""
        return group + ((d & -2) * LANES + lane * 2 + (d & 1)) * self.n_bytes

    def value_row(self, values: Value, row: Value, padded: Value) -> Value:
        """Where the first number of a row's value is kept; the next one is two numbers further."""
        return values + ((row & -2) * padded + (row & 1)) * self.n_bytes + (row >> 4) * (4 * LANES)

    def scales_at(self, group: Value, padded: Value) -> Value:
        """Where the scales of a group's 16 positions are kept, a <16 x float>."""
        return group + padded * (LANES * self.n_bytes)

    def spread(self, f: Function, vector: Value, dim: Value) -> None:
        """Transform a query or a key of `dim` numbers in place, where the cache keeps keys transformed."""

    def key_scale(self, f: Function, vector: Value, dim: Value) -> Value:
        length, _ = size_of(f, vector, dim)
        return _power_of_two(f, length / f.const(F32, MAX_KEY))

    def value_scale(self, f: Function, vector: Value, dim: Value) -> Value:
        _, largest = size_of(f, vector, dim)
        return _power_of_two(f, largest / f.const(F32, MAX_VALUE))

    def kept(self, f: Function, x: Value, inverse: Value) -> Value:
        """float32, one or 16, as they are kept."""
        return rounded(f, limited(f, x), inverse, self.element)


def _power_of_two(f: Function, x: Value) -> Value:
    """The smallest that is at least x; NaN for NaN."""
    return f.bitcast((f.bitcast(x, I32) + 0x7FFFFF) & 0x7F800000, F32) + (x - x)


class Bytes(Words):
    """int8, and a scale of 16 bits in a float32, so that numbers that are read and kept again stay the same. Keys are spread
    as `kv_cache.spread` says.
    """

    n_bytes = 1
    element = I8

    def load(self, f: Function, at: Value) -> Value:
        return f.cast("sext", f.load(I8.vec(2 * LANES), at), I16)

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

    def key_scale(self, f: Function, vector: Value, dim: Value) -> Value:
        _, largest = size_of(f, vector, dim)
        bits = f.bitcast(largest * (1 / 127), I32)
        return f.bitcast((bits + 0x80) & -0x100, F32)

    value_scale = key_scale


KINDS = {"q16": Words(), "q8": Bytes()}
