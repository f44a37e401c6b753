"""The keys and values of every position of one text, preallocated for the whole context.

Knows positions, not tokens: which ids stand behind them is the session's affair.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pocketlm.runtime.hyper_parameters import Hyper
from pocketlm.runtime.memory import reserved
from pocketlm.runtime.positions import Turn, rotate


class KVCache:
    """keys and values, float32 [n_layer, n_kv_head, n_ctx, head_dim]; the first `length` positions are filled."""

    def __init__(self, hyper: Hyper, n_ctx: int, turns: Mapping[int, Turn] | None = None):
        """Memory is reserved here and used as positions fill. `turns` are `positions.key_turns`."""
        self.hyper, self.n_ctx, self.length, self._turns = hyper, n_ctx, 0, turns
        self.keys, self.values = (
            reserved((hyper.n_layer, hyper.n_kv_head, n_ctx, hyper.head_dim), np.float32) for _ in range(2)
        )

    @staticmethod
    def bytes_for(hyper: Hyper, n_ctx: int) -> int:
        return 2 * hyper.n_layer * hyper.kv_width * n_ctx * 4

    @staticmethod
    def bytes_to_move(hyper: Hyper, n_ctx: int) -> int:
        """Of the copies that `remove` makes, one layer at a time: of keys, of what turning them needs, of values."""
        return 4 * hyper.kv_width * n_ctx * 3

    def read_keys(self, layer: int, start: int, stop: int) -> np.ndarray:
        """A copy, float32 [n_kv_head, stop - start, head_dim]."""
        return self.keys[layer, :, start:stop].copy()

    def write_keys(self, layer: int, start: int, keys: np.ndarray) -> None:
        """Put keys, float32 [n_kv_head, n, head_dim], at `start`."""
        self.keys[layer, :, start : start + keys.shape[1]] = keys

    def fork(self, length: int) -> KVCache:
        """A cache of its own with the first `length` positions of this one; the rest takes no memory before it is filled."""
        other = type(self)(self.hyper, self.n_ctx, self._turns)
        for copy, filled in zip(other._filled(length), self._filled(length), strict=True):
            copy[...] = filled
        other.length = length
        return other

    def _filled(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        return self.keys[:, :, :length], self.values[:, :, :length]

    def release(self) -> None:
        """Give the memory back. Nobody may compute with this cache any more."""
        self.length, self.keys, self.values = 0, self.keys[:0].copy(), self.values[:0].copy()

    @property
    def nbytes_to_come(self) -> int:
        """Bytes that were promised and not used so far."""
        return (self.keys.nbytes + self.values.nbytes) * (self.n_ctx - self.length) // self.n_ctx

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on."""
        self.length = min(self.length, max(length, 0))

    def remove(self, start: int, stop: int) -> bool:
        """Take positions [start, stop) out and move the later ones down; keys turn back by the distance moved.

        False, and nothing changes, where positions are learned: they are mixed into the values and cannot be moved.
        ALiBi and models without positions need no turning: only distances count, and these stay.
        """
        if self._turns is None:
            return False
        moved = self.length - stop
        for layer in range(len(self.keys)):
            keys = self.read_keys(layer, stop, self.length)
            if turn := self._turns.get(layer):
                angles = (start - stop) * turn.frequencies
                rotate(keys, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), turn.pairs)
            self.write_keys(layer, start, keys)
            values = self.values[layer]
            values[:, start : start + moved] = values[:, stop : self.length].copy()
        self.length -= stop - start
        return True
