"""The keys and values of one text, preallocated for the whole context.

A layer without a window keeps every position. Layers with a sliding window keep a ring: position p in row p % rows, so that a
text of any length takes a window of them, a pass of tokens, and a MARGIN that the text can be cut back by. A text that is cut
back further has to be computed again from its beginning, and `truncate` says so by forgetting all of it. Layers with a
short convolution keep a ring of its columns in place of keys and values: a window as wide as the convolution.

Which ids stand behind the positions is the session's affair; they are here for models that look at the token before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pocketlm.runtime.hyper_parameters import Hyper
from pocketlm.runtime.ids import Ids
from pocketlm.runtime.memory import round_up, scattered
from pocketlm.runtime.positions import Turn, rotate

KINDS = ("q16", "q8")  # of numbers: each executor's usual ones, int16 with a scale or float32, or int8 with a scale
SCALE_BYTES = 4
MAX_KEY, MAX_VALUE = 32767, 4095  # of int16: the length of a key at most, and the magnitude of a value's numbers
SPREAD = 16  # columns of keys that are spread: multiples of it
MARGIN = 512  # positions before a window that are kept: an answer of so many tokens can be taken back


class KVCache:
    """The first `length` positions are filled; layers with a window hold those from `first` on.

    `layers`: keys and values of each layer, float32 [n_kv_head, rows, head_dim], all in one piece of `memory`. `convolved`:
    layer → columns of a short convolution, float32 [1, rows, columns]; such a layer has no keys and values.
    """

    dtype: Any = np.float32
    block = 512  # tokens that an executor writes at most before it reads
    unit = 1  # rows are a multiple of it, and what a query reads begins at one
    allocate = staticmethod(scattered)  # a position's keys and values lie far from each other
    saved: Any = np.float32  # the numbers in a file, float32 or int16: exactly those that are kept

    def __init__(
        self, hyper: Hyper, n_ctx: int, turns: Mapping[int, Turn] | None = None, windows: Sequence[int] = (),
        columns: Sequence[int] = (),
    ):  # fmt: skip
        """Memory is reserved here and used as positions fill. `turns` are `positions.key_turns`, `windows` and `columns`
        `plan.windows` and `plan.columns`.
        """
        self.hyper, self.n_ctx, self.length, self.first, self._turns = hyper, n_ctx, 0, 0, turns
        self.windows, self.columns = tuple(windows), tuple(columns)
        self.rows = self.rows_of_layers(hyper, n_ctx, windows, columns)
        self.ids = np.zeros(n_ctx, np.int32)  # of every position
        self._ring = min(self.rows)
        self._reach = self._before(windows, columns)
        kept = [0 if columns and columns[layer] else rows for layer, rows in enumerate(self.rows)]
        self.memory = self.allocate((2 * hyper.n_kv_head * sum(kept) * self._padded(hyper),), self.dtype)
        self.layers = self._shaped(kept)
        self.convolved = self._shaped_columns()

    def _shaped_columns(self) -> dict[int, np.ndarray]:
        shapes = {layer: (1, self.rows[layer], n) for layer, n in enumerate(self.columns) if n}
        memory = scattered((sum(math.prod(shape) for shape in shapes.values()),), np.float32) if shapes else np.empty(0)
        cuts = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]
        parts = zip(shapes.items(), np.split(memory, cuts), strict=False)
        return {layer: part.reshape(shape) for (layer, shape), part in parts}

    @classmethod
    def rows_of_layers(
        cls, hyper: Hyper, n_ctx: int, windows: Sequence[int], columns: Sequence[int] = ()
    ) -> tuple[int, ...]:  # fmt: skip
        """How many positions each layer keeps. All windows get what the largest of them needs."""
        whole, ring = round_up(n_ctx, cls.unit), cls._before(windows, columns) + cls.block + MARGIN
        kept = {False: min(whole, round_up(ring, cls.unit)), True: min(n_ctx, ring)}  # of a window, of a convolution
        layers = zip(windows, columns or [0] * len(windows), strict=True)
        return tuple(kept[n > 0] if window else whole for window, n in layers) or (whole,) * hyper.n_layer

    @classmethod
    def _before(cls, windows: Sequence[int], columns: Sequence[int]) -> int:
        """How many positions before its own a query reads at most in layers with a window, which are read from the start of a
        unit of rows on.
        """
        layers = zip(windows, columns or [0] * len(windows), strict=True)
        return max((window - 1 if n else window - 1 + cls.unit - 1 for window, n in layers if window), default=0)

    @classmethod
    def bytes_for(cls, hyper: Hyper, n_ctx: int, windows: Sequence[int] = (), columns: Sequence[int] = ()) -> int:
        """Bytes of keys and values, and of a convolution's columns, in a full context."""
        rows = cls.rows_of_layers(hyper, n_ctx, windows, columns)
        return sum(n * size for n, size in zip(rows, cls._row_bytes(hyper, columns), strict=True))

    @classmethod
    def _row_bytes(cls, hyper: Hyper, columns: Sequence[int]) -> list[int]:
        """Bytes of one position in each layer."""
        both = 2 * hyper.n_kv_head * cls._padded(hyper) * np.dtype(cls.dtype).itemsize
        return [4 * n or both for n in columns or [0] * hyper.n_layer]

    @classmethod
    def bytes_to_move(cls, hyper: Hyper, n_ctx: int) -> int:
        """Bytes that `remove` takes for copies of one layer: keys, what turning them needs, values."""
        return 4 * hyper.kv_width * n_ctx * 3

    # ── what a cache of another number format or another order has of its own ───────────────────────────────────────────

    @classmethod
    def _padded(cls, hyper: Hyper) -> int:
        """Numbers of a position's key, or value, in one head."""
        return hyper.head_dim

    def _shaped(self, rows: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Views of the memory: (keys, values) of each layer, (heads, rows, columns) each. `rows`: every layer's."""
        shape = 2, self.hyper.n_kv_head, -1, self._padded(self.hyper)
        cuts = np.cumsum([2 * self.hyper.n_kv_head * n * self._padded(self.hyper) for n in rows])[:-1]
        return [(keys, values) for keys, values in (layer.reshape(shape) for layer in np.split(self.memory, cuts))]

    def _filled(self, layer: int, n: int) -> Sequence[np.ndarray]:
        """The first n rows of keys and values, or a few more, in parts."""
        keys, values = self.layers[layer]
        return keys[:, :n], values[:, :n]

    def _read(self, which: int, layer: int, start: int, stop: int) -> np.ndarray:
        """A copy of keys (0) or values (1) as they are kept, float32 [n_kv_head, stop - start, head_dim]."""
        return self.layers[layer][which][:, self.at(layer, start, stop)].copy()

    def _write(self, which: int, layer: int, start: int, x: np.ndarray) -> None:
        """Put keys or values [n_kv_head, n, head_dim] at `start`, n no more than the layer's rows."""
        self.layers[layer][which][:, self.at(layer, start, start + x.shape[1])] = x

    def read_keys(self, layer: int, start: int, stop: int) -> np.ndarray:
        return self._read(0, layer, start, stop)

    def write_keys(self, layer: int, start: int, keys: np.ndarray) -> None:
        self._write(0, layer, start, keys)

    # ── the same for all ─────────────────────────────────────────────────────────────────────────────────────────────────

    def read_values(self, layer: int, start: int, stop: int) -> np.ndarray:
        return self._read(1, layer, start, stop)

    def write_values(self, layer: int, start: int, values: np.ndarray) -> None:
        self._write(1, layer, start, values)

    def read_columns(self, layer: int, start: int, stop: int) -> np.ndarray:
        """A copy of a convolution's columns [1, stop - start, columns]."""
        return self.convolved[layer][:, self.at(layer, start, stop)].copy()

    def write_columns(self, layer: int, start: int, columns: np.ndarray) -> None:
        """Put columns [1, n, columns] at `start`, n no more than the layer's rows."""
        self.convolved[layer][:, self.at(layer, start, start + columns.shape[1])] = columns

    def seen(self, layer: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of positions to compute with [n_kv_head, stop - start, head_dim]."""
        rows = self.at(layer, start, stop)
        keys, values = self.layers[layer]
        return keys[:, rows], values[:, rows]

    def queries(self, q: np.ndarray) -> np.ndarray:
        """Queries [..., head_dim] as the keys of `seen` want them."""
        return q

    def at(self, layer: int, start: int, stop: int) -> slice | np.ndarray:
        """The rows of positions [start, stop), no more than the layer has."""
        rows = self.rows[layer]
        first, last = start % rows, start % rows + stop - start
        return slice(first, last) if last <= rows else np.arange(first, last) % rows

    def held(self, layer: int) -> int:
        """The first position that a layer holds."""
        return self.first if self.windows and self.windows[layer] else 0

    @property
    def columns_address(self) -> int:
        """The address of the first convolution's columns; 0 where there are none."""
        return next((columns.ctypes.data for columns in self.convolved.values()), 0)

    def about_to_write(self, ids: Ids, more: int = 0) -> None:
        """To be called before the keys and values of `ids`, at most a block, are written: rings lose their oldest positions.
        `more`: how many tokens, not known yet, may follow in the same call.
        """
        stop = self.length + len(ids)
        self.first = max(self.first, stop + more - self._ring)
        if len(ids) == 1:
            self.ids[self.length] = ids[0]
        else:
            self.ids[self.length : stop] = ids

    @property
    def id_before(self) -> int:
        """The id of the last position, -1 where there is none."""
        return self.ids[self.length - 1] if self.length else -1

    def goes_on_from(self, length: int) -> bool:
        """Whether a token at position `length` finds all that it reads: rings may have lost some."""
        return self.first == 0 or length == 0 or length - self._reach >= self.first

    def fork(self, length: int) -> KVCache:
        """A cache of its own with the first `length` positions of this one; the rest takes no memory before it is filled."""
        other = type(self)(self.hyper, self.n_ctx, self._turns, self.windows, self.columns)
        other.take(self, length)
        return other

    def take(self, other: KVCache, length: int) -> None:
        """Hold a copy of the first `length` positions of another cache of this kind and size, and nothing else."""
        for layer, rows in enumerate(self.rows):
            n = rows if other.held(layer) else min(length, rows)  # a ring that has gone round is full
            for copy, filled in zip(self._filled(layer, n), other._filled(layer, n), strict=True):
                copy[...] = filled
            if layer in self.convolved:
                self.convolved[layer][:, :n] = other.convolved[layer][:, :n]
        self.ids[:length] = other.ids[:length]
        self.first, self.length = other.first, length
        self.truncate(length)

    def release(self) -> None:
        """Give the memory back. Nobody may compute with this cache any more."""
        self.length, self.first, self.layers, self.convolved = 0, 0, [], {}
        self.memory = self.memory[:0].copy()

    def nbytes_at(self, length: int) -> int:
        """Bytes that a text of so many positions uses, about."""
        if not self.layers:  # given back
            return 0
        sizes = self._row_bytes(self.hyper, self.columns)
        return sum(min(length, rows) * size for rows, size in zip(self.rows, sizes, strict=True))

    @property
    def nbytes_to_come(self) -> int:
        """Bytes that were promised and not used so far."""
        return self.nbytes_at(self.n_ctx) - self.nbytes_at(self.length)

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on; all positions if a layer's window would need some that are no longer kept."""
        length = min(self.length, max(length, 0))
        self.length = length if self.goes_on_from(length) else 0
        if self.length == 0:
            self.first = 0

    def remove(self, start: int, stop: int) -> bool:
        """Take positions [start, stop) out and move the later ones down; keys turn back by the distance moved.

        Returns False, and nothing changes, where positions are learned, which are mixed into the values and cannot be moved,
        and where a window would need positions that are no longer kept. ALiBi and models without positions need no turning:
        only distances count, and these stay.
        """
        distance = stop - start
        first = self.first if self.first <= start else max(self.first, stop) - distance
        if self._turns is None or (first and self.length - distance - self._reach < first):
            return False
        for layer in range(len(self.layers)):
            oldest = max(stop, self.held(layer))
            if layer in self.convolved:
                self.write_columns(layer, oldest - distance, self.read_columns(layer, oldest, self.length))
                continue
            values = self.read_values(layer, oldest, self.length)
            self.write_values(layer, oldest - distance, values)
            del values
            keys = self.read_keys(layer, oldest, self.length)
            if turn := self._turns.get(layer):
                angles = -distance * turn.frequencies
                rotate(keys, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), turn.pairs)
            self.write_keys(layer, oldest - distance, keys)
        self.ids[start : self.length - distance] = self.ids[stop : self.length].copy()
        self.first = first
        self.length -= distance
        return True


def to_bytes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [..., n] as int8 [..., n] and a scale for each n, float32 [...].

    A scale has 16 significant bits: what is read from int8 and rounded again stays the same, bit for bit.
    """
    largest = np.abs(x).max(-1).astype(np.float32) * np.float32(1 / 127)
    scales = ((largest.view(np.int32) + 0x80) & -0x100).view(np.float32)
    return _rounded(x, scales, np.int8), scales


def values_to_words(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [..., n] as int16 [..., n] and a scale for each n, a power of two, float32 [...].

    What is read from int16 and rounded again stays the same number, bit for bit; so it is with keys.
    """
    scales = _power_of_two(np.abs(x).max(-1) / np.float32(MAX_VALUE))
    return _rounded(x, scales, np.int16), scales


def keys_to_words(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`values_to_words` for keys, scaled by their length and not their largest number: products with queries stay small."""
    scales = _power_of_two(np.sqrt(np.square(x, dtype=np.float64).sum(-1)) / MAX_KEY)
    words = _rounded(x, scales, np.int16)
    is_long = np.square(words, dtype=np.float64).sum(-1) > MAX_KEY**2
    scales[is_long] *= 2
    words[is_long] = _rounded(x[is_long], scales[is_long], np.int16)
    return words, scales


def _power_of_two(x: np.ndarray) -> np.ndarray:
    """The smallest that is at least x, float32; NaN where x is no number."""
    fraction, exponent = np.frexp(x)
    with np.errstate(invalid="ignore"):
        return np.ldexp(np.sign(x), exponent - (fraction == 0.5)).astype(np.float32) + (x - x).astype(np.float32)


def _rounded(x: np.ndarray, scales: np.ndarray, dtype: Any) -> np.ndarray:
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 1e-30)
    with np.errstate(invalid="ignore"):  # NaN has no integer; the scale carries it on
        return np.rint(x * inverse[..., None]).astype(dtype)


def spread(x: np.ndarray) -> np.ndarray:
    """[..., dim] times an orthonormal Hadamard matrix for each largest power of two in `dim`; its own inverse.

    A few columns of keys are several times the others' size and take the steps of int8 from them. After this all are alike,
    and queries that go the same way meet them with the same products (after QuaRot: Ashkboos et al., arXiv:2404.00456).
    """
    dim, h = x.shape[-1], 1
    n = dim & -dim if dim % SPREAD == 0 else 1
    while h < n:
        pairs = x.reshape(*x.shape[:-1], dim // (2 * h), 2, h)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x, h = np.stack([a + b, a - b], -2).reshape(x.shape), 2 * h
    return x * np.float32(n**-0.5)


class ScaledCache(KVCache):
    """Integers: a row is head_dim numbers and the bytes of their scale, a float32."""

    dtype = saved = np.int16
    keep: Any = keys_to_words, values_to_words  # makes integers and scales of keys, of values

    @classmethod
    def _padded(cls, hyper: Hyper) -> int:
        return hyper.head_dim + SCALE_BYTES // np.dtype(cls.dtype).itemsize

    def _read(self, which: int, layer: int, start: int, stop: int) -> np.ndarray:
        rows, n = self.layers[layer][which][:, self.at(layer, start, stop)], self.hyper.head_dim
        return rows[..., :n] * rows[..., n:].view(np.float32)

    def _write(self, which: int, layer: int, start: int, x: np.ndarray) -> None:
        numbers, scales = self.keep[which](x)
        rows = np.concatenate([numbers, scales[..., None].view(self.dtype)], -1)
        self.layers[layer][which][:, self.at(layer, start, start + x.shape[1])] = rows

    def seen(self, layer: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return self._read(0, layer, start, stop), self._read(1, layer, start, stop)


class ByteCache(ScaledCache):
    """int8. Keys are spread."""

    dtype, saved = np.int8, np.float32
    keep = to_bytes, to_bytes

    def read_keys(self, layer: int, start: int, stop: int) -> np.ndarray:
        return spread(self._read(0, layer, start, stop))

    def write_keys(self, layer: int, start: int, keys: np.ndarray) -> None:
        self._write(0, layer, start, spread(keys))

    def queries(self, q: np.ndarray) -> np.ndarray:
        return spread(q)
