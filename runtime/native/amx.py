"""Integer products of 16 tokens with AMX: tiles of bytes that a processor multiplies like matrices.

In: runs of columns whose weights are bytes (dequantize.py), and where their activations are (matrix.py). Out: the same bits as
the products of dot.py, because sums of integers are exact and what follows is done in the same order. Knows tiles, not formats.

A tile has up to 16 rows of 64 bytes. The weights of a run are one tile, four columns of the matrix's 16 rows in each row of it;
the low bytes of all tokens' activations are another, the high bytes a third. Sums go through memory: no other instruction reads
a tile. Several runs, COLUMNS together, are unpacked into slots before they are multiplied: a tile that is loaded from lines
just written has to wait for them.

The core's clock is a fifth lower while it multiplies tiles (an Intel Xeon: 2.1 GHz; 2.5 with other products of 64 bytes, 2.9
without): with tiles for 8 tokens, too, eight texts ran 0.86 to 0.98 times as fast. Tried without gain: bfloat16 integers, whose
sums are as exact (one tile of sums for 32 columns, but twice the activations), in slots or run by run; weights unpacked once
for 64 tokens; totals in memory, so that activations stay in their tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pocketlm.runtime.native.dequantize import Run
from pocketlm.runtime.native.ir import F32, I8, I32, I64, PTR, VOID, Function, Value, Var
from pocketlm.runtime.native.sizes import ALL_TILES, LANES, RECORD

TOKENS = ALL_TILES[-1]
COLUMNS = 384  # that are unpacked at a time: twice as many were 5 to 8 % slower
# tiles by number; SUMS: of low and of high bytes, for two runs that take turns
WEIGHTS, LOW_BYTES, HIGH_BYTES, SUMS = 0, 1, 2, ((3, 4), (5, 6))
SUM_BYTES = 1024  # of a tile of sums
ROW = F32.vec(LANES)


class Slots:
    """Unpacked runs of `columns` columns, one after the other: weights, scales, offsets, where the activations are."""

    def __init__(self, f: Function, columns: int):
        self.f, self.columns = f, columns
        self.scale = columns * LANES  # where a slot has it
        self.offset, self.record, self.bytes = self.scale + 64, self.scale + 128, self.scale + 192
        self.memory = f.stack(I8, COLUMNS // columns * self.bytes)
        self.sums = f.stack(I8, 4 * SUM_BYTES)
        self.used = f.var(I64, 0)
        self.has_offsets = False

    def open(self) -> None:
        """Tell the processor the shapes of its tiles, which it needs before a thread's first product."""
        rows = {WEIGHTS: (self.columns // 4, 64)} | dict.fromkeys((LOW_BYTES, HIGH_BYTES), (TOKENS, self.columns))
        rows |= {tile: (TOKENS, 64) for pair in SUMS for tile in pair}
        config = [0] * 64
        config[0] = 1  # the only palette
        for tile, (n_rows, n_bytes) in rows.items():
            config[16 + 2 * tile], config[48 + tile] = n_bytes, n_rows
        here = self.f.stack(I8, 64)
        self.f.store(self.f.vector(I8.vec(64), config), here, 64)
        self.f.call(VOID, "llvm.x86.ldtilecfg", here)

    def close(self) -> None:
        """Let go of the tiles: the system need not save them any more."""
        self.f.call(VOID, "llvm.x86.tilerelease")

    def put(self, run: Run, record: Value, half: Value | int) -> None:
        """Unpack a run. `record`: of the first token; `half`: where its columns begin there."""
        assert run.count == self.columns
        f, slot = self.f, self.memory + self.used.get() * self.bytes
        for unpack, column in run.words:
            f.store(unpack() - run.zero if run.zero else unpack(), slot + column * LANES, 64)
        f.store(run.scale, slot + self.scale, 64)
        if run.offset is not None:
            f.store(run.offset, slot + self.offset, 64)
            self.has_offsets = True
        f.store(record, slot + self.record, 8)
        f.store(f.coerce(half, I64), slot + (self.record + 8), 8)
        self.used.set(self.used.get() + 1)

    def multiply(self, totals: Sequence[Var], added: Callable[..., Value]) -> None:
        """Add every slot's products to the tokens' totals, <16 x float> each; then all slots are free.

        `added` is matrix.py's: a token's total plus its integer sums, scaled. Two runs are under way at a time: one is
        multiplied while the sums of the other are read.
        """
        f, n = self.f, self.used.get()
        last, both = (n - 1) & -2, (n & 1).equals(0)
        slot = self.memory + last * self.bytes
        self._begin(self.memory, 0)
        with f.range(0, last, 2) as i:
            here = f.opaque(self.memory + i * self.bytes)
            self._begin(here + self.bytes, 1)
            self._end(here, 0, totals, added)
            self._begin(here + 2 * self.bytes, 0)
            self._end(here + self.bytes, 1, totals, added)
        with f.when(both):
            self._begin(slot + self.bytes, 1)
        self._end(slot, 0, totals, added)
        with f.when(both):
            self._end(slot + self.bytes, 1, totals, added)
        self.used.set(0)

    def _tile(self, what: str, *operands: Value | int) -> None:
        f = self.f
        arguments = [f.const(I8, operand) if isinstance(operand, int) else operand for operand in operands]
        f.call(VOID, f"llvm.x86.{what}", *arguments)

    def _begin(self, slot: Value, turn: int) -> None:
        f, stride = self.f, self.f.const(I64, RECORD)
        at = f.load(PTR, slot + self.record, 8) + f.load(I64, slot + (self.record + 8), 8)
        self._tile("tileloadd64", WEIGHTS, slot, f.const(I64, 64))
        for sums, bytes_, start in zip(SUMS[turn], (LOW_BYTES, HIGH_BYTES), (0, 32), strict=True):
            self._tile("tilezero", sums)
            self._tile("tileloadd64", bytes_, at + start, stride)
            self._tile("tdpbssd", sums, bytes_, WEIGHTS)

    def _end(self, slot: Value, turn: int, totals: Sequence[Var], added: Callable[..., Value]) -> None:
        f, sums = self.f, self.sums + turn * 2 * SUM_BYTES
        for i, tile in enumerate(SUMS[turn]):
            self._tile("tilestored64", tile, sums + i * SUM_BYTES, f.const(I64, 64))
        scale, offset = f.load(ROW, slot + self.scale, 64), f.load(ROW, slot + self.offset, 64) if self.has_offsets else None
        record, half = f.opaque(f.load(PTR, slot + self.record, 8)), f.load(I64, slot + (self.record + 8), 8)
        for t, total in enumerate(totals):
            low, high = (f.load(I32.vec(LANES), sums + (i * SUM_BYTES + 64 * t), 64) for i in (0, 1))
            joined, here = low + (high << 8), record + RECORD * t
            total.set(added(f, self.columns, scale, offset, joined, here, half, total.get()))
