"""The keys and values of every position seen so far, preallocated for the whole context.

Knows positions, not tokens: which ids stand behind them is the session's affair.
"""

from __future__ import annotations

import numpy as np

from pocketlm.runtime.hyper import Hyper
from pocketlm.runtime.positions import rope_frequencies, rotate


class KVCache:
    """keys and values [n_layer, n_kv_head, n_ctx, head_dim]; the first `length` positions are filled."""

    def __init__(self, hyper: Hyper, n_ctx: int, dtype: type = np.float32, rope_factors: np.ndarray | None = None):
        """Memory is reserved here and used as positions fill. `rope_factors` are those of `positions.rope_frequencies`."""
        shape = (hyper.n_layer, hyper.n_kv_head, n_ctx, hyper.head_dim)
        self.hyper, self.n_ctx, self.length = hyper, n_ctx, 0
        self.keys, self.values = np.zeros(shape, dtype), np.zeros(shape, dtype)
        self._rope_factors = rope_factors

    @staticmethod
    def bytes_for(hyper: Hyper, n_ctx: int, itemsize: int) -> int:
        return 2 * hyper.n_layer * hyper.kv_width * n_ctx * itemsize

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        self.length = min(self.length, max(length, 0))

    def remove(self, start: int, stop: int) -> bool:
        """Take positions [start, stop) out and move the later ones down; keys turn back by the distance moved.

        False, and nothing changes, where positions are learned: they are mixed into the values and cannot be moved.
        ALiBi and models without positions need no turning: only distances count, and these stay.
        """
        if self.hyper.position == "learned":
            return False
        moved = self.length - stop
        for store in (self.keys, self.values):
            for layer in store:  # layer by layer, so that the copy NumPy makes of an overlapping move stays small
                layer[:, start : start + moved] = layer[:, stop : self.length].copy()
        if self.hyper.rope is not None and moved:
            frequencies, _ = rope_frequencies(self.hyper.rope, self._rope_factors)
            angles = (start - stop) * frequencies
            cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
            for layer in self.keys:
                turned = layer[:, start : start + moved].astype(np.float32)
                rotate(turned, cos, sin, self.hyper.rope.pairs)
                layer[:, start : start + moved] = turned
        self.length -= stop - start
        return True
