"""Kernels over a matrix's tiled rows: product with one token or a block of them, one row of a table, tiling.

In: a format and a level. Out: functions of a module, which the run loop calls by their address; and, for the stages, in which
tile a token's activations lie and where in it. Knows formats and layouts, not operations.

Activations of a tile of T tokens (sizes.tiles) with n columns, n a multiple of 32; offsets in bytes:
    0       [T, n] float32      the values
    4nT     [n / 32, T] times   the values rounded to 16 bits, with one scale for 32 of them: low bytes, int8 [32], and high
                                bytes, int8 [32], or (dot.WHOLE) int16 [32], four in the order 0, 2, 1, 3; then float32: the
                                scale, scale times the sum of the 32; int32: the sum of the first 16, of the last 16
The sums are for the formats' offsets and zero points. Records of the same 32 columns lie together for all tokens, so that a
product finds them by one pointer and constant offsets: with other addresses the processor splits its multiply-and-load
instructions.

A row's result depends on its activations alone, bit for bit, not on how many tokens share the product: integer sums are
exact, and the order of floating-point sums is the same in all kernels of a format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import NamedTuple

from pocketlm.runtime.native import amx
from pocketlm.runtime.native.dequantize import FLOAT_TYPES, FLOATS, RUNS, SHORT_RUNS, Run
from pocketlm.runtime.native.dot import ONE_BY_ONE, SIGNED_ZERO, Activations, Words, dots
from pocketlm.runtime.native.ir import F32, I1, I8, I16, I32, I64, PTR, VOID, Function, Module, Value, Var
from pocketlm.runtime.native.record_reader import Records
from pocketlm.runtime.native.sizes import RECORD, tiles
from pocketlm.runtime.native.tiling import LAYOUTS, ROWS

# How many bytes ahead weights are fetched: into the first-level cache, for a single token and for several, which read more
# slowly; and into the second-level cache, for which a core keeps several dozen lines under way and not a dozen. Beside 4 KB
# into the first alone, two threads of an Intel Xeon: single tokens 1.00 to 1.15 times as fast, behind 3,800 others 1.2, four
# tokens 1.22, eight 1.07
AHEAD, AHEAD_OF_TILE, FAR_AHEAD = 2048, 1280, 8192
# Levels that need no prefetch instructions: these cores fetch a stream ahead by themselves, at a Pi's full bandwidth
UNASKED = ("dotprod", "neon")
# Size of a tile → up to how many remaining tokens it is taken, if that is more than it holds. 9 to 12 tokens are one of 8 and a
# smaller one: on an Intel Xeon with AMX a tile of 16 took up to 1.3 times as long for 9 tokens, and 0.88 (Q4_0) to 1.06 times
# (Q4_1) as long for 12
MOST = {8: 12}
# How many sums of 16 rows a level's registers hold beside floating-point weights. SSE4's hold two, but it converts halves by
# hand, and it is faster to do so once for four tokens
SUMS = {"amx": 16, "avx512-vnni": 16, "avx-vnni": 4, "avx2": 4, "sse4": 8, "dotprod": 4, "neon": 4}
SCALE = 64  # where a record has it
ROW = F32.vec(ROWS)
PRODUCT = {"w": PTR, "n_groups": I64, "first": I64, "last": I64, "n_blocks": I64, "x": PTR, "y": PTR, "y_stride": I64}
LOOKUP = {"w": PTR, "n_groups": I64, "n_blocks": I64, "row": I64, "out": PTR}
TILE_ROWS = {"source": PTR, "to": PTR, "n_rows": I64, "n_groups": I64, "n_blocks": I64, "first": I64, "last": I64}


def define(module: Module, level: str, fmt: str) -> None:
    """Define FMT_productT for every T of the level's tiles, FMT_row and FMT_tile."""
    for tokens in tiles(level):
        with module.function(f"{fmt}_product{tokens}", PRODUCT, linkage="kernel") as f:
            product = _float_product if fmt in FLOATS else _amx_product if tokens == amx.TOKENS else _integer_product
            product(f, level, fmt, tokens)
    with module.function(f"{fmt}_row", LOOKUP, linkage="kernel") as f:
        (_integer_row if fmt in RUNS else _float_row)(f, level, fmt)
    with module.function(f"{fmt}_tile", TILE_ROWS, linkage="entry") as f:
        _tile(f, fmt)


def tile_size(f: Function, level: str, left: Value) -> Value:
    """The size of the next tile when `left` tokens are left: the level's smallest that holds them all, else its largest."""
    *smaller_ones, largest = tiles(level)
    size = f.const(I64, largest)
    for smaller in reversed(smaller_ones):
        size = f.select(left <= MOST.get(smaller, smaller), smaller, size)
    return size


def tile_of(f: Function, level: str, n: Value, token: Value) -> tuple[Value, Value]:
    """The first token and the size of the tile that a token, one of `n`, belongs to."""
    first = token & -tiles(level)[-1]
    size = tile_size(f, level, n - first)
    is_next = token - first >= size
    first = f.select(is_next, first + size, first)
    return first, f.select(is_next, tile_size(f, level, n - first), size)


def tile_places(f: Function, level: str, n: Value) -> Value:
    """How many tokens the tiles of `n` tokens have room for, `n` or more: a tile of 3 tokens is as large as one of 4."""
    first, size = tile_of(f, level, n, n - 1)
    return first + size


def round_into(
    f: Function, tile: Value, columns: Value, size: Value, place: Value, x: Value, is_last: Value, floats: Value | int
) -> None:  # fmt: skip
    """Write the rounded forms of a token's activations at `x` to its place in a tile of `size` tokens (see the top).

    With the last token (`is_last`), places that are left over get zeros. Their products are not used, but numbers left from
    another tile may be subnormal, which made a pass of 12 tokens in a tile of 16 take 1.15 times as long. `floats`: whether a
    product reads the values that are not rounded.
    """
    records = tile + columns * 4 * size
    f.call(VOID, "round", x, columns, records + place * RECORD, size * RECORD)
    with f.when(is_last), f.range(place + 1, size) as t:
        with f.range(0, columns >> 5) as i:
            f.store(f.const(I64, 0), records + (i * size + t) * RECORD + SCALE, 4)  # and the scaled sum
        with f.when(f.coerce(floats, I1)), f.range(0, columns, ROWS) as i:
            f.store(f.const(ROW, 0.0), tile + (t * columns + i) * 4, 4)


def product_of(f: Function, level: str, r: Records, prefix: str, size: Value) -> Value:
    """The address of an operation's kernel for a tile of `size` tokens. `prefix`: of the record's field, "" or "up_"."""
    *smaller_ones, largest = tiles(level)
    kernel = r.op(f"{prefix}product{largest}", PTR)
    for smaller in smaller_ones:
        kernel = f.select(size.equals(smaller), r.op(f"{prefix}product{smaller}", PTR), kernel)
    return kernel


def fetch_far(f: Function, level: str, address: Value, ahead: Value | int = FAR_AHEAD) -> None:
    """Prefetch into the second-level cache what is so many bytes behind an address."""
    if level not in UNASKED:
        f.prefetch(address + ahead, 2)


def _fetch(f: Function, level: str, line: Value, ahead: int) -> None:
    """Prefetch the weights `ahead` bytes behind a line into the first-level cache, those far ahead into the second."""
    if level not in UNASKED:
        f.prefetch(line + ahead)
        fetch_far(f, level, line)


def _planes(f: Function, fmt: str, w: Value, n_groups: Value, n_blocks: Value, index: Value) -> dict[str, Value]:
    """Where the planes of block number `index` (group · n_blocks + block) begin."""
    layout, rows = LAYOUTS[fmt], n_groups * n_blocks * ROWS
    return {p.name: f.opaque(w + rows * layout.plane_offset(p.name) + index * (ROWS * p.bytes)) for p in layout.planes}


class Where(NamedTuple):
    """Where a product finds a block's planes, by its number, and the records of the activations."""

    planes: Callable[[Value | int], dict[str, Value]]
    records: Value


Of = Callable[[Value | int], Value]  # a column of the block → its record, of the first token


@contextmanager
def _counted(f: Function, fmt: str, tokens: int, n_blocks: Value, where: Where) -> Iterator[tuple[dict[str, Value], Of]]:
    """A loop over the blocks of a group, which computes all addresses from the block's number."""
    with f.range(0, n_blocks) as b:

        def of(column: Value | int) -> Value:
            number = b * LAYOUTS[fmt].block_size + column >> 5
            return f.opaque(where.records + number * (RECORD * tokens))

        yield where.planes(b), of


@contextmanager
def _moving(f: Function, fmt: str, tokens: int, n_blocks: Value, where: Where) -> Iterator[tuple[dict[str, Value], Of]]:
    """The same for blocks of 32 columns, with addresses in registers that are moved on from block to block.

    The register of the activations points at their scale, which is read last: aarch64 moves a pointer on as it reads.
    """
    steps = {plane.name: ROWS * plane.bytes for plane in LAYOUTS[fmt].planes}
    moving = {name: f.var(PTR, start) for name, start in where.planes(0).items()}
    record = f.var(PTR, where.records + SCALE)
    end = where.records + (n_blocks * (RECORD * tokens) + SCALE)
    with f.loop_while(lambda: record.get().differs(end)):
        planes, scale = {name: f.opaque(at.get()) for name, at in moving.items()}, f.opaque(record.get())
        yield planes, lambda column: scale + -SCALE
        for name, at in moving.items():
            at.set(planes[name] + steps[name])
        record.set(scale + RECORD * tokens)


def _integer_product(f: Function, level: str, fmt: str, tokens: int) -> None:
    w, n_groups, first, last, n_blocks, x, y, y_stride = f.args()
    size, records = LAYOUTS[fmt].block_size, x + n_blocks * LAYOUTS[fmt].block_size * (4 * tokens)
    ahead = AHEAD if tokens == 1 else AHEAD_OF_TILE

    def of_group(g: Value, records: Value, y: Value, n: int) -> None:
        """The products of `n` of the tokens."""
        totals = [f.var(ROW, 0.0) for _ in range(n)]
        where = Where(lambda b: _planes(f, fmt, w, n_groups, n_blocks, g * n_blocks + b), records)
        turns = _moving if level in UNASKED and n == 1 and size == 32 else _counted
        with turns(f, fmt, tokens, n_blocks, where) as (planes, of):

            def add(run: Run) -> None:
                zero, words = _unsigned(f, level, run)
                half = 0 if run.count == 32 else run.column & 31  # of the record's columns, where the run begins
                record = of(run.column)
                here = [record + RECORD * t for t in range(n)]
                xs = [Activations(at + half, at + half + 32, at + half * 2) for at in here]
                starts = [_start(f, run, at, half, zero) if zero else None for at in here]
                biggest = 255 if run.biggest == 128 else run.biggest
                for at, total, sums in zip(here, totals, dots(f, level, words, xs, biggest, starts), strict=True):
                    total.set(_added(f, run.count, run.scale, run.offset, sums, at, half, total.get()))

            _each_run(f, level, fmt, planes, ahead, add)
        for t, total in enumerate(totals):
            f.store(total.get(), y + y_stride * t + (g - first) * (4 * ROWS))

    with f.range(first, last) as g:
        if level in ONE_BY_ONE:
            with f.range(0, tokens) as t:
                of_group(g, records + t * RECORD, y + y_stride * t, 1)
        else:
            of_group(g, records, y, tokens)


def _each_run(f: Function, level: str, fmt: str, planes: dict[str, Value], ahead: int, each: Callable[[Run], None]) -> None:
    """`each` for every run of a block, with a prefetch for each line of weights just before it is unpacked.

    The order is forced: LLVM would put all prefetches of a block at its end, and a processor that has a dozen under way waits.
    Q4_K was a fifth slower, IQ4_XS a third.
    """
    column_bytes = ROWS * LAYOUTS[fmt].planes[0].bytes // LAYOUTS[fmt].block_size

    def asking(run: Run) -> None:
        here, n_lines, n_words = planes["q"] + run.column * column_bytes, run.count * column_bytes // 64, len(run.words)
        left = {line * n_words // n_lines: 64 * line for line in range(n_lines)}  # a word -> the line that it is the first of

        def unpacked(number: int) -> Value:
            if (line := left.pop(number, None)) is not None:
                f.keep_order()
                _fetch(f, level, here + line, ahead)
            return run.words[number][0]()

        each(replace(run, words=[(partial(unpacked, i), column) for i, (_, column) in enumerate(run.words)]))

    RUNS[fmt](f, level, planes, each if level in UNASKED else asking)


def _amx_product(f: Function, level: str, fmt: str, tokens: int) -> None:
    """`_integer_product` in tiles."""
    w, n_groups, first, last, n_blocks, x, y, y_stride = f.args()
    size, slots = LAYOUTS[fmt].block_size, amx.Slots(f, 16 if fmt in SHORT_RUNS else 32)
    records, together = x + n_blocks * size * (4 * tokens), max(1, amx.COLUMNS // size)
    slots.open()
    with f.range(first, last) as g:
        totals = [f.var(ROW, 0.0) for _ in range(tokens)]
        with f.range(0, n_blocks, together) as start:
            with f.range(start, f.minimum(start + together, n_blocks)) as b:
                planes = _planes(f, fmt, w, n_groups, n_blocks, g * n_blocks + b)

                def put(run: Run) -> None:
                    record = records + (b * size + run.column >> 5) * (RECORD * tokens)
                    slots.put(run, record, 0 if run.count == 32 else run.column & 31)

                _each_run(f, level, fmt, planes, AHEAD_OF_TILE, put)
            slots.multiply(totals, _added)
        for t, total in enumerate(totals):
            f.store(total.get(), y + y_stride * t + (g - first) * (4 * ROWS))
    slots.close()


def _unsigned(f: Function, level: str, run: Run) -> tuple[int, Words]:
    """The run's zero point, a power of two or 0, and its words, as the level's products want them."""
    moved = SIGNED_ZERO.get(level, 0) if run.biggest == 128 else 0
    words = [(lambda unpack=unpack: unpack() ^ 0x80, column) for unpack, column in run.words] if moved else run.words
    return run.zero + moved, words


def _added(
    f: Function, count: int, scale: Value, offset: Value | None, sums: Value, record: Value, half: Value | int, total: Value
) -> Value:  # fmt: skip
    """A token's `total`, <16 x float>, plus its products with a run of `count` columns: integer `sums`, scaled; the offset."""
    scaled = f.cast("sitofp", sums, F32) * f.splat(f.load(F32, record + SCALE, 4), ROWS)
    total = f.fma(scale, scaled, total)
    return total if offset is None else f.fma(offset, f.splat(_scaled_sum(f, count, record, half), ROWS), total)


def _scaled_sum(f: Function, count: int, record: Value, half: Value | int) -> Value:
    """The sum of the `count` activations of a run, f32."""
    if count == 32:
        return f.load(F32, record + 68, 4)
    return f.cast("sitofp", f.load(I32, record + 72 + (half >> 2), 4), F32) * f.load(F32, record + 64, 4)


def _start(f: Function, run: Run, record: Value, half: Value | int, zero: int) -> Value:
    """-zero · (sum of the run's activations), i32: a dot product that begins with it is of weights minus zero points."""
    if run.count == 32:
        total = f.load(I32, record + 72, 4) + f.load(I32, record + 76, 4)
    else:
        total = f.load(I32, record + 72 + (half >> 2), 4)  # half is 0 or 16
    return 0 - (total << (zero.bit_length() - 1))


def _float_product(f: Function, level: str, fmt: str, tokens: int) -> None:
    """Two sums for each row and token, of the even columns and of the odd ones, in every kernel: so results have the same bits.

    Where registers do not hold both sums of all tokens, the odd columns are added after the even ones, and tokens are taken in
    parts. One group of rows at a time: two would hide more of an addition's latency, but are two streams from memory, which was
    a third slower.
    """
    w, _, first, last, n, x, y, y_stride = f.args()
    convert, type_ = FLOATS[fmt], FLOAT_TYPES[fmt].vec(ROWS)
    xs = [x + ((n + 31) >> 5) * (128 * t) for t in range(tokens)]
    whole, group_bytes = n & -4, n * type_.bytes
    ahead = AHEAD if tokens == 1 else AHEAD_OF_TILE
    most = SUMS[level]
    chains = [(0, 1)] if 2 * tokens <= most else [(0,), (1,)]
    step = most // len(chains[0])
    with f.range(first, last) as g:
        start = w + g * group_bytes
        for token, chain in product(range(0, tokens, step), chains):
            those = range(token, min(token + step, tokens))
            sums = {odd: [f.var(ROW, 0.0) for _ in those] for odd in chain}

            def column(c: Value, odd: int, those: range = those, sums: dict[int, list[Var]] = sums) -> None:
                weights = convert(f, level, f.load(type_, start + c * type_.bytes, 16))
                for t, own in zip(those, sums[odd], strict=True):
                    own.set(f.fma(weights, f.splat(f.load(F32, xs[t] + c * 4, 4), ROWS), own.get()))

            with f.range(0, whole, 4) as c:
                if (token, chain[0]) == (0, 0):
                    for line in range(0, 4 * type_.bytes, 64):
                        _fetch(f, level, start + (c * type_.bytes + line), ahead)
                for i in range(4):
                    if i % 2 in chain:
                        column(c + i, i % 2)
            if 0 in chain:
                with f.range(whole, n) as c:
                    column(c, 0)
            for i, t in enumerate(those):
                to = y + y_stride * t + (g - first) * (4 * ROWS)
                even = sums[0][i].get() if 0 in chain else f.load(ROW, to)
                f.store(even + sums[1][i].get() if 1 in chain else even, to)


def _integer_row(f: Function, level: str, fmt: str) -> None:
    w, n_groups, n_blocks, row, out = f.args()
    group, lane, size = row // ROWS, row % ROWS, LAYOUTS[fmt].block_size
    with f.range(0, n_blocks) as b:

        def write(run: Run) -> None:
            scale = f.splat(f.extract(run.scale, lane), 4)
            offset = f.splat(f.extract(run.offset, lane), 4) if run.offset else f.const(F32.vec(4), 0)
            for unpack, column in run.words:
                four = f.bitcast(f.extract(f.bitcast(unpack(), I32.vec(ROWS)), lane), I8.vec(4))
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
        is_whole = (g + 1) * ROWS <= n_rows
        for plane in layout.planes:
            start = to + n_groups * n_blocks * (ROWS * layout.plane_offset(plane.name)) + g * n_blocks * (ROWS * plane.bytes)
            units = plane.bytes // plane.unit if plane.unit else 2 * plane.bytes
            type_ = {0: I8, 1: I8, 2: I16, 4: I32}[plane.unit]
            left = f.var(I64, n_blocks)  # blocks that are moved unit by unit
            if plane.unit == 4 and units % 4 == 0:
                with f.when(is_whole), f.range(0, n_blocks) as b, f.range(0, units, 4) as u:
                    at = source + g * ROWS * row_bytes + b * layout.block_bytes + (u * 4 + plane.offset)
                    _transpose(f, at, row_bytes, start + (b * units + u) * (ROWS * 4))
                left.set(f.select(is_whole, 0, n_blocks))
            with f.range(0, left.get()) as b, f.range(0, units) as u, f.range(0, ROWS, 1 if plane.unit else 2) as r:
                at = source + (g * ROWS + r) * row_bytes + b * layout.block_bytes + plane.offset
                value = f.var(type_, 0)
                with f.when(g * ROWS + r < n_rows):
                    value.set(f.load(type_, at + u * plane.unit) if plane.unit else half(at, u))
                if not plane.unit:
                    with f.when(g * ROWS + r + 1 < n_rows):
                        value.set(value.get() | (half(at + row_bytes, u) << 4))
                unit = (b * units + u) * ROWS + r
                f.store(value.get(), start + (unit * plane.unit if plane.unit else unit >> 1))


def _transpose(f: Function, source: Value, row_bytes: Value, to: Value) -> None:
    """Transpose 16 rows of four 4-byte units: at `to` lie the 16 rows' first units, then their second ones, and so on."""
    for first in range(0, ROWS, 4):
        a, b, c, d = (f.load(I32.vec(4), source + row_bytes * (first + i)) for i in range(4))
        halves = [(f.shuffle(a, (i, 4 + i, i + 1, 5 + i), b), f.shuffle(c, (i, 4 + i, i + 1, 5 + i), d)) for i in (0, 2)]
        for unit in range(4):
            ab, cd = halves[unit // 2]
            pair = unit % 2 * 2
            f.store(f.shuffle(ab, (pair, pair + 1, 4 + pair, 5 + pair), cd), to + (unit * ROWS + first) * 4)
