"""Products with AMX: the same bits as those without, for every format, shape and number of tokens."""

from __future__ import annotations

import numpy as np
import pytest
from native_calls import activation_records, aligned_copy, each_format, executors, random_blocks, runs_here
from plain_calls import plain_function

from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.native import kernels
from pocketlm.runtime.native.levels import LEVELS
from pocketlm.runtime.native.sizes import tiles
from pocketlm.runtime.native.tiling import groups, tile

AMX, VNNI = LEVELS["amx"], LEVELS["avx512-vnni"]
pytestmark = pytest.mark.skipif(not runs_here(AMX), reason="this CPU lacks AMX, or its system does not give it")


def product(level, fmt: str, w: np.ndarray, n_rows: int, n_blocks: int, x: np.ndarray) -> np.ndarray:
    """float32 [tokens, rows]."""
    tokens, n_groups = len(x), groups(n_rows)
    y = np.full((tokens, 16 * n_groups), np.nan, np.float32)
    function = plain_function(kernels.loaded(fmt, level).address(f"{fmt}_product{tokens}"), 8)
    records = activation_records(x)
    function(w.ctypes.data, n_groups, 0, n_groups, n_blocks, records.ctypes.data, y.ctypes.data, y.strides[0])
    return y[:, :n_rows]


@each_format
@pytest.mark.parametrize("wild", [False, True], ids=["", "wild scales"])
def test_products_have_the_same_bits(fmt, wild):
    random, size = np.random.default_rng(3), FORMATS[fmt].block_size
    for n_rows, n_blocks in [(1, 1), (16, 2), (21, 3), (40, 7), (33, 18), (64, 25), (48, 48), (16, 49)]:
        n_columns = n_blocks * size if size > 1 else n_blocks * 32
        w = aligned_copy(tile(fmt, random_blocks(fmt, n_rows, n_columns, random, wild), n_rows))
        x = random.standard_normal((16, n_columns)).astype(np.float32)
        x *= np.exp2(random.integers(-20, 20, (16, n_columns // 32))).astype(np.float32).repeat(32, 1)
        x[3], x[5, :32] = 0, 0
        expected = np.vstack([product(VNNI, fmt, w, n_rows, n_columns // size, row[None]) for row in x])
        assert np.isfinite(expected).all()
        for tokens in tiles(AMX.name):
            own = product(AMX, fmt, w, n_rows, n_columns // size, x[:tokens])
            assert own.tobytes() == expected[:tokens].tobytes(), f"{n_rows} rows, {n_blocks} blocks, {tokens} tokens"


@each_format
def test_the_largest_integers_have_the_same_bits(fmt):
    size = FORMATS[fmt].block_size
    n_rows, n_columns = 16, max(size, 32) * 3
    for weight in (0x00, 0xFF, 0x80, 0x7F, 0x88):
        blocks = np.full(n_rows * n_columns // size * FORMATS[fmt].block_bytes, weight, np.uint8)
        if fmt == "F32":
            blocks = np.full(n_rows * n_columns, 1e30, np.float32).view(np.uint8)
        w = aligned_copy(tile(fmt, blocks, n_rows))
        x = np.full((16, n_columns), 1.0, np.float32) * np.where(np.arange(16) % 2, -1, 1)[:, None].astype(np.float32)
        expected = np.vstack([product(VNNI, fmt, w, n_rows, n_columns // size, row[None]) for row in x])
        for tokens in (8, 16):
            own = product(AMX, fmt, w, n_rows, n_columns // size, x[:tokens])
            np.testing.assert_array_equal(own, expected[:tokens])  # NaN for NaN: scales are whatever the bytes say


@each_format
def test_a_model_has_the_same_bits(fmt):
    ids, found = np.random.default_rng(7).integers(0, 64, 60), list[bytes]()
    for level in (AMX, VNNI):
        native, reference = executors(level, fmt, 2, n_vocab=64, n_ctx=64)
        for n in (60, 41, 25, 16, 9):
            native.cache.truncate(0)
            found.append(native.forward(ids[:n], rows="all").tobytes())
        assert native.arithmetic == "native avx512-vnni"
        native.close()
        reference.close()
    assert found[:5] == found[5:]
