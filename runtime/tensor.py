"""A weight matrix, or vector, as it lies in a model file: its bytes, their format, how they become numbers, and whether any of
these is NaN, which is found before it is computed with.

Knows no file format: readers of GGUF files and of fp16 bins make these, executors compute with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketlm.errors import FileError, quoted
from pocketlm.runtime.formats import FORMATS, Format, dequantize

# Only the scales of a block can be NaN or infinite: they are a small part of a file, so looking at all of them takes
# milliseconds. Where a block's half-precision scales begin, in bytes; every other byte holds integers
HALF_SCALES = {
    "F16": (0,), "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "MXFP4": (),  # its scale is a power of two in the first byte
}  # fmt: skip
EXPONENTS = {"F32": (np.uint32, 0x7F800000), "BF16": (np.uint16, 0x7F80)}  # all bits set: NaN or infinite


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


def check_finite(tensor: Tensor, part: slice = slice(None)) -> None:
    """Raises FileError if any weight of the tensor is NaN or infinite, or if its format cannot be run.

    `part`: bytes of it, whole blocks, that are to be looked at.
    """
    if tensor.tiled:  # was checked before it was tiled
        return
    data = tensor.data[part]
    name = tensor.format.name
    if name in EXPONENTS:
        dtype, exponent = EXPONENTS[name]
        finite = not ((data.view(dtype) & exponent) == exponent).any()
    else:
        if name not in HALF_SCALES:
            tensor.to_float32()  # raises the error that names the format
        blocks = data.reshape(-1, tensor.format.block_bytes)
        finite = not any((blocks[:, at + 1] & 0x7C == 0x7C).any() for at in HALF_SCALES[name])  # bits 2 to 6: the exponent
        if name == "MXFP4":  # 2^125 times the largest step is beyond float32; 255 means NaN
            finite = not (blocks[:, 0] > 252).any()
    if not finite:
        raise FileError(
            tensor.path, f"tensor {tensor.name} holds NaN or infinite weights", "the model was damaged in training or export"
        )
