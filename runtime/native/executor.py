"""The native executor: the plan as compiled code, one call per token and thread, weights kept quantised.

In: a plan, the tensors it names, token ids. Out: logits. Tiles the weights once, encodes the plan (lowering.py) and
hands blocks of tokens to the threads (workers.py). Results do not depend on the number of threads. Every id, shape and
length is checked here, before compiled code sees a pointer.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

from pocketlm.locks import ForkedLock
from pocketlm.runtime import operations as P
from pocketlm.runtime.ids import Ids, check_ids
from pocketlm.runtime.memory import aligned, available_bytes, in_one_piece, read_as_told, round_up
from pocketlm.runtime.native import levels, sizes
from pocketlm.runtime.native.caches import CACHES, NativeCache
from pocketlm.runtime.native.decode_threads import DecodeThreads, for_model
from pocketlm.runtime.native.executable_memory import NativeUnavailable
from pocketlm.runtime.native.kernels import CORE, kernels
from pocketlm.runtime.native.lowering import Storage, TiledMatrix, check, encode
from pocketlm.runtime.native.matrices import as_one, matrix_names, tile_rows
from pocketlm.runtime.native.records import ENTRY, GROUP, PAIR, RUN, TOKEN, offset
from pocketlm.runtime.native.scratch import Scratch
from pocketlm.runtime.native.selection import DrawingSampler, Selection
from pocketlm.runtime.native.sizes import BLOCK
from pocketlm.runtime.native.tiling import ROWS, tiled_bytes
from pocketlm.runtime.native.workers import WorkerThreads
from pocketlm.runtime.plan import Plan
from pocketlm.runtime.positions import alibi_slopes, key_turns, rope_tables, rope_tables_bytes, rotary
from pocketlm.runtime.tensor import Tensor, check_finite
from pocketlm.runtime.threads import ThreadPool

__all__ = ["NativeExecutor", "NativeUnavailable"]


class NativeExecutor:
    """Runs a plan, as executors.Executor says. Holds the tiled weights, the KV cache and worker threads; `close` ends them."""

    name = "native"
    block = BLOCK
    same_bits = True
    single: DecodeThreads | None = None  # on how many threads single tokens are computed; None: on all

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor], n_ctx: int, n_threads: int, kv: str = "q16"):
        """Raises NativeUnavailable where this computer cannot run compiled code, or there is none for this plan; FileError for
        weights that are NaN.
        """
        self.plan, self.hyper, self.n_ctx, self.n_threads = plan, plan.hyper, n_ctx, n_threads
        names = matrix_names(plan)
        formats = sorted({tensors[name].format.name for name in [*names, *plan.experts]})
        check(plan, formats)
        self.level = levels.detect()
        self.arithmetic = f"native {self.level.same_bits_as or self.level.name}" + " q8" * (kv == "q8")
        self._kind = CACHES[kv]
        self._code = kernels(formats, self.level, kv)
        self._vectors: dict[tuple[str, int], np.ndarray] = {}
        self._tensors = tensors
        fit, mapped = self._place_experts(kv)
        matrices = self._tile([*(tensors[name] for name in names), *(as_one(tensors[name]) for name in fit)]) | mapped
        matrices |= {name: replace(matrices[name], n_rows=tensors[name].shape[1]) for name in fit}
        self._tables = rope_tables(plan.ops, self._read, n_ctx)
        self._turns = key_turns(plan.ops, self._read, n_ctx)
        self.cache = self.new_cache()
        self._buffers = {name: aligned((BLOCK, round_up(width, 32)), np.float32) for name, width in plan.buffers.items()}
        storage = Storage(
            matrices, self._vector, self._buffers, self._address, self._table, self._slopes, self._taps,
            sizes.tiles(self.level.name),
        )  # fmt: skip
        self._storage: Storage | None = storage  # what the program points at
        self._program = encode(plan, storage, n_threads)
        self._arrays: dict[str, np.ndarray] = {}
        self._record = self._make_record()
        self._one_at_a_time = ForkedLock()
        memory = [
            *(matrix.data for matrix in matrices.values()), *self._vectors.values(), *self._buffers.values(),
            *self._arrays.values(), *self._tables.values(), self.cache.memory,
            self.cache.table, *self.cache.convolved.values(),
        ]  # fmt: skip
        self._workers = WorkerThreads(self._code[CORE], self._record, n_threads, memory)  # last: a failure leaves no threads

    @staticmethod
    def memory(plan: Plan, tensors: Mapping[str, Tensor], n_ctx: int, n_threads: int, kv: str = "q16") -> tuple[int, int, int]:
        """Bytes of weights, cache and scratch that an executor of this plan takes at most. Experts are not counted: where they
        do not fit they are read from the file as they are needed.
        """
        held = plan.weights.keys() - plan.experts.keys()
        weights = sum(tensor.data.nbytes for name, tensor in tensors.items() if name in held)
        buffers = 4 * BLOCK * sum(round_up(width, 32) for width in plan.buffers.values())
        scratch = Scratch(plan, tensors, n_ctx, n_threads).n_bytes + buffers
        scratch += rope_tables_bytes(plan.ops, n_ctx) + NativeCache.bytes_to_move(plan.hyper, n_ctx)
        return weights, CACHES[kv].bytes_for(plan.hyper, n_ctx, plan.windows, plan.columns), scratch

    def close(self) -> None:
        """As `Executor.close`; a run that another thread is in the middle of holds the memory until it ends."""
        self._workers.close()
        self._storage, self._tensors = None, {}  # views of the file, which can be unmapped now
        self.cache.release()

    def use_fewer_threads(self, path: object) -> None:
        """Single tokens are computed by fewer threads from now on, once that is known to be faster for the model at `path`."""
        n_bytes = sum(tensor.data.nbytes for tensor in self._tensors.values())
        self.single = for_model(Path(str(path)), n_bytes, self.level.name, self.n_threads)

    def new_selection(self) -> Selection:
        """For one sampler: it has memory of its own, so that several threads may draw at the same time."""
        return Selection(self._code[CORE], self.hyper.n_vocab)

    def new_cache(self, n_ctx: int | None = None) -> NativeCache:
        n_ctx = min(n_ctx or self.n_ctx, self.n_ctx)
        return self._kind(self.hyper, n_ctx, self._turns, self.plan.windows, self.plan.columns)

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        cache = self.cache
        with self._one_at_a_time.here:  # a second thread that calls would run on the same buffers
            ids = check_ids(ids, self.hyper.n_vocab, cache.length, self.n_ctx)
            starts = range(0, len(ids), BLOCK)
            if rows == "all":
                parts = [ids[at : at + BLOCK] for at in starts]
                return np.concatenate([self._passes([(cache, part, len(part))])[0][0].copy() for part in parts])
            for at in starts[:-1]:
                self._passes([(cache, ids[at : at + BLOCK], 0)])
            return self._passes([(cache, ids[starts[-1] :], 1)])[0][0]

    def step(
        self, work: Sequence[tuple[NativeCache, Ids, int]], samplers: Sequence[DrawingSampler | None] = (), most: int = 1,
        wanted: ctypes.c_int64 | None = None,
    ) -> tuple[list[np.ndarray], int]:  # fmt: skip
        """A text's next token is drawn in the pass by its sampler, where it has one, prepared for `most` tokens. Logits have
        the bits that passes of its own would give. A cache stands there once, and all ids together are at most BLOCK.

        Where each text has one id and a sampler, up to `most` passes are made, each of what was drawn in the one before: until
        a text ends, or `wanted` is 1, or a pass needs other preparations. As many tokens were drawn for each text, and all but
        the last of them are in the cache.
        """
        with self._one_at_a_time.here:
            if len(work) == 1 and self._is_one(*work[0]):
                return self._passes(work, samplers, most, wanted)
            checked = [(c, check_ids(ids, self.hyper.n_vocab, c.length, c.n_ctx), min(rows, len(ids))) for c, ids, rows in work]
            n = len(checked[0][1]) if len(checked) == 1 else sum(len(ids) for _, ids, _ in checked)
            if n > BLOCK or (len(checked) > 1 and len({id(c) for c, _, _ in checked}) < len(checked)):
                raise ValueError(f"a pass takes at most {BLOCK} ids, and a cache once")
            return self._passes(checked, samplers, most, wanted)

    def _is_one(self, cache: NativeCache, ids: Ids, rows: int) -> bool:
        """Whether this is a single token, which is as it must be: then nothing else has to be checked or converted."""
        if len(ids) != 1 or rows > 1 or type(id := ids[0]) is not int:
            return False
        return 0 <= id < self.hyper.n_vocab and cache.length < cache.n_ctx

    def _passes(
        self, work: Sequence[tuple[NativeCache, Ids, int]], samplers: Sequence[DrawingSampler | None] = (), most: int = 1,
        wanted: ctypes.c_int64 | None = None,
    ) -> tuple[list[np.ndarray], int]:  # fmt: skip
        """`step` for ids that were checked, and no more rows than ids."""
        if len(work) > 1 or len(work[0][1]) > 1 or not self._is_next(*work[0]):
            self._describe(work)
        if most > 1:
            if not all(samplers) or len(samplers) != len(work) or any(len(ids) != 1 or rows != 1 for _, ids, rows in work):
                raise ValueError("several passes take a token and a sampler of each text")
            if self.single is not None and self.single.is_trying:
                most = 1  # each pass is a measurement
            # spans of positions are shared out beforehand
            left = [min(cache.n_ctx - cache.length, sizes.SPAN - cache.length % sizes.SPAN) for cache, _, _ in work]
            most = min(most, sizes.MAX_PASSES, *left)
        self._samplers.value = self._draw_with(work, samplers) if any(samplers) else 0
        wanted = wanted or self._nobody
        self._most.value, self._n_passes.value, self._wanted.value = most, 0, ctypes.addressof(wanted)
        for cache, ids, _ in work:
            cache.about_to_write(ids, most - 1)
        self._run(len(work) == 1 and len(work[0][1]) == 1)
        n_passes = self._n_passes.value if most > 1 else 1
        logits, start = [], 0
        for i, (cache, ids, rows) in enumerate(work):
            if n_passes > 1:
                for at, id in enumerate(samplers[i].ids(n_passes - 1), cache.length + 1):  # type: ignore[union-attr]
                    cache.ids[at] = id
            cache.length += len(ids) + n_passes - 1
            logits.append(self._logits[start : start + rows])
            start += rows
        return logits, n_passes

    def _draw_with(self, work: Sequence[tuple[NativeCache, Ids, int]], samplers: Sequence[DrawingSampler | None]) -> int:
        """Write down who draws from which row of logits; the address of that."""
        row = 0
        for sampler, (_, _, rows) in zip(samplers, work, strict=False):
            address = sampler.begin() if sampler else 0
            for _ in range(rows):
                self._row_samplers[row] = address
                row += 1
        return self._rows_at

    def _run(self, is_single: bool) -> None:
        """The passes that the records describe."""
        single = self.single
        if single is None:
            return self._workers.run()
        self._n_running.value = single.next() if is_single else self.n_threads
        started = perf_counter()
        self._workers.run()
        if is_single and single.is_trying:
            single.took(perf_counter() - started)

    def _is_next(self, cache: NativeCache, ids: Ids, rows: int) -> bool:
        """Whether the last pass was of the token before this one; then little changes in its records, which is done here."""
        before, n_spans = self._alone
        if before() is not cache or rows != 1 or cache.length // sizes.SPAN + 1 != n_spans:
            return False
        self._id.value, self._position.value, self._before.value = int(ids[0]), cache.length, int(cache.id_before)
        return True

    def _describe(self, work: Sequence[tuple[NativeCache, Ids, int]]) -> None:
        """Write the records of a pass. Raises PocketlmError once the model is closed.

        Attention: few tokens with much behind them share out their spans; others have one task for each block of tokens. The
        results are the same. Plain numbers where there are few: NumPy takes a microsecond for every field.
        """
        self._workers.check_open()
        self._alone = lambda: None, 0  # until all is written: an interrupt may come before that
        tokens, n, slot, wanted, entries = self._arrays["tokens"], 0, 0, list[int](), list[tuple[int, ...]]()
        together = max(1, sizes.QUERIES * self.hyper.n_kv_head // self.hyper.n_head)
        n_tasks = self.hyper.n_kv_head * sum(-(-len(ids) // together) for _, ids, _ in work)
        for cache, ids, rows in work:
            start, stop = cache.length, cache.length + len(ids)
            n_spans, left = (stop - 1) // sizes.SPAN + 1, self._n_slots - slot - (BLOCK - n)
            parts = max(1, min(n_spans, 4 * self.n_threads // n_tasks)) if len(ids) * n_spans <= left else 1
            slots = n_spans if parts > 1 else 1  # of a token
            memory = cache.memory.ctypes.data, cache.table.ctypes.data
            if len(ids) == 1:
                tokens[n] = ids[0], start, *memory, slot, slots, cache.id_before, cache.columns_address
            else:
                here = tokens[n : n + len(ids)]
                here["id"], here["position"] = ids, np.arange(start, stop)
                here["cache"], here["layers"] = memory
                here["columns"] = cache.columns_address
                here["slot"] = slot + slots * np.arange(len(ids))
                here["n_partials"] = here["position"] // sizes.SPAN + 1 if parts > 1 else 1
                here["before"][1:], here["before"][0] = ids[:-1], cache.id_before
            slot += len(ids) * slots
            apart = parts if parts > 1 else 0
            for first in range(n, n + len(ids), together):
                n_here = min(n + len(ids) - first, together)
                entries += [(first, n_here, part, apart) for part in range(parts)]
            n += len(ids)
            wanted += range(n - rows, n)
        self._arrays["rows"][: len(wanted)] = wanted
        self._arrays["entries"][: len(entries)] = entries
        for name, number in (("n_tokens", n), ("n_logits", len(wanted)), ("n_entries", len(entries))):
            self._record[name] = number
        if n == len(wanted) == 1:
            cache = work[0][0]
            self._alone = weakref.ref(cache), cache.length // sizes.SPAN + 1

    def _address(self, fmt: str, kernel: str) -> int:
        return self._code[fmt].address(f"{fmt}_{kernel}")

    def _read(self, name: str) -> np.ndarray:
        check_finite(self._tensors[name])
        return self._tensors[name].to_float32()

    def _vector(self, name: str | None, n: int, empty: float = 0.0) -> np.ndarray:
        key = (name or str(empty), round_up(n, 32))
        if key not in self._vectors:
            vector = self._vectors[key] = aligned(key[1], np.float32)
            values = self._read(name).reshape(-1) if name else np.full(n, empty, np.float32)
            vector[: len(values)] = values
        return self._vectors[key]

    def _table(self, op: P.Rotate) -> np.ndarray:
        return self._tables[rotary(op, self.n_ctx)]

    def _slopes(self, op: P.Attend) -> np.ndarray:
        slopes = self._vectors["slopes", op.layer] = alibi_slopes(op.n_head, op.alibi_max_bias)
        return slopes

    def _taps(self, op: P.Convolve) -> np.ndarray:
        taps = self._vectors[op.weight, op.taps] = aligned((op.taps, op.n), np.float32)
        taps[:] = self._read(op.weight).T
        return taps

    def _tile(self, tensors: list[Tensor]) -> dict[str, TiledMatrix]:
        """The matrices in our order, permuted by all threads. Of the file only the pieces being read are in memory, PIECE bytes
        a thread: their pages are given back at once.
        """
        result = {}
        # in a packed executable they are tiled, and used where they are
        sizes = [0 if tensor.tiled else tiled_bytes(tensor.format.name, *tensor.shape) for tensor in tensors]
        with ThreadPool(self.n_threads) as pool:
            for tensor, data in zip(tensors, in_one_piece(sizes), strict=True):
                fmt, (n_rows, n_columns) = tensor.format.name, tensor.shape
                if tensor.tiled:
                    result[tensor.name] = TiledMatrix(fmt, n_rows, n_columns, tensor.data)
                    continue
                types = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 5
                permute = self._code[fmt].function(f"{fmt}_tile", None, *types)
                pool.run(partial(tile_rows, tensor, data, permute))
                result[tensor.name] = TiledMatrix(fmt, n_rows, n_columns, data)
        return result

    def _place_experts(self, kv: str) -> tuple[list[str], dict[str, TiledMatrix]]:
        """Those of the plan to be tiled, where all fit into the memory, and those that stay in the file."""
        experts = {name: self._tensors[name] for name in self.plan.experts}
        if not experts:
            return [], {}
        needed = sum(self.memory(self.plan, self._tensors, self.n_ctx, self.n_threads, kv))
        needed += sum(tensor.data.nbytes for tensor in experts.values())
        fits = (free := available_bytes()) is None or needed <= free
        fit = [name for name, tensor in experts.items() if fits and tensor.shape[1] % ROWS == 0]
        mapped = {}
        for name in experts.keys() - fit:  # NaN among them is not looked for, which would read them all: logits tell
            tensor = experts[name]
            read_as_told(tensor.data)
            n_rows, n_columns = tensor.shape[1:]
            mapped[name] = TiledMatrix(tensor.format.name, n_rows, n_columns, tensor.data, mapped=True)
        return fit, mapped

    def _make_record(self) -> np.ndarray:
        """The run's record, and every array it points at in self._arrays."""
        hyper, scratch = self.hyper, Scratch(self.plan, self._tensors, self.n_ctx, self.n_threads)
        self._n_slots = scratch.n_slots
        self._logits = self._buffers["logits"][:, : hyper.n_vocab]
        self._alone: tuple[Callable[[], NativeCache | None], int] = lambda: None, 0
        arrays = self._arrays = {
            "program": self._program,
            "counters": aligned((self.n_threads, round_up(len(self._program), 8)), np.int64),
            "tokens": aligned(BLOCK, TOKEN),
            "rows": aligned(BLOCK, np.int64),
            "samplers": aligned(BLOCK, np.int64),
            "entries": aligned(max(BLOCK, 4 * self.n_threads), ENTRY),
            "activations": aligned(scratch.activations, np.uint8),
            "counts": aligned(scratch.n_experts, np.int64),
            "pairs": aligned(scratch.n_pairs, PAIR),
            "groups": aligned(min(scratch.n_pairs, scratch.n_experts), GROUP),
            "scratch": aligned(self.n_threads * scratch.stride, np.uint8, 4096),
            "partials": aligned((scratch.n_slots * hyper.n_head, scratch.dim + sizes.LANES), np.float32),
        }
        first = arrays["tokens"].view(np.uint8)
        self._id, self._position, self._before = (
            ctypes.c_int64.from_buffer(first, offset(TOKEN, name)) for name in ("id", "position", "before")
        )  # NumPy takes several times as long for a number
        record = aligned(1, RUN)
        values = {
            **{name: array.ctypes.data for name, array in arrays.items() if name in (RUN.names or ())}, **scratch.places,
            "n_operations": len(self._program), "activation_stride": scratch.activation, "scratch_stride": scratch.stride,
            "n_head": hyper.n_head, "n_kv_head": hyper.n_kv_head, "head_dim": hyper.head_dim,
            "padded_dim": scratch.dim,
        }  # fmt: skip
        for name, value in values.items():
            record[name] = value
        fields = record.view(np.uint8)
        self._n_running, self._samplers, self._most, self._n_passes, self._wanted = (
            ctypes.c_int64.from_buffer(fields, offset(RUN, name))
            for name in ("n_threads", "samplers", "most", "n_passes", "wanted")
        )
        self._nobody, self._rows_at = ctypes.c_int64(), arrays["samplers"].ctypes.data
        self._row_samplers = (ctypes.c_int64 * BLOCK).from_buffer(arrays["samplers"].view(np.uint8))
        return record
