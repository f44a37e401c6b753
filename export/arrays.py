"""Tensors of a checkpoint that are read on demand: a place in a mapped file, a number format, a shape and strides.

In: bytes of a mapped file. Out: float32 arrays. Every reader of a container makes these, so all checks of ranges are here.
Knows no container and no names of layers.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.errors import FileError, quoted

Buffer = Any  # mmap.mmap or bytes
MAX_DIMS = 8


def _bfloat16(values: np.ndarray) -> np.ndarray:  # uint16: the upper half of a float32
    wide = values.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def _float8(n_exponent: int, bias: int, finite: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Decoder of an 8-bit float (arXiv:2209.05433): all 256 values in a table. `finite`: no infinities, one NaN (e4m3fn)."""
    n_mantissa = 7 - n_exponent
    table = np.empty(256, np.float32)
    for code in range(128):
        exponent, mantissa = code >> n_mantissa, (code & ((1 << n_mantissa) - 1)) / (1 << n_mantissa)
        value = math.ldexp(1 + mantissa, exponent - bias) if exponent else math.ldexp(mantissa, 1 - bias)
        if finite and code == 127:
            value = math.nan
        elif not finite and exponent == (1 << n_exponent) - 1:
            value = math.nan if mantissa else math.inf
        table[code], table[code + 128] = value, -value
    return table.__getitem__


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # float64 beyond float32's range becomes infinite, which the writers report
        return values.astype(np.float32)


# name → how NumPy sees the bytes (little-endian), how they become float32
DTYPES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "float64": ("<f8", _float32),
    "float32": ("<f4", _float32),
    "float16": ("<f2", _float32),
    "bfloat16": ("<u2", _bfloat16),
    "float8_e4m3fn": ("|u1", _float8(4, 7, finite=True)),
    "float8_e5m2": ("|u1", _float8(5, 15, finite=False)),
    "int64": ("<i8", _float32),
    "int32": ("<i4", _float32),
    "int16": ("<i2", _float32),
    "int8": ("|i1", _float32),
    "uint64": ("<u8", _float32),
    "uint32": ("<u4", _float32),
    "uint16": ("<u2", _float32),
    "uint8": ("|u1", _float32),
    "bool": ("|b1", _float32),
}


def bytes_each(dtype: str) -> int:
    """How many bytes a number of a type of DTYPES has."""
    return np.dtype(DTYPES[dtype][0]).itemsize


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a checkpoint. `read` gives float32 of `shape`, C-contiguous, a new array every time.

    `dtype` is a name of `DTYPES`. Two tensors with equal `source` have equal values: they are the same view of a file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    source: Any = None


@dataclass(eq=False)
class Storage:
    """A run of bytes of a mapped file that tensors are views of. `check` is called before every read (checksums)."""

    buffer: Buffer
    start: int
    n_bytes: int
    check: Callable[[], None] = lambda: None


def view(
    path: Path, storage: Storage, dtype: str, shape: Sequence[int], strides: Sequence[int] | None = None, offset: int = 0,
    big_endian: bool = False,
) -> LazyTensor:  # fmt: skip
    """A tensor without a name: `shape`, `strides` and `offset` in `storage`, counted in items. `strides` None: C-contiguous.

    Raises FileError if the dtype is unknown or any item lies outside the storage.
    """
    if dtype not in DTYPES:
        raise FileError(
            path, f"holds a tensor of type {quoted(dtype)}, which pocketlm does not read", "save it as float32 or bfloat16"
        )
    numbers = [*shape, *(strides or ()), offset]
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62 for n in numbers)
    if not whole or len(shape) > MAX_DIMS or (strides is not None and len(strides) != len(shape)):
        raise FileError(path, "a tensor has an impossible shape, stride or offset", "the file is damaged")
    shape = tuple(shape)
    if strides is None:
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    code, decode = DTYPES[dtype]
    numpy_type = np.dtype(code).newbyteorder(">") if big_endian else np.dtype(code)
    size = math.prod(shape)
    span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if size else 0
    if (offset + span) * numpy_type.itemsize > storage.n_bytes:
        problem = f"a tensor of shape {'x'.join(map(str, shape))} reaches beyond its storage"
        raise FileError(path, problem, "the file is damaged or cut short")

    def read() -> np.ndarray:
        if size > max(span, 1 << 16):
            raise FileError(path, f"a tensor repeats {span} values to {size}", "save it with .contiguous()")
        storage.check()
        if not size:
            return np.empty(shape, np.float32)
        first = storage.start + offset * numpy_type.itemsize
        items = np.frombuffer(storage.buffer, numpy_type, span, first)
        strided = np.lib.stride_tricks.as_strided(items, shape, [s * numpy_type.itemsize for s in strides], writeable=False)
        values = np.ascontiguousarray(decode(strided))
        forget(storage.buffer, first, span * numpy_type.itemsize)
        return values.reshape(shape)

    return LazyTensor("", shape, dtype, read, (storage, offset, dtype, tuple(strides)))


def forget(buffer: Buffer, start: int, n_bytes: int) -> None:
    """Give pages of a mapping back to the system; until then they count as this process's memory."""
    if isinstance(buffer, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        buffer.madvise(mmap.MADV_DONTNEED, first, start + n_bytes - first)
