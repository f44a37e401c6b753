"""Products with every weight format are what NumPy computes with the same rounding, and touch no byte that is not theirs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from native_calls import (
    LEVELS_HERE,
    activation_records,
    aligned_copy,
    compiled,
    each_format,
    each_level,
    random_blocks,
    rounded,
    runs_here,
    weights,
)
from plain_calls import plain_function

from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.native import kernels
from pocketlm.runtime.native.dequantize import RUNS
from pocketlm.runtime.native.ir import Module
from pocketlm.runtime.native.levels import LEVELS
from pocketlm.runtime.native.matrix import define
from pocketlm.runtime.native.sizes import tiles
from pocketlm.runtime.native.tiling import tile
from pocketlm.runtime.tensor import HALF_SCALES

# a level's kernels, each with the reason why the level may not run here
CASES = [
    pytest.param(level, case, id=f"{level.name}-{case}", marks=marks)
    for (level,), marks, _ in LEVELS_HERE
    for case in (*(f"product{tokens}" for tokens in tiles(level.name)), "row")
]


@pytest.fixture(scope="module")
def guarded():
    """What native_guard.py reports, for all levels that run here: (level, format, kernel) -> a record."""
    names = [level.name for level in LEVELS.values() if runs_here(level)]
    program = [sys.executable, Path(__file__).with_name("native_guard.py"), *names]
    done = subprocess.run(program, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"ended with status {done.returncode} in {done.stderr[-2000:]}"
    return {record["case"]: record for record in map(json.loads, done.stdout.splitlines())}


@each_format
@pytest.mark.parametrize(("level", "case"), CASES)
def test_kernels_agree_with_numpy_between_guard_pages(guarded, level, fmt, case):
    record = guarded[f"{level.name} {fmt} {case}"]
    assert record["shapes"] >= 200
    assert record["trials"] >= 20_000
    assert record["rounded"] <= (0 if case == "row" else 1e-10)
    assert record["exact"] <= (0 if case == "row" else 1e-7)


@each_level
@pytest.mark.parametrize("fmt", sorted(fmt for fmt, scales in HALF_SCALES.items() if scales))
@pytest.mark.parametrize("bits", [0x7E00, 0xFE01, 0x7C00, 0xFC00], ids=["NaN", "-NaN", "inf", "-inf"])
def test_a_scale_that_is_no_number_spoils_its_row_only(level, fmt, bits):
    random, n_rows, n_columns, bad = np.random.default_rng(5), 21, 256, 17
    blocks = random_blocks(fmt, n_rows, n_columns, random).reshape(n_rows, -1)
    for at in HALF_SCALES[fmt]:
        blocks[bad, at : at + 2] = np.array([bits], np.uint16).view(np.uint8)
    w = aligned_copy(tile(fmt, blocks.reshape(-1), n_rows))
    x, y = random.standard_normal((1, n_columns)).astype(np.float32), np.zeros(32, np.float32)
    records = activation_records(level.name, x)
    product = plain_function(kernels.loaded(fmt, level).address(f"{fmt}_product1"), 8)
    n_blocks = n_columns // FORMATS[fmt].block_size
    product(w.ctypes.data, 2, 0, 2, n_blocks, records.ctypes.data, y.ctypes.data, 0)
    assert not np.isfinite(y[bad])
    assert np.isfinite(np.delete(y, bad)).all()


@each_level
@pytest.mark.parametrize("fmt", sorted(RUNS))
def test_the_largest_products_do_not_overflow(level, fmt):
    """Every weight at the end of its range, every activation too: the sums in 16 and in 32 bits are as large as they can be."""
    n_rows, n_columns = 16, 512
    x = np.full((1, n_columns), 1.0, np.float32)
    form = FORMATS[fmt]
    for weight, sign in ((0x00, 1), (0xFF, 1), (0x80, 1), (0x7F, -1), (0x88, -1)):
        blocks = np.full((n_rows, n_columns // form.block_size, form.block_bytes), weight, np.uint8)
        for at in HALF_SCALES[fmt]:
            blocks[..., at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
        if fmt == "MXFP4":
            blocks[..., 0] = 120  # its scale is 2^-8
        expected = rounded(sign * x) @ weights(fmt, blocks.reshape(-1), n_rows).astype(np.float64).T
        w, y = aligned_copy(tile(fmt, blocks.reshape(-1), n_rows)), np.zeros(16, np.float32)
        product = plain_function(kernels.loaded(fmt, level).address(f"{fmt}_product1"), 8)
        records = activation_records(level.name, sign * x)
        product(w.ctypes.data, 1, 0, 1, n_columns // form.block_size, records.ctypes.data, y.ctypes.data, 0)
        np.testing.assert_allclose(y, expected[0], rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_every_level_compiles_into_an_image_without_libraries(level):
    module = Module()
    for fmt in ("F16", "Q8_0", "Q5_1"):
        define(module, level.name, fmt)
    assert f"Q8_0_product{tiles(level.name)[-1]}" in compiled(module, level).symbols
