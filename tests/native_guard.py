"""Calls every weight kernel with its buffers against memory that nobody may touch. Run as a program: LEVEL [LEVEL …].

Prints a line of JSON a level, format and kernel: {"case", "shapes", "trials", "rounded", "exact"}, the NMSE of all trials
to NumPy doing the same rounding and to float64. A kernel that reads or writes a byte too far ends the program; stderr
names the case.
"""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import json
import mmap
import sys
from collections import defaultdict

import numpy as np
from native_calls import FORMAT_NAMES, activation_records, random_blocks, rounded, runs_here, weights
from plain_calls import plain_function

from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.native import amx, kernels
from pocketlm.runtime.native.levels import LEVELS, Level
from pocketlm.runtime.native.sizes import ALL_TILES, tiles
from pocketlm.runtime.native.tiling import groups, restore, tile, tiled_bytes

SHAPES = 200


def _forbid(address: int, size: int) -> None:
    """Take all rights from pages."""
    if sys.platform == "win32":
        protect = ctypes.windll.kernel32.VirtualProtect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_void_p]
        assert protect(address, size, 1, ctypes.byref(ctypes.c_uint32())), ctypes.GetLastError()  # 1: PAGE_NOACCESS
    else:
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        assert protect(address, size, 0) == 0, ctypes.get_errno()


class Guarded:
    """A region of memory between two pages without any rights."""

    def __init__(self, size: int = 1 << 20):
        self._map = mmap.mmap(-1, size + 2 * mmap.PAGESIZE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + mmap.PAGESIZE
        self.stop = self.start + size
        for page in (self.start - mmap.PAGESIZE, self.stop):
            _forbid(page, mmap.PAGESIZE)

    def place(self, data: np.ndarray, at_end: bool, align: int) -> np.ndarray:
        """A copy right behind the first guard, or as close to the second as the alignment allows."""
        size = data.nbytes
        address = (self.stop - size) // align * align if at_end else self.start
        assert address >= self.start
        view = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        view[:] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        return view


def shape(fmt: str, random: np.random.Generator, most: int = 120, columns: int = 192) -> tuple[int, int, int]:
    """Rows, columns, and columns filled up to what activations need."""
    size = FORMATS[fmt].block_size
    n_columns = int(random.integers(1, 100)) if size == 1 else size * int(random.integers(1, max(2, columns // size) + 1))
    return int(random.integers(1, most)), n_columns, -(-n_columns // 32) * 32


class Score:
    """Trials of a kernel: results against what is expected, in units of what random weights and activations give."""

    def __init__(self) -> None:
        self.trials, self.errors, self.squares = 0, np.zeros(2), np.zeros(2)

    def add(self, result: np.ndarray, rounded: np.ndarray, exact: np.ndarray, unit: np.ndarray) -> None:
        self.trials += len(result)
        for i, expected in enumerate((rounded, exact)):
            self.errors[i] += (((result - expected) / unit) ** 2).sum()
            self.squares[i] += ((expected / unit) ** 2).sum()

    def report(self, case: str) -> None:
        rounded, exact = self.errors / self.squares
        print(
            json.dumps({"case": case, "shapes": SHAPES, "trials": self.trials, "rounded": rounded, "exact": exact}), flush=True
        )


def products(levels: list[Level], fmt: str, tokens: int) -> None:
    name = f"product{tokens}"
    kernel = {level.name: plain_function(kernels.loaded(fmt, level).address(f"{fmt}_{name}"), 8) for level in levels}
    random, memory, scores = (
        np.random.default_rng([tokens, FORMATS[fmt].gguf_type]),
        [Guarded() for _ in range(3)],
        defaultdict(Score),
    )
    for _ in range(SHAPES):
        n_rows, n_columns, n = shape(fmt, random, 400 // tokens, 2 * amx.COLUMNS + 64 if tokens == amx.TOKENS else 192)
        blocks = random_blocks(fmt, n_rows, n_columns, random, wild=True)
        matrix = weights(fmt, blocks, n_rows).astype(np.float64)
        x = np.zeros((tokens, n), np.float32)
        x[:, :n_columns] = random.standard_normal((tokens, n_columns)) * np.exp2(random.integers(-20, 20, (tokens, 1)))
        first = int(random.integers(0, groups(n_rows)))
        last = int(random.integers(first + 1, groups(n_rows) + 1))
        rows = slice(first * 16, min(last * 16, n_rows))
        exact = x[:, :n_columns].astype(np.float64) @ matrix[rows].T
        unit = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(matrix[rows], axis=1) / np.sqrt(n_columns)
        unit = np.maximum(unit, 1e-30)  # a scale may be too small for a half: then the row is zero
        y_stride = (last - first) * 64 + 64 * int(random.integers(0, 3))
        floats = fmt in ("F32", "F16", "BF16")
        used = ((tokens - 1) * n + n_columns) * 4 if floats else None  # memory ends where what the kernel may read ends
        same = exact if floats else rounded(x) @ matrix[rows].T
        w, n_blocks = tile(fmt, blocks, n_rows), n_columns // FORMATS[fmt].block_size
        canary = np.full((tokens - 1) * y_stride + (last - first) * 64, 0xAA, np.uint8)
        for at_end, level in itertools.product((False, True), levels):
            prepared = activation_records(level.name, x)[:used]
            place = [m.place(a, at_end, k) for m, a, k in zip(memory, (w, prepared, canary), (32, 4, 4), strict=True)]
            addresses = [view.ctypes.data for view in place]
            kernel[level.name](
                addresses[0], groups(n_rows), first, last, n_blocks, addresses[1], addresses[2], y_stride
            )
            for t in range(tokens):
                result = place[2][t * y_stride :][: (last - first) * 64].view(np.float32)[: rows.stop - rows.start]
                scores[level.name].add(result, same[t], exact[t], unit[t])
    for level in levels:
        scores[level.name].report(f"{level.name} {fmt} {name}")


def table(levels: list[Level], fmt: str) -> None:
    """The embedding's kernel, and the one that tiles: what it writes is what the other reads."""
    codes = [kernels.loaded(fmt, level) for level in levels]
    kernel = {
        level.name: (
            plain_function(code.address(f"{fmt}_row"), 5),
            code.function(f"{fmt}_tile", None, *[ctypes.c_int64] * 7),
        )
        for level, code in zip(levels, codes, strict=True)
    }
    random, memory, scores = np.random.default_rng(FORMATS[fmt].gguf_type), [Guarded() for _ in range(3)], defaultdict(Score)
    for _ in range(SHAPES):
        n_rows, n_columns, _ = shape(fmt, random)
        blocks = random_blocks(fmt, n_rows, n_columns, random, wild=True)
        matrix, expected, n_blocks = (
            weights(fmt, blocks, n_rows),
            tile(fmt, blocks, n_rows),
            n_columns // FORMATS[fmt].block_size,
        )
        assert (restore(fmt, expected, n_rows, n_columns) == blocks).all(), f"{fmt} {n_rows} x {n_columns} is not restored"
        middle, some = int(random.integers(0, groups(n_rows) + 1)), {0, n_rows - 1, *random.integers(0, n_rows, 3).tolist()}
        for at_end, level in itertools.product((False, True), levels):
            look_up, permute = kernel[level.name]
            source = memory[0].place(blocks, at_end, 2)
            w = memory[1].place(np.full(tiled_bytes(fmt, n_rows, n_columns), 0xAA, np.uint8), at_end, 32)
            for part in ((0, middle), (middle, groups(n_rows))):
                permute(source.ctypes.data, w.ctypes.data, n_rows, groups(n_rows), n_blocks, *part)
            assert (w == expected).all(), f"{level.name} {fmt} {n_rows} x {n_columns} is tiled in another way"
            for row in some:
                out = memory[2].place(np.full(4 * n_columns, 0xAA, np.uint8), at_end, 4)
                look_up(w.ctypes.data, groups(n_rows), n_blocks, row, out.ctypes.data)
                scores[level.name].add(out.view(np.float32), matrix[row], matrix[row], np.linalg.norm(matrix[row]) + 1e-30)
    for level in levels:
        scores[level.name].report(f"{level.name} {fmt} row")


def main(levels: list[Level]) -> None:
    faulthandler.enable()
    assert all(runs_here(level) for level in levels)  # which asks the system for AMX
    for fmt in FORMAT_NAMES:
        print(fmt, file=sys.stderr, flush=True)
        for tokens in ALL_TILES:
            products([level for level in levels if tokens in tiles(level.name)], fmt, tokens)
        table(levels, fmt)


if __name__ == "__main__":
    main([LEVELS[name] for name in sys.argv[1:]])
