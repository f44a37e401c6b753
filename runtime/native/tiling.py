"""How weights lie in memory: groups of 16 rows tiled, so that a vector's lane serves one row.

In: a tensor's bytes as the file has them, row after row of blocks. Out: the same bytes in another order, exactly
invertible; a last group of fewer than 16 rows is filled up with zeros. Knows blocks, not what they mean.

A block of a format consists of planes (scales, nibbles, high bits, …). A matrix is stored plane by plane; a plane holds,
for every group and every block, its 16 rows' pieces cut into units: [group][block][unit][row] bytes of the unit. Large
planes come first, so that all of them begin at multiples of 64 bytes. The fifth bits of Q5_0 and Q5_1 are cut into units
of half a byte: 16 rows' bits for four columns then are one 64-bit mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROWS = 16  # rows in a group


@dataclass(frozen=True)
class Plane:
    """Bytes [offset, offset + bytes) of every block, cut into units of `unit` bytes (0: half a byte)."""

    name: str
    offset: int
    bytes: int
    unit: int


@dataclass(frozen=True)
class Layout:
    """A format's blocks: weights and bytes in one, and its planes, largest first."""

    block_size: int
    block_bytes: int
    planes: tuple[Plane, ...]

    def plane_offset(self, name: str) -> int:
        """Bytes of the planes before this one, for one row of one block."""
        before = 0
        for plane in self.planes:
            if plane.name == name:
                return before
            before += plane.bytes
        raise KeyError(name)


def _layout(block_size: int, block_bytes: int, *planes: tuple[str, int, int, int]) -> Layout:
    return Layout(block_size, block_bytes, tuple(Plane(*plane) for plane in planes))


LAYOUTS = {
    "F32": _layout(1, 4, ("w", 0, 4, 4)),
    "F16": _layout(1, 2, ("w", 0, 2, 2)),
    "BF16": _layout(1, 2, ("w", 0, 2, 2)),
    "Q8_0": _layout(32, 34, ("q", 2, 32, 4), ("d", 0, 2, 2)),
    "Q4_0": _layout(32, 18, ("q", 2, 16, 4), ("d", 0, 2, 2)),
    "Q4_1": _layout(32, 20, ("q", 4, 16, 4), ("d", 0, 2, 2), ("m", 2, 2, 2)),
    "Q5_0": _layout(32, 22, ("q", 6, 16, 4), ("h", 2, 4, 0), ("d", 0, 2, 2)),
    "Q5_1": _layout(32, 24, ("q", 8, 16, 4), ("h", 4, 4, 0), ("d", 0, 2, 2), ("m", 2, 2, 2)),
    "Q4_K": _layout(256, 144, ("q", 16, 128, 4), ("s", 4, 12, 1), ("d", 0, 2, 2), ("m", 2, 2, 2)),
    "Q5_K": _layout(256, 176, ("q", 48, 128, 4), ("h", 16, 32, 4), ("s", 4, 12, 1), ("d", 0, 2, 2), ("m", 2, 2, 2)),
    "Q6_K": _layout(256, 210, ("q", 0, 128, 4), ("h", 128, 64, 4), ("s", 192, 16, 1), ("d", 208, 2, 2)),
    "Q2_K": _layout(256, 84, ("q", 16, 64, 4), ("s", 0, 16, 1), ("d", 80, 2, 2), ("m", 82, 2, 2)),
    "Q3_K": _layout(256, 110, ("q", 32, 64, 4), ("h", 0, 32, 4), ("s", 96, 12, 1), ("d", 108, 2, 2)),
    "IQ4_NL": _layout(32, 18, ("q", 2, 16, 4), ("d", 0, 2, 2)),
    "IQ4_XS": _layout(256, 136, ("q", 8, 128, 4), ("s", 4, 4, 1), ("h", 2, 2, 2), ("d", 0, 2, 2)),
    "MXFP4": _layout(32, 17, ("q", 1, 16, 4), ("e", 0, 1, 1)),
}


def groups(n_rows: int) -> int:
    return -(-n_rows // ROWS)


def tiled_bytes(name: str, n_rows: int, n_columns: int) -> int:
    """Bytes of a matrix in this layout."""
    layout = LAYOUTS[name]
    return groups(n_rows) * ROWS * (n_columns // layout.block_size) * layout.block_bytes


def tile(name: str, data: np.ndarray, n_rows: int) -> np.ndarray:
    """The reference of the compiled kernel: uint8 (file order) -> uint8 of `tiled_bytes`."""
    layout, n_groups = LAYOUTS[name], groups(n_rows)
    rows = np.zeros((n_groups * ROWS, data.size // n_rows), np.uint8)
    rows[:n_rows] = data.reshape(n_rows, -1)
    blocks = rows.reshape(n_groups, ROWS, -1, layout.block_bytes)
    return np.concatenate([_cut(blocks, plane) for plane in layout.planes])


def _cut(blocks: np.ndarray, plane: Plane) -> np.ndarray:  # [group, row, block, byte] -> bytes of the plane
    piece = blocks[..., plane.offset : plane.offset + plane.bytes]
    if plane.unit:
        return piece.reshape(*piece.shape[:3], -1, plane.unit).transpose(0, 2, 3, 1, 4).reshape(-1)
    halves = np.stack([piece & 15, piece >> 4], -1).reshape(*piece.shape[:3], -1).transpose(0, 2, 3, 1)
    return (halves[..., ::2] | halves[..., 1::2] << 4).reshape(-1)


def restore(name: str, data: np.ndarray, n_rows: int, n_columns: int) -> np.ndarray:
    """The inverse of `tile`: uint8, row after row as the file has them."""
    layout, n_groups, n_blocks = LAYOUTS[name], groups(n_rows), n_columns // LAYOUTS[name].block_size
    blocks = np.empty((n_groups, ROWS, n_blocks, layout.block_bytes), np.uint8)
    start = 0
    for plane in layout.planes:
        piece = data[start : (start := start + n_groups * ROWS * n_blocks * plane.bytes)]
        if plane.unit:
            piece = piece.reshape(n_groups, n_blocks, -1, ROWS, plane.unit).transpose(0, 3, 1, 2, 4)
        else:
            halves = np.stack([piece & 15, piece >> 4], -1).reshape(n_groups, n_blocks, -1, ROWS).transpose(0, 3, 1, 2)
            piece = halves[..., ::2] | halves[..., 1::2] << 4
        blocks[..., plane.offset : plane.offset + plane.bytes] = piece.reshape(n_groups, ROWS, n_blocks, plane.bytes)
    return blocks.reshape(n_groups * ROWS, -1)[:n_rows].reshape(-1)
