"""TiledMatrix weights: every byte of the file stands where the layout says, comes back, and the kernel agrees."""

import ctypes

import numpy as np
import pytest
from native_calls import aligned_copy, each_format, host_level, random_blocks

from pocketlm.runtime.native import kernels
from pocketlm.runtime.native.tiling import LAYOUTS, ROWS, groups, restore, tile, tiled_bytes

ROW_COUNTS = (1, 2, 15, 16, 17, 31, 33, 47, 64, 100)


def by_definition(fmt, data, n_rows, n_blocks):
    """[group][block][unit][row], plane after plane, one half byte at a time."""
    layout, halves = LAYOUTS[fmt], []
    data = data.reshape(n_rows, n_blocks, layout.block_bytes)
    for plane in layout.planes:
        size = 2 * plane.unit or 1  # half bytes in a unit
        for group in range(groups(n_rows)):
            for block in range(n_blocks):
                for unit in range(2 * plane.bytes // size):
                    for row in range(group * ROWS, group * ROWS + ROWS):
                        for half in range(unit * size, unit * size + size):
                            byte = int(data[row, block, plane.offset + half // 2]) if row < n_rows else 0
                            halves.append(byte >> 4 if half % 2 else byte & 15)
    return np.array(halves[::2], np.uint8) | np.array(halves[1::2], np.uint8) << 4


def test_the_names_say_where_every_byte_goes():
    random = np.random.default_rng(0)
    shapes = (
        (17, 3), (3, 2), (16, 1), (33, 2), (5, 1), (18, 2), (20, 2), (7, 3), (2, 1), (17, 1), (1, 2), (3, 2), (18, 1), (16, 3),
        (5, 2), (33, 1),
    )  # fmt: skip
    for fmt, (n_rows, n_blocks) in zip(LAYOUTS, shapes, strict=True):
        data = random.integers(0, 256, n_rows * n_blocks * LAYOUTS[fmt].block_bytes, dtype=np.uint8)
        assert (tile(fmt, data, n_rows) == by_definition(fmt, data, n_rows, n_blocks)).all(), fmt


@each_format
@pytest.mark.parametrize("n_rows", ROW_COUNTS)
def test_tiling_is_undone_and_done_by_the_kernel(fmt, n_rows):
    layout = LAYOUTS[fmt]
    for n_blocks in (1, 2, 5):
        n_columns = n_blocks * layout.block_size
        data = aligned_copy(random_blocks(fmt, n_rows, n_columns, np.random.default_rng(n_rows)))
        expected = tile(fmt, data, n_rows)
        assert expected.size == tiled_bytes(fmt, n_rows, n_columns)
        assert (restore(fmt, expected, n_rows, n_columns) == data).all()
        result = np.full(expected.size, 0xAA, np.uint8)
        permute = kernels.loaded(fmt, host_level()).function(f"{fmt}_tile", None, *[ctypes.c_int64] * 7)
        for group in range(groups(n_rows)):  # as threads do: parts of the groups
            permute(data.ctypes.data, result.ctypes.data, n_rows, groups(n_rows), n_blocks, group, group + 1)
        assert (result == expected).all()


@each_format
def test_planes_cover_the_block_and_begin_where_vectors_may(fmt):
    layout = LAYOUTS[fmt]
    covered = sorted(at for plane in layout.planes for at in range(plane.offset, plane.offset + plane.bytes))
    assert covered == list(range(layout.block_bytes))
    assert all(ROWS * layout.plane_offset(plane.name) % 32 == 0 for plane in layout.planes)
