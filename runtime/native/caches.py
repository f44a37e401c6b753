"""Keys and values in the order and the numbers that compiled code reads: float16, or int8 with scales.

In: positions, their keys and values as float32. Out: the memory that kernels compute in, and a table of where its layers lie.
Knows no kernels and no plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pocketlm.runtime.hyper_parameters import Hyper
from pocketlm.runtime.kv_cache import SCALE_BYTES, ByteCache, KVCache
from pocketlm.runtime.memory import aligned, round_up
from pocketlm.runtime.native import sizes
from pocketlm.runtime.native.records import LAYER
from pocketlm.runtime.native.tiling import ROWS
from pocketlm.runtime.positions import Turn


class NativeCache(KVCache):
    """float16. Keys [n_kv_head, rows / 16, padded_dim, 16]: 16 positions side by side; values as in KVCache, padded.

    A span of SPAN positions lies in one piece in every layer, a ring or not.
    """

    dtype = saved = np.float16
    block = sizes.BLOCK
    unit = sizes.SPAN

    def __init__(
        self, hyper: Hyper, n_ctx: int, turns: Mapping[int, Turn] | None = None, windows: Sequence[int] = (),
        columns: Sequence[int] = (),
    ):  # fmt: skip
        super().__init__(hyper, n_ctx, turns, windows, columns)
        self.table = aligned(hyper.n_layer, LAYER)  # what compiled code knows of the layers
        self.table["rows"] = self.rows
        at = np.array([keys.nbytes for keys, _ in self.layers])
        self.table["offset"] = np.cumsum(at) - at
        for layer, columns_of_layer in self.convolved.items():
            self.table["offset"][layer] = columns_of_layer.ctypes.data - self.columns_address

    @classmethod
    def bytes_to_move(cls, hyper: Hyper, n_ctx: int) -> int:
        """Of the copies that `remove` makes, one layer at a time, keys a second time in float32."""
        return hyper.n_kv_head * cls._padded(hyper) * round_up(n_ctx, sizes.SPAN) * 10

    @classmethod
    def _padded(cls, hyper: Hyper) -> int:
        return round_up(hyper.head_dim, ROWS)

    def _shaped(self, keys: np.ndarray, values: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
        n_kv, dim = self.hyper.n_kv_head, self._padded(self.hyper)
        return keys.reshape(n_kv, rows // ROWS, dim, ROWS), values.reshape(n_kv, rows, dim)

    def _filled(self, layer: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        keys, values = self.layers[layer]
        return keys[:, : round_up(n, ROWS) // ROWS], values[:, :n]

    def read_keys(self, layer: int, start: int, stop: int) -> np.ndarray:
        group, lane = divmod(np.arange(start, stop) % self.rows[layer], ROWS)
        keys = self.layers[layer][0][:, group, : self.hyper.head_dim, lane]  # [n, n_kv_head, head_dim]
        return np.ascontiguousarray(keys.swapaxes(0, 1), np.float32)

    def write_keys(self, layer: int, start: int, keys: np.ndarray) -> None:
        group, lane = divmod(np.arange(start, start + keys.shape[1]) % self.rows[layer], ROWS)
        self.layers[layer][0][:, group, : self.hyper.head_dim, lane] = keys.swapaxes(0, 1)


class NativeByteCache(ByteCache, NativeCache):
    """int8 in groups of 16 positions, [padded_dim, 16] of keys and [16, padded_dim] of values, each with its scales behind it,
    float32 [16].
    """

    @classmethod
    def _padded(cls, hyper: Hyper) -> int:
        return round_up(hyper.head_dim, ROWS) + SCALE_BYTES

    def _shaped(self, keys: np.ndarray, values: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
        shape = self.hyper.n_kv_head, rows // ROWS, self._padded(self.hyper) * ROWS
        return keys.reshape(shape), values.reshape(shape)

    def _filled(self, layer: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        (keys, values), n_groups = self.layers[layer], round_up(n, ROWS) // ROWS
        return keys[:, :n_groups], values[:, :n_groups]

    def _parts(self, which: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        groups, n_bytes = self.layers[layer][which], SCALE_BYTES * ROWS
        dim = self._padded(self.hyper) - SCALE_BYTES
        shape = (dim, ROWS) if which == 0 else (ROWS, dim)
        numbers = groups[..., :-n_bytes].reshape(*groups.shape[:2], *shape)
        numbers = numbers.swapaxes(2, 3) if which == 0 else numbers
        return numbers[..., : self.hyper.head_dim], groups[..., -n_bytes:].view(np.float32)

    def _index(self, layer: int, start: int, stop: int) -> tuple[Any, ...]:
        return (slice(None), *divmod(np.arange(start, stop) % self.rows[layer], ROWS))


CACHES = {"f16": NativeCache, "q8": NativeByteCache}
