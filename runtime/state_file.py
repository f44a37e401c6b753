"""A text's state in a file: its ids, and the keys and values of their positions.

In: ids and a cache. Out: a file, and the cache filled again by the same model, by either executor. A file is never trusted:
sizes, ids, the model's fingerprint and the checksum are looked at before a byte of it is used.

Layout, little-endian: HEADER, ids int32 [n], then for each layer keys and values, float32 [n_kv_head, n, head_dim], or int16 of
that shape and their scales, float32 [n_kv_head, n, 1], or a convolution's columns, float32 [1, n, columns], then the SHA-256 of
all that. Layers with a sliding window have positions
[first, n) only. Keys are rotated. The numbers are those that were computed: where another executor or another instruction-set
level goes on from them, it does so within rounding, not bit for bit.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pocketlm.errors import FileError, UsageError, refused
from pocketlm.runtime.atomic import replacing_file
from pocketlm.runtime.hyper import Hyper
from pocketlm.runtime.kv_cache import KVCache, keys_to_words, values_to_words

MAGIC, VERSION = b"pocketlm state\n\0", 3
# magic, version, n, n_layer, n_kv_head, head_dim, bytes of a number, first; the fingerprint
HEADER = struct.Struct("<16s7I32s")
PART = 1 << 20  # bytes read at once
DAMAGED = "load the messages again instead"


@dataclass(frozen=True)
class State:
    """What `check_state` found."""

    ids: list[int]
    itemsize: int  # bytes of a number
    offset: int  # of the first layer's keys
    first: int  # position of layers that have a sliding window


def _identity(model: str, hyper: Hyper) -> bytes:
    """32 bytes: a model's fingerprint, and what it makes of its weights."""
    return hashlib.sha256(f"{model} {hyper}".encode()).digest()


def write_state(path: str | Path, ids: Sequence[int], cache: KVCache, model: str) -> None:
    """Save the first len(ids) positions of a cache, none where it could not go on from there; `model`: its fingerprint.

    The file appears whole or not at all; raises FileError, UsageError as `as_path`.
    """
    ids = ids if cache.goes_on_from(len(ids)) else []
    hyper, itemsize, n, first = cache.hyper, np.dtype(cache.saved).itemsize, len(ids), cache.first if ids else 0
    size = _size(cache, n, first, itemsize)
    counts = n, hyper.n_layer, hyper.n_kv_head, hyper.head_dim, itemsize, first
    header = HEADER.pack(MAGIC, VERSION, *counts, _identity(model, hyper))
    digest = hashlib.sha256()
    with replacing_file(as_path(path), size) as part, open(part, "wb") as file:

        def write(content: bytes) -> None:
            digest.update(content)
            file.write(content)

        write(header)
        write(np.asarray(ids, "<i4").tobytes())
        for layer, start in enumerate(_starts(cache, first)):
            for part in _parts(cache, layer, itemsize):
                x = part.read(layer, start, n)
                numbers, scales = part.keep(x) if part.keep else (x, None)
                write(numbers.astype(part.dtype, copy=False).tobytes())
                if scales is not None:
                    write(scales.astype("<f4", copy=False).tobytes())
        file.write(digest.digest())


def check_state(path: str | Path, cache: KVCache, model: str, by: str = "another model") -> State:
    """Everything about a file that can be wrong for a cache, which stays as it is. Raises FileError; `by` says who saved one
    that is not of this `model`.
    """
    hyper, n_ctx = cache.hyper, cache.n_ctx
    with _opened(path) as file:
        head = file.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise FileError(path, "is not a saved session", "name a file that save() has written")
        _, version, n, *shape, itemsize, first, found = HEADER.unpack(head)
        if version != VERSION:
            raise FileError(path, f"is a saved session of version {version}, not {VERSION}", DAMAGED)
        same = found == _identity(model, hyper) and shape == [hyper.n_layer, hyper.n_kv_head, hyper.head_dim]
        if not same or itemsize not in (2, 4):
            raise FileError(path, f"was saved by {by}", "load it with the model that saved it")
        if n > n_ctx:
            raise FileError(path, f"holds {n} tokens but the context holds {n_ctx}", "use a larger context")
        if first > n:
            raise FileError(path, f"begins behind its end, at {first} of {n} tokens", f"it is damaged; {DAMAGED}")
        expected = _size(cache, n, first, itemsize)
        if (size := as_path(path).stat().st_size) != expected:
            raise FileError(path, f"has {size} bytes instead of {expected}", f"it is damaged; {DAMAGED}")
        content = file.read(4 * n)
        ids, digest, left = np.frombuffer(content, "<i4"), hashlib.sha256(head + content), expected - 32 - file.tell()
        while left > 0 and (part := file.read(min(PART, left))):
            digest.update(part)
            left -= len(part)
        if file.read(32) != digest.digest():
            raise FileError(path, "its checksum does not fit its content", f"it is damaged; {DAMAGED}")
    if n and not 0 <= ids.min() <= ids.max() < hyper.n_vocab:
        raise FileError(path, "holds ids that are not in the vocabulary", f"it is damaged; {DAMAGED}")
    return State(ids.tolist(), itemsize, HEADER.size + 4 * n, first)


def read_state(path: str | Path, state: State, cache: KVCache) -> list[int]:
    """Fill an empty cache with what `check_state` has looked at; the ids. Raises FileError, the cache holds nothing then."""
    n = len(state.ids)
    cache.length, cache.first = 0, state.first
    cache.about_to_write(np.array(state.ids, np.int32))
    with _opened(path) as file:
        file.seek(state.offset)
        for layer, start in enumerate(_starts(cache, state.first)):
            kept = max(start, cache.held(layer))  # the other executor may hold more
            for part in _parts(cache, layer, state.itemsize):
                found = _read(path, file, (part.heads, n - start, part.width), part.dtype)
                if part.keep:
                    with np.errstate(all="ignore"):  # numbers too large together are told of below
                        found = found * _read(path, file, (part.heads, n - start, 1), np.dtype("<f4"))
                if not np.isfinite(found).all():  # weight 0, of positions that nobody sees, does not cancel a NaN
                    raise FileError(path, "holds numbers that are not finite", DAMAGED)
                part.write(layer, kept, found[:, kept - start :])
    cache.length = n
    return state.ids


class _Part(NamedTuple):
    """What a layer keeps of its positions, float32 [heads, n, width], and as which numbers a file has them; `keep` makes these
    where they have scales, and loses nothing of what it has made before.
    """

    read: Callable[[int, int, int], np.ndarray]
    write: Callable[[int, int, np.ndarray], None]
    heads: int
    width: int
    dtype: np.dtype[Any]
    keep: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None

    @property
    def row_bytes(self) -> int:
        return self.heads * (self.width * self.dtype.itemsize + (4 if self.keep else 0))


def _parts(cache: KVCache, layer: int, itemsize: int) -> list[_Part]:
    if layer in cache.convolved:
        return [_Part(cache.read_columns, cache.write_columns, 1, cache.columns[layer], np.dtype("<f4"))]
    of_each = cache.hyper.n_kv_head, cache.hyper.head_dim, np.dtype("<i2" if itemsize == 2 else "<f4")
    keep = (keys_to_words, values_to_words) if itemsize == 2 else (None, None)
    return [
        _Part(cache.read_keys, cache.write_keys, *of_each, keep[0]),
        _Part(cache.read_values, cache.write_values, *of_each, keep[1]),
    ]


def _read(path: object, file: BinaryIO, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> np.ndarray:
    content = file.read(math.prod(shape) * dtype.itemsize)
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise FileError(path, "has become shorter", DAMAGED)
    return np.frombuffer(content, dtype).reshape(shape)


def _starts(cache: KVCache, first: int) -> list[int]:
    """The first position of every layer."""
    return [first if window else 0 for window in cache.windows or [0] * cache.hyper.n_layer]


def _size(cache: KVCache, n: int, first: int, itemsize: int) -> int:
    layers = enumerate(_starts(cache, first))
    parts = [(n - start, part) for layer, start in layers for part in _parts(cache, layer, itemsize)]
    return HEADER.size + 4 * n + sum(rows * part.row_bytes for rows, part in parts) + 32


def as_path(name: Any) -> Path:
    """The path that a text, bytes or a path object names. Raises UsageError for anything else: `open` would take a number for
    a file that is open already, and close it.
    """
    try:
        return Path(os.fsdecode(name))
    except TypeError:
        raise UsageError(f"{name!r:.60} is not the name of a file") from None


def _opened(path: str | Path) -> BinaryIO:
    with refused(path, kinds=(OSError, ValueError)):  # ValueError: a name with a zero byte
        return open(as_path(path), "rb")
