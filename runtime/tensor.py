"""A weight matrix, or vector, as it lies in a model file: its bytes, their format, and how they become numbers.

Knows no file format: readers of GGUF files and of fp16 bins make these, executors compute with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketlm.errors import FileError, quoted
from pocketlm.runtime.formats import FORMATS, Format, dequantize


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor of a file.

    `shape` is in NumPy's order (rows, columns): the file's dimensions reversed. `data` are its bytes, uint8, 1-D, a
    read-only view of the mapping; `offset` is where they begin in the file. `tiled`: the bytes are in the order of
    native/tiling.py, which only files inside packed executables have.
    """

    name: str
    shape: tuple[int, ...]
    format: Format
    data: np.ndarray
    offset: int
    path: Path
    tiled: bool = False

    def to_float32(self, out: np.ndarray | None = None) -> np.ndarray:
        """The weights, float32, of `shape`; written to `out` (float32, C-contiguous, of `shape`) where it is given.

        Raises FileError where pocketlm does not run the format.
        """
        if self.format.dequantize is None:
            runs = ", ".join(row.name for row in FORMATS.values() if row.dequantize)
            problem = f"tensor '{quoted(self.name)}' is {self.format.name}, which pocketlm does not run"
            raise FileError(self.path, problem, f"requantise the model to one of {runs}")
        out = np.empty(self.shape, np.float32) if out is None else out
        dequantize(self.format, self._rows(), out)
        return out

    def part(self, number: int) -> Tensor:
        """One of the matrices of a tensor of three dimensions."""
        n_bytes = self.data.nbytes // self.shape[0]
        data = self.data[number * n_bytes : (number + 1) * n_bytes]
        return Tensor(self.name, self.shape[1:], self.format, data, self.offset + number * n_bytes, self.path)

    def sample(self) -> bytes:
        """At most 64 of the bytes, by which two tensors are told apart; the same whether the matrix is tiled or not.

        Of a matrix the first unit of its largest plane in 16 rows at its middle: they lie side by side in a tiled one (see
        native/tiling.py), and each at the beginning of its row in others.
        """
        from pocketlm.runtime.native.tiling import LAYOUTS, ROWS

        layout = LAYOUTS.get(self.format.name)
        if len(self.shape) != 2 or layout is None:
            return self.data[:64].tobytes()
        n_rows, n_columns = self.shape
        plane, n_blocks = layout.planes[0], n_columns // layout.block_size
        first = n_rows // ROWS // 2 * ROWS
        rows = min(ROWS, n_rows - first)
        if self.tiled:
            start = first * n_blocks * plane.bytes
            return self.data[start : start + rows * plane.unit].tobytes()
        starts = np.arange(first, first + rows) * (n_blocks * layout.block_bytes) + plane.offset
        return self.data[starts[:, None] + np.arange(plane.unit)].tobytes()

    def _rows(self) -> np.ndarray:
        """The bytes row after row."""
        if not self.tiled:
            return self.data
        from pocketlm.runtime.native.tiling import restore

        return restore(self.format.name, self.data, *self.shape)
