"""How compiled code reads the structures of records.py, and walks vectors. What every stage needs; knows no mathematics."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from pocketlm.runtime.native.ir import I64, PTR, Function, Type, Value
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
        at = self.run("tokens", PTR) + number * TOKEN.itemsize
        return lambda name, type=I64: self._f.field(at, offset(TOKEN, name), type)

    def layer(self, token: Callable[..., Value]) -> Callable[[str], Value]:
        """The operation's layer in a token's cache."""
        at = token("layers", PTR) + self.op("layer") * LAYER.itemsize
        return lambda name: self._f.field(at, offset(LAYER, name))

    def set_run(self, name: str, value: Value) -> None:
        self._f.store(value, self._run + offset(RUN, name), 8)

    def pair(self, number: Value) -> Callable[[str], Value]:
        at = self.run("pairs", PTR) + number * PAIR.itemsize
        return lambda name: self._f.field(at, offset(PAIR, name))

    def group(self, number: Value) -> Callable[[str], Value]:
        at = self.run("groups", PTR) + number * GROUP.itemsize
        return lambda name: self._f.field(at, offset(GROUP, name))

    def entry(self, number: Value) -> Callable[[str], Value]:
        at = self.run("entries", PTR) + number * ENTRY.itemsize
        return lambda name: self._f.field(at, offset(ENTRY, name))


def of_sampler(f: Function, sampler: Value, name: str, type: Type = I64) -> Value:
    """A field of the SAMPLER at an address."""
    return f.field(sampler, offset(SAMPLER, name), type)


def vectors(f: Function, n: Value) -> AbstractContextManager[Value]:
    """Loop over n floats (filled up to a multiple of 16), giving byte offsets."""
    return f.range(0, ((n + 15) >> 4) << 6, 4 * LANES)
