"""Keys and values in the order and the numbers that compiled code reads: integers with scales (cache_numbers.py).

In: positions, their keys and values as float32. Out: the memory that kernels compute in, and a table of where its layers lie.
Knows no kernels and no plan.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from pocketlm.runtime.hyper_parameters import Hyper
from pocketlm.runtime.kv_cache import SCALE_BYTES, ByteCache, ScaledCache
from pocketlm.runtime.memory import aligned, round_up, scattered
from pocketlm.runtime.native.records import LAYER
from pocketlm.runtime.native.sizes import BLOCK, SPAN
from pocketlm.runtime.native.tiling import ROWS

GROUPS = SPAN // ROWS  # of a span


class NativeCache(ScaledCache):
    """int16 in groups of 16 positions, [padded_dim / 2, 16, 2] of keys and [8, padded_dim, 2] of values, each with its scales
    behind it, float32 [16]. `layers`: keys and values of each, [n_kv_head, spans, SPAN / 16, numbers of a group].

    SPAN positions of all layers lie together, a head's in one piece, values behind keys: a text takes the memory that it
    fills, though the system gives it in pages of 2 MB. Rings lie together like this, apart from the layers without a window.
    """

    block = BLOCK
    unit = SPAN
    allocate = staticmethod(aligned if mmap.PAGESIZE == 4096 else scattered)  # a Pi 5's large pages have 32 MB

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self.table = aligned(self.hyper.n_layer, LAYER)  # what compiled code knows of the layers
        self.table["rows"] = self.rows
        self.table["offset"] = [keys.ctypes.data - self.memory.ctypes.data for keys, _ in self.layers]
        self.table["stride"] = [keys.strides[1] for keys, _ in self.layers]
        for layer, columns_of_layer in self.convolved.items():
            self.table["offset"][layer] = columns_of_layer.ctypes.data - self.columns_address

    @classmethod
    def bytes_to_move(cls, hyper: Hyper, n_ctx: int) -> int:
        """Bytes that `remove` takes for copies of one layer: float32, scaled, rounded, and integers in two orders."""
        return hyper.n_kv_head * cls._padded(hyper) * round_up(n_ctx, SPAN) * 16

    @classmethod
    def _padded(cls, hyper: Hyper) -> int:
        return round_up(hyper.head_dim, ROWS) + SCALE_BYTES // np.dtype(cls.dtype).itemsize

    def _shaped(self, rows: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        shape, layers, at = (self.hyper.n_kv_head, 2, GROUPS, self._padded(self.hyper) * ROWS), {}, 0
        for each in sorted(set(rows)):
            alike = [layer for layer, n in enumerate(rows) if n == each]
            n = len(alike) * each // SPAN * math.prod(shape)
            together = self.memory[at : at + n].reshape(each // SPAN, len(alike), *shape).swapaxes(0, 2)
            layers |= {layer: (together[:, i, :, 0], together[:, i, :, 1]) for i, layer in enumerate(alike)}
            at += n
        return [layers[layer] for layer in range(len(rows))]

    def _filled(self, layer: int, n: int) -> Sequence[np.ndarray]:
        spans, groups = divmod(round_up(n, ROWS) // ROWS, GROUPS)
        whole = slice(None), slice(spans)
        rest = slice(None), slice(spans, spans + 1), slice(groups)
        return [memory[part] for memory in self.layers[layer] for part in (whole, rest)]

    def _parts(self, which: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Views [n_kv_head, spans, groups, …]: numbers [16, padded_dim / 2, 2] of keys, [8, 2, padded_dim] of values, and
        scales [16].
        """
        groups, dim = self.layers[layer][which], round_up(self.hyper.head_dim, ROWS)
        numbers, scales = groups[..., : dim * ROWS], groups[..., dim * ROWS :].view(np.float32)
        shape = (dim // 2, ROWS, 2) if which == 0 else (ROWS // 2, dim, 2)
        numbers = numbers.reshape(*groups.shape[:3], *shape)
        return numbers.swapaxes(3, 4) if which == 0 else numbers.swapaxes(4, 5), scales

    def _places(self, which: int, layer: int, start: int, stop: int) -> tuple[tuple, tuple]:
        """Where positions are in the views."""
        span, row = divmod(np.arange(start, stop) % self.rows[layer], SPAN)
        group, lane = divmod(row, ROWS)
        of_scales = slice(None), span, group, lane
        return of_scales if which == 0 else (slice(None), span, group, *divmod(lane, 2)), of_scales

    def _read(self, which: int, layer: int, start: int, stop: int) -> np.ndarray:
        (numbers, scales), (place, of_scales) = self._parts(which, layer), self._places(which, layer, start, stop)
        found = numbers[place].reshape(self.hyper.n_kv_head, stop - start, round_up(self.hyper.head_dim, ROWS))
        return found[..., : self.hyper.head_dim] * scales[of_scales][..., None]

    def _write(self, which: int, layer: int, start: int, x: np.ndarray) -> None:
        (numbers, scales), (place, of_scales) = self._parts(which, layer), self._places(which, layer, start, start + x.shape[1])
        kept, scales[of_scales] = self.keep[which](x)
        dim = round_up(self.hyper.head_dim, ROWS)
        whole = np.zeros((*x.shape[:2], dim), self.dtype)
        whole[..., : self.hyper.head_dim] = kept
        numbers[place] = whole.reshape(*x.shape[:2], dim // 2, 2) if which == 0 else whole


class NativeByteCache(ByteCache, NativeCache):
    """A `NativeCache` of int8."""


CACHES = {"q16": NativeCache, "q8": NativeByteCache}
