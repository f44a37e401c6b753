"""Quantises tensors in pieces, on a few threads, and measures the error.

In: a `CanonicalTensor` and a format. Out: its bytes, in order, and an `Encoded` with its size, checksum and error. One tensor
at a time is in memory as float32. Knows no container.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from pocketlm.errors import FileError
from pocketlm.export.canonical import CanonicalTensor
from pocketlm.export.quantize import quantize
from pocketlm.export.rules import LARGEST
from pocketlm.runtime.formats import FORMATS, Format, dequantize

PIECE = 1 << 20  # weights that a thread quantises at a time; a multiple of every block

Progress = Callable[[str, int], None]  # a tensor's name, weights done since the last call


@dataclass
class Encoded:
    """What was written for one tensor. `error`: relative root mean square error, sqrt(Σ(w - w')² / Σw²)."""

    name: str
    shape: tuple[int, ...]
    format: Format
    reason: str = ""  # why it is in this format and not the one asked for
    n_bytes: int = 0
    crc: int = 0  # CRC-32 of its bytes, to compare with when the file is read back
    error: float = 0.0


class Encoder:
    """Quantises tensors on `n_threads` threads. The end of the `with` block drops work that has not begun."""

    def __init__(self, source: object, n_threads: int, progress: Progress | None = None):
        """`source`: the checkpoint's path, for error messages. `progress` is called for every piece."""
        self._source, self._progress = source, progress or (lambda name, n_weights: None)
        self._n_threads, self._pool = n_threads, ThreadPoolExecutor(n_threads)

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(self, name: str, tensor: CanonicalTensor) -> tuple[np.ndarray, float]:
        """The weights, float32 of the tensor's shape, and their largest magnitude. FileError for NaN or infinity."""
        weights = np.ascontiguousarray(tensor.read(), np.float32)
        assert weights.shape == tuple(tensor.shape), f"{name}: {weights.shape} is not {tensor.shape}"
        largest = max(float(weights.max()), -float(weights.min()))
        if not math.isfinite(largest):
            advice = "the training diverged or the file is damaged"
            raise FileError(self._source, f"tensor {name} holds NaN or infinite weights", advice)
        return weights, largest

    def write(self, file: BinaryIO, name: str, tensor: CanonicalTensor, format: Format, advice: str) -> Encoded:
        """Write a tensor in a format of floats. FileError with `advice` for weights too large for it, NaN or infinity."""
        weights, largest = self.read(name, tensor)
        if largest > LARGEST[format.name]:
            kind = format.name.lower().replace("f", "float")
            raise FileError(self._source, f"tensor {name} has weights up to {largest:.3g}, too large for {kind}", advice)
        encoded = Encoded(name, tuple(tensor.shape), format)
        file.writelines(self.pieces(encoded, weights))
        return encoded

    def pieces(self, encoded: Encoded, weights: np.ndarray, importance: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """The bytes of `weights` in `encoded.format`, uint8, in order; fills in size, checksum and error of `encoded`.

        `importance`: float32 [columns], or [experts, columns]: how much the squared errors of a column count. None, or a row of
        zeros: all count the same.
        """
        format, columns = encoded.format, weights.shape[-1] if weights.ndim else 1
        rows = np.zeros((1, columns), np.float32) if importance is None else importance.reshape(-1, columns)
        matrices = weights.reshape(len(rows), -1)

        def work(place: tuple[int, int]) -> tuple[np.ndarray, float, float]:
            number, start = place
            mine, row = matrices[number, start : start + PIECE], rows[number]
            counts = row[np.arange(start, start + mine.size) % columns] if row.any() else None
            data = quantize(format.name, mine, counts)
            if format is FORMATS["F32"]:
                return data, 0.0, 0.0
            back = np.empty_like(mine)
            dequantize(format, data, back)
            back -= mine
            return data, float(np.dot(back, back)), float(np.dot(mine, mine))

        squared_error = squares = 0.0
        places = ((i, start) for i in range(len(matrices)) for start in range(0, matrices.shape[1], PIECE))
        for data, error, square in self._in_order(work, places):
            squared_error, squares = squared_error + error, squares + square
            encoded.n_bytes, encoded.crc = encoded.n_bytes + data.nbytes, zlib.crc32(data, encoded.crc)
            yield data
            self._progress(encoded.name, data.nbytes // format.block_bytes * format.block_size)
        encoded.error = math.sqrt(squared_error / squares) if squares else 0.0

    def _in_order(self, work: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[Any]:
        """The results of `work`, in order. Only a few are computed in advance, which bounds the memory."""
        ahead: deque[Future[Any]] = deque()
        for argument in arguments:
            ahead.append(self._pool.submit(work, argument))
            if len(ahead) > 2 * self._n_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
