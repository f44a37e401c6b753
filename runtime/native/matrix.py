"""Kernels over a matrix's tiled rows: product with one token or a block of them, one row of a table, tiling.

In: a format and a level. Out: functions of a module, each an address that the run loop calls. Knows formats and
layouts, not operations.

Activations of one token of n columns (n a multiple of 32), all offsets in bytes from the token's pointer:
    0       float32 [n]     the values
    4n      int16 [n]       the values rounded to 16 bits, with one scale for 32 of them
    6n      [n / 32] times  low bytes of the rounded values, int8 [32]; their high bytes, int8 [32]; then float32: the
                            scale, scale times the sum of the 32, of the first 16, of the last 16
The sums serve the formats' offsets and zero points. What a product needs of 32 columns is together, so that one pointer a
token and constant offsets find it: every other way of addressing splits the processor's multiply-and-load instructions.
"""

from __future__ import annotations

from pocketlm.runtime.native.dequantize import FLOAT_TYPES, FLOATS, RUNS, Run
from pocketlm.runtime.native.dot import SIGNED_ZERO, Activations, Words, dot
from pocketlm.runtime.native.ir import F32, I8, I16, I32, I64, PTR, Function, Module, Value
from pocketlm.runtime.native.sizes import RECORD, TILE
from pocketlm.runtime.native.tiling import LAYOUTS, ROWS

AHEAD = 4096  # bytes of weights fetched ahead of a single token's product: 10 to 15 % on a 2.5 GHz Xeon, best from 3 to 6 KB
ROW = F32.vec(ROWS)
PRODUCT = {
    "w": PTR,
    "n_groups": I64,
    "first": I64,
    "last": I64,
    "n_blocks": I64,
    "x": PTR,
    "x_stride": I64,
    "y": PTR,
    "y_stride": I64,
}
LOOKUP = {"w": PTR, "n_groups": I64, "n_blocks": I64, "row": I64, "out": PTR}
TILE_ROWS = {"source": PTR, "to": PTR, "n_rows": I64, "n_groups": I64, "n_blocks": I64, "first": I64, "last": I64}


def define(module: Module, level: str, fmt: str) -> None:
    """Define FMT_product1, FMT_productN (N = TILE), FMT_row and FMT_tile."""
    for tokens in (1, TILE):
        with module.function(f"{fmt}_product{tokens}", PRODUCT, linkage="kernel") as f:
            (_integer_product if fmt in RUNS else _float_product)(f, level, fmt, tokens)
    with module.function(f"{fmt}_row", LOOKUP, linkage="kernel") as f:
        (_integer_row if fmt in RUNS else _float_row)(f, level, fmt)
    with module.function(f"{fmt}_tile", TILE_ROWS, linkage="entry") as f:
        _tile(f, fmt)


def _planes(f: Function, fmt: str, w: Value, n_groups: Value, n_blocks: Value, index: Value) -> dict[str, Value]:
    """Where the planes of block number `index` (group · n_blocks + block) begin."""
    layout, rows = LAYOUTS[fmt], n_groups * n_blocks * ROWS
    return {p.name: f.opaque(w + rows * layout.plane_offset(p.name) + index * (ROWS * p.bytes)) for p in layout.planes}


def _integer_product(f: Function, level: str, fmt: str, tokens: int) -> None:
    w, n_groups, first, last, n_blocks, x, x_stride, y, y_stride = f.args()
    size = LAYOUTS[fmt].block_size
    n = n_blocks * size
    xs = [x + x_stride * t for t in range(tokens)]
    with f.range(first, last) as g:
        totals = [f.var(ROW, 0.0) for _ in xs]
        with f.range(0, n_blocks) as b:

            def add(run: Run, b: Value = b) -> None:
                column, offset, words = b * size + run.column, *_unsigned(level, run)
                for token, total in zip(xs, totals, strict=True):
                    record = f.opaque(token + n * 6 + (column >> 5) * RECORD)
                    low = record + (column & 31)
                    here = Activations(low, low + 32, token + n * 4 + column * 2)
                    whole = dot(
                        f, level, words, here, 255 if run.biggest == 128 else run.biggest, chains=2 if tokens == 1 else 1
                    )
                    scaled = f.cast("sitofp", whole, F32) * f.splat(f.load(F32, record + 64, 4), ROWS)
                    value = f.fma(run.scale, scaled, total.get())
                    if offset is not None:
                        the_sum = record + 68 if run.count == 32 else record + 72 + ((column >> 4) & 1) * 4
                        value = f.fma(offset, f.splat(f.load(F32, the_sum, 4), ROWS), value)
                    total.set(value)

            planes = _planes(f, fmt, w, n_groups, n_blocks, g * n_blocks + b)
            if tokens == 1:
                for line in range(0, ROWS * LAYOUTS[fmt].planes[0].bytes, 64):
                    f.prefetch(planes["q"] + (AHEAD + line))
            RUNS[fmt](f, level, planes, add)
        for t, total in enumerate(totals):
            f.store(total.get(), y + y_stride * t + (g - first) * (4 * ROWS))


def _unsigned(level: str, run: Run) -> tuple[Value | None, Words]:
    """The run's offset with its zero point in it, and its words as the level's products want them."""
    moved = SIGNED_ZERO.get(level, 0) if run.biggest == 128 else 0
    words = [(w ^ 0x80, c) for w, c in run.words] if moved else run.words
    zero = run.zero + moved
    if not zero:
        return run.offset, words
    offset = run.scale * -zero
    return offset if run.offset is None else offset + run.offset, words


def _float_product(f: Function, level: str, fmt: str, tokens: int) -> None:
    w, _, first, last, n, x, x_stride, y, y_stride = f.args()
    convert, type_ = FLOATS[fmt], FLOAT_TYPES[fmt].vec(ROWS)
    chains = 4 // tokens if tokens < 4 else 1  # independent sums hide the latency of an addition
    xs = [x + x_stride * t for t in range(tokens)]
    with f.range(first, last) as g:
        totals = [[f.var(ROW, 0.0) for _ in range(chains)] for _ in xs]
        start = w + g * n * type_.bytes

        def column(c: Value, chain: int) -> None:
            weights = convert(f, level, f.load(type_, start + c * type_.bytes, 16))
            for token, sums in zip(xs, totals, strict=True):
                value = f.splat(f.load(F32, token + c * 4, 4), ROWS)
                sums[chain].set(f.fma(weights, value, sums[chain].get()))

        whole = n & -4
        with f.range(0, whole, 4) as c:
            if tokens == 1:
                for line in range(0, 4 * type_.bytes, 64):
                    f.prefetch(start + (c * type_.bytes + AHEAD + line))
            for i in range(4):
                column(c + i, i % chains)
        with f.range(whole, n) as c:
            column(c, 0)
        for t, sums in enumerate(totals):
            total = sums[0].get()
            for other in sums[1:]:
                total = total + other.get()
            f.store(total, y + y_stride * t + (g - first) * (4 * ROWS))


def _integer_row(f: Function, level: str, fmt: str) -> None:
    w, n_groups, n_blocks, row, out = f.args()
    group, lane, size = row // ROWS, row % ROWS, LAYOUTS[fmt].block_size
    with f.range(0, n_blocks) as b:

        def write(run: Run, b: Value = b) -> None:
            scale = f.splat(f.extract(run.scale, lane), 4)
            offset = f.splat(f.extract(run.offset, lane), 4) if run.offset else f.const(F32.vec(4), 0)
            for word, column in run.words:
                four = f.bitcast(f.extract(f.bitcast(word, I32.vec(ROWS)), lane), I8.vec(4))
                whole = f.cast("sext" if run.biggest == 128 else "zext", four, I32) - run.zero
                value = f.fma(f.cast("sitofp", whole, F32), scale, offset)
                f.store(value, out + (b * size + run.column + column) * 4)

        RUNS[fmt](f, level, _planes(f, fmt, w, n_groups, n_blocks, group * n_blocks + b), write)


def _float_row(f: Function, level: str, fmt: str) -> None:
    w, _, n, row, out = f.args()
    type_ = FLOAT_TYPES[fmt]
    start = w + (row // ROWS * n * ROWS + row % ROWS) * type_.bytes
    with f.range(0, n) as c:
        f.store(FLOATS[fmt](f, level, f.load(type_, start + c * (ROWS * type_.bytes))), out + c * 4)


def _tile(f: Function, fmt: str) -> None:
    """Groups [first, last) of a matrix from the file's order to ours; rows that do not exist become zeros."""
    source, to, n_rows, n_groups, n_blocks, first, last = f.args()
    layout = LAYOUTS[fmt]
    row_bytes = n_blocks * layout.block_bytes

    def half(address: Value, number: Value) -> Value:  # the number-th half byte of a plane's piece
        return (f.load(I8, address + (number >> 1)) >> f.cast("trunc", (number & 1) * 4, I8)) & 15

    with f.range(first, last) as g:
        for plane in layout.planes:
            start = to + n_groups * n_blocks * (ROWS * layout.plane_offset(plane.name)) + g * n_blocks * (ROWS * plane.bytes)
            units = plane.bytes // plane.unit if plane.unit else 2 * plane.bytes
            type_ = {0: I8, 1: I8, 2: I16, 4: I32}[plane.unit]
            with f.range(0, n_blocks) as b, f.range(0, units) as u, f.range(0, ROWS, 1 if plane.unit else 2) as r:
                at = source + (g * ROWS + r) * row_bytes + b * layout.block_bytes + plane.offset
                value = f.var(type_, 0)
                with f.when(g * ROWS + r < n_rows):
                    value.set(f.load(type_, at + u * plane.unit) if plane.unit else half(at, u))
                if not plane.unit:
                    with f.when(g * ROWS + r + 1 < n_rows):
                        value.set(value.get() | (half(at + row_bytes, u) << 4))
                unit = (b * units + u) * ROWS + r
                f.store(value.get(), start + (unit * plane.unit if plane.unit else unit >> 1))
