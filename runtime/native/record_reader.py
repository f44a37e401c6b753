"""How compiled code reads and writes the structures of records.py and walks through float32 arrays. Knows no mathematics.

In: a function being built (ir.Function), addresses. Out: the fields' values; loops.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np

from pocketlm.runtime.native.ir import F32, I64, PTR, Function, Type, Value
from pocketlm.runtime.native.records import ENTRY, GROUP, LAYER, OPERATION, PAIR, RUN, SAMPLER, TOKEN, offset
from pocketlm.runtime.native.sizes import LANES


class Records:
    """Reads fields of the records inside a function: `r.run("n_head")`, `r.op("x")`, `r.token(3)("position")`."""

    def __init__(self, f: Function, run: Value, op: Value):
        self._f, self._run, self._op = f, run, op

    def run(self, name: str, type: Type = I64) -> Value:
        return self._f.field(self._run, offset(RUN, name), type)

    def op(self, name: str, type: Type = I64) -> Value:
        return self._f.field(self._op, offset(OPERATION, name), type)

    def token(self, number: Value) -> Callable[..., Value]:
        return self._element(self.run("tokens", PTR), TOKEN, number)

    def layer(self, token: Callable[..., Value]) -> Callable[..., Value]:
        """The operation's layer in a token's cache."""
        return self._element(token("layers", PTR), LAYER, self.op("layer"))

    def pair(self, number: Value) -> Callable[..., Value]:
        return self._element(self.run("pairs", PTR), PAIR, number)

    def group(self, number: Value) -> Callable[..., Value]:
        return self._element(self.run("groups", PTR), GROUP, number)

    def entry(self, number: Value) -> Callable[..., Value]:
        return self._element(self.run("entries", PTR), ENTRY, number)

    def _element(self, array: Value, dtype: np.dtype, number: Value) -> Callable[..., Value]:
        """Field name (and type) → value, of one record in an array of them."""
        at = array + number * dtype.itemsize
        return lambda name, type=I64: self._f.field(at, offset(dtype, name), type)


def fill(f: Function, dtype: np.dtype, at: Value, **fields: Value | int) -> None:
    """Write fields of the record of a type at an address; plain numbers are int64."""
    for name, value in fields.items():
        field = f.coerce(value, I64)
        f.store(field, at + offset(dtype, name), field.type.bytes)


def of_sampler(f: Function, sampler: Value, name: str, type: Type = I64) -> Value:
    """A field of the SAMPLER at an address."""
    return f.field(sampler, offset(SAMPLER, name), type)


def each_number(f: Function, first: Value | int, last: Value, body: Callable[[Type, Value], object]) -> None:
    """`body(type, i)` for the float32 numbers [first, last): LANES at a time as one vector, then what is left one by one.

    For arrays that other data may follow, where a whole last vector would read or write that, too.
    """
    whole = first + ((last - first) & -LANES)
    for type, start, stop in ((F32.vec(LANES), first, whole), (F32, whole, last)):
        with f.range(start, stop, type.lanes) as i:
            body(type, i)


def vectors(f: Function, n: Value) -> AbstractContextManager[Value]:
    """Loop over n floats (filled up to a multiple of 16), giving byte offsets."""
    return f.range(0, ((n + 15) >> 4) << 6, 4 * LANES)
