"""What sampling asks of a vocabulary's logits, in compiled code: which are the k largest, and the sum of all exp.

In: logits. Out: ids, a sum. Knows neither the chain of filters nor the model.
"""

from __future__ import annotations

import ctypes

import numpy as np

from pocketlm.errors import UsageError
from pocketlm.runtime.native.linker import Loaded
from pocketlm.runtime.native.sizes import CHUNK
from pocketlm.runtime.native.tiling import ROWS


class Selection:
    """`top_k` and `sum_exp` over logits float32 [n_vocab], contiguous."""

    def __init__(self, core: Loaded, n_vocab: int):
        p, i = ctypes.c_void_p, ctypes.c_int64
        self._n_vocab, self._whole = n_vocab, n_vocab // ROWS * ROWS  # what is left over is NumPy's
        self._largest_of = core.function("largest_of", None, p, i, p)
        self._at_least = core.function("at_least", i, p, i, ctypes.c_float, p)
        self._sum_exp = core.function("sum_exp", ctypes.c_float, p, i, ctypes.c_float)
        self._chunks = np.empty(-(-self._whole // CHUNK), np.float32)
        self._ids = np.empty(n_vocab + ROWS, np.int64)
        self._rest = np.arange(self._whole, n_vocab)

    def top_k(self, logits: np.ndarray, k: int) -> np.ndarray:
        """Ids of the k largest, the largest first, lower ids before higher ones of the same value: int64 [min(k, n_vocab)].

        UsageError for logits of another shape or type, and for k < 1.
        """
        address = self._checked(logits)
        if k < 1:
            raise UsageError(f"the {k} largest logits: expected at least 1")
        if k >= len(self._chunks):
            ids = np.arange(len(logits))
        else:
            self._largest_of(address, self._whole, self._chunks.ctypes.data)
            bound = np.partition(self._chunks, len(self._chunks) - k)[len(self._chunks) - k]
            count = self._at_least(address, self._whole, bound, self._ids.ctypes.data)
            ids = np.concatenate([self._ids[:count], self._rest])
        return ids[(-logits[ids]).argsort(kind="stable")[:k]]

    def sum_exp(self, logits: np.ndarray, largest: float) -> float:
        """Sum of exp(logit - largest). UsageError for logits of another shape or type."""
        address = self._checked(logits)
        rest = float(np.exp(logits[self._whole :] - largest).sum())
        return self._sum_exp(address, self._whole, largest) + rest

    def _checked(self, logits: np.ndarray) -> int:
        """The address: compiled code reads n_vocab float32 from there, whatever is there."""
        if logits.shape != (self._n_vocab,) or logits.dtype != np.float32 or not logits.flags.c_contiguous:
            raise UsageError(f"logits {logits.dtype} {logits.shape}: expected contiguous float32 ({self._n_vocab},)")
        return logits.ctypes.data
