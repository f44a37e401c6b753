"""What sampling asks of a vocabulary's logits, in compiled code: which are the k largest, and the sum of all exp.

In: logits. Out: ids, a sum. Knows neither the chain of filters nor the model.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np

from pocketlm.runtime.native.image import Loaded
from pocketlm.runtime.native.ir import F32, I1, I16, I64, PTR, Function, Module, Value
from pocketlm.runtime.native.matrix import ROW, ROWS
from pocketlm.runtime.native.vector_math import exp

CHUNK = 128  # logits whose largest stands for them: the k-th largest of these is a bound on the k-th largest of all


def define(module: Module) -> None:
    """largest_of(x, n, out), at_least(x, n, bound, ids) -> count and sum_exp(x, n, top) -> float, over whole vectors of x."""
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
        f.give(count.get())
    with module.function("sum_exp", {"x": PTR, "n": I64, "top": F32}, returns=F32, linkage="entry") as f:
        x, n, top = f.args()
        total, high = f.var(ROW, 0.0), f.splat(top, ROWS)
        with f.range(0, n, ROWS) as i:
            total.set(total.get() + exp(f, f.load(ROW, x + i * 4, 4) - high))
        f.give(f.reduce(total.get(), "add"), F32)


def _any(f: Function, lanes: Value) -> Value:
    return f.bitcast(lanes, I16).equals(0) ^ f.const(I1, 1)


class Selection:
    """`top_k` and `sum_exp` over logits float32 [n_vocab], contiguous."""

    def __init__(self, core: Loaded, n_vocab: int):
        p, i = ctypes.c_void_p, ctypes.c_int64
        self._whole = n_vocab // ROWS * ROWS  # what is left over is NumPy's
        self._largest_of = core.function("largest_of", None, p, i, p)
        self._at_least = core.function("at_least", i, p, i, ctypes.c_float, p)
        self._sum_exp = core.function("sum_exp", ctypes.c_float, p, i, ctypes.c_float)
        self._chunks = np.empty(-(-self._whole // CHUNK), np.float32)
        self._ids = np.empty(n_vocab + ROWS, np.int64)
        self._rest = np.arange(self._whole, n_vocab)

    def top_k(self, logits: np.ndarray, k: int) -> np.ndarray:
        """Ids of the k largest, the largest first, lower ids before higher ones of the same value: int64 [min(k, n_vocab)]."""
        if k >= len(self._chunks):
            ids = np.arange(len(logits))
        else:
            address = logits.ctypes.data
            self._largest_of(address, self._whole, self._chunks.ctypes.data)
            bound = np.partition(self._chunks, len(self._chunks) - k)[len(self._chunks) - k]
            count = self._at_least(address, self._whole, bound, self._ids.ctypes.data)
            ids = np.concatenate([self._ids[:count], self._rest])
        return ids[(-logits[ids]).argsort(kind="stable")[:k]]

    def sum_exp(self, logits: np.ndarray, largest: float) -> float:
        """Sum of exp(logit - largest)."""
        rest = float(np.exp(logits[self._whole :] - largest).sum())
        return self._sum_exp(logits.ctypes.data, self._whole, largest) + rest
