"""The native executor: the plan as compiled code, one call a token and thread, weights kept quantised.

In: a plan, the tensors it names, token ids. Out: logits. Tiles the weights once, encodes the plan (lowering.py) and
hands blocks of tokens to the threads (workers.py). Results do not depend on the number of threads. Every id, shape and
length is checked here, before compiled code sees a pointer.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping

import numpy as np

from pocketlm.runtime import plan as P
from pocketlm.runtime.hyper import Hyper
from pocketlm.runtime.ids import check_ids
from pocketlm.runtime.kv_cache import KVCache
from pocketlm.runtime.memory import aligned, release_pages
from pocketlm.runtime.native import levels, sizes
from pocketlm.runtime.native.executable_memory import NativeUnavailable
from pocketlm.runtime.native.kernels import CORE, kernels
from pocketlm.runtime.native.lowering import Storage, TiledMatrix, encode
from pocketlm.runtime.native.records import RUN
from pocketlm.runtime.native.selection import Selection
from pocketlm.runtime.native.tiling import LAYOUTS, ROWS, groups, tiled_bytes
from pocketlm.runtime.native.workers import WorkerThreads
from pocketlm.runtime.positions import alibi_slopes, rope_table
from pocketlm.runtime.tensor import Tensor
from pocketlm.runtime.threads import ForkedLock, ThreadPool, share
from pocketlm.runtime.weights import check_finite

__all__ = ["NativeExecutor", "NativeUnavailable"]
BLOCK = 128  # tokens a pass: their activations stay in the second-level cache


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class NativeCache(KVCache):
    """float16. Keys [n_layer, n_kv_head, n_ctx / 16, padded_dim, 16]: 16 positions side by side; values as in KVCache."""

    def __init__(self, hyper: Hyper, n_ctx: int, rope_factors: np.ndarray | None = None):
        self.hyper, self.n_ctx, self.length, self._rope_factors = hyper, n_ctx, 0, rope_factors
        rows, dim = _up(n_ctx, ROWS), _up(hyper.head_dim, ROWS)
        self.keys = aligned((hyper.n_layer, hyper.n_kv_head, rows // ROWS, dim, ROWS), np.float16)
        self.values = aligned((hyper.n_layer, hyper.n_kv_head, rows, dim), np.float16)

    @staticmethod
    def bytes_for(hyper: Hyper, n_ctx: int) -> int:
        return 2 * hyper.n_layer * hyper.n_kv_head * _up(hyper.head_dim, ROWS) * _up(n_ctx, ROWS) * 2

    def _key_rows(self, layer: int) -> np.ndarray:  # [n_kv_head, n_ctx, padded_dim], a copy
        keys = self.keys[layer].swapaxes(2, 3)
        return keys.reshape(keys.shape[0], -1, keys.shape[3])

    def read_keys(self, layer: int, start: int, stop: int) -> np.ndarray:
        return self._key_rows(layer)[:, start:stop, : self.hyper.head_dim].astype(np.float32)

    def write_keys(self, layer: int, start: int, keys: np.ndarray) -> None:
        rows = self._key_rows(layer)
        rows[:, start : start + keys.shape[1], : self.hyper.head_dim] = keys
        self.keys[layer] = rows.reshape(rows.shape[0], -1, ROWS, rows.shape[2]).swapaxes(2, 3)


class NativeExecutor:
    """Runs a plan. Holds the tiled weights, the KV cache and worker threads; `close` ends them."""

    name = "native"

    def __init__(self, plan: P.Plan, tensors: Mapping[str, Tensor], n_ctx: int, n_threads: int):
        """Raises NativeUnavailable where this computer cannot run compiled code, FileError for weights that are NaN."""
        self.plan, self.hyper, self.n_ctx, self.n_threads = plan, plan.hyper, n_ctx, n_threads
        names = _matrix_names(plan)
        self.level = levels.detect()
        self._code = kernels(sorted({tensors[name].format.name for name in names}), self.level)
        self._vectors: dict[tuple[str | None, int], np.ndarray] = {}
        self._tensors = tensors
        matrices = self._tile([tensors[name] for name in names])
        factors = tensors[plan.rope_factors].to_float32() if plan.rope_factors else None
        self.cache = NativeCache(plan.hyper, n_ctx, factors)
        self._buffers = {name: aligned((BLOCK, _up(width, 32)), np.float32) for name, width in plan.buffers.items()}
        storage = Storage(matrices, self._vector, self._buffers, self._address, self.cache.keys, self.cache.values)
        self._storage: Storage | None = storage  # what the program points at
        self._program = encode(plan, storage, n_threads)
        self._arrays: dict[str, np.ndarray] = {}
        self._record = self._make_record(factors)
        self.selection = Selection(self._code[CORE], self.hyper.n_vocab)
        self._one_at_a_time = ForkedLock()
        memory = [
            *(matrix.data for matrix in matrices.values()), *self._vectors.values(), *self._buffers.values(),
            *self._arrays.values(), self.cache.keys, self.cache.values,
        ]  # fmt: skip
        self._workers = WorkerThreads(self._code[CORE], self._record, n_threads, memory)  # last: a failure leaves no threads

    @staticmethod
    def memory(plan: P.Plan, tensors: Mapping[str, Tensor], n_ctx: int) -> tuple[int, int, int]:
        """Bytes of weights, cache and scratch that an executor of this plan takes."""
        weights = sum(tensor.data.nbytes for name, tensor in tensors.items() if name in plan.weights)
        scratch = 4 * BLOCK * (sum(plan.buffers.values()) + 2 * max(plan.buffers.values()))
        return weights, NativeCache.bytes_for(plan.hyper, n_ctx), scratch

    def close(self) -> None:
        """End the threads, give the weights and the cache back. A second call does nothing; `forward` raises PocketlmError,
        in another thread that is in the middle of a run, too: that run holds the memory until then.
        """
        self._workers.close()
        self._storage = None
        self.cache.keys = self.cache.values = np.empty(0, np.float16)

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        """Append ids [n] to the cache; logits float32 [n, n_vocab] ("all") or [1, n_vocab] ("last", valid until the next call).

        Raises PocketlmError when an id is not in the vocabulary or the context is too short for all of them.
        """
        with self._one_at_a_time.here:  # a second thread that calls would run on the same buffers
            ids = check_ids(ids, self.hyper.n_vocab, self.cache.length, self.n_ctx)
            starts = range(0, len(ids), BLOCK)
            if rows == "all":
                return np.concatenate([self._block(ids[at : at + BLOCK], BLOCK).copy() for at in starts])
            for at in starts[:-1]:
                self._block(ids[at : at + BLOCK], 0)
            return self._block(ids[starts[-1] :], 1)

    def _block(self, ids: np.ndarray, rows: int) -> np.ndarray:
        """The logits of the last `rows` of at most BLOCK tokens."""
        n, rows, record = len(ids), min(rows, len(ids)), self._record
        self._arrays["ids"][:n] = ids
        record["n_tokens"], record["n_logits"], record["position"] = n, rows, self.cache.length
        self._workers.run()
        self.cache.length += n
        return self._buffers["logits"][n - rows : n, : self.hyper.n_vocab]

    def _address(self, fmt: str, kernel: str) -> int:
        return self._code[fmt].address(f"{fmt}_{kernel}")

    def _vector(self, name: str | None, n: int) -> np.ndarray:
        key = (name, _up(n, 32))
        if key not in self._vectors:
            vector = self._vectors[key] = aligned(key[1], np.float32)
            if name is not None:
                tensor = self._tensors[name]
                check_finite(tensor)
                vector[: tensor.shape[0]] = tensor.to_float32()
        return self._vectors[key]

    def _tile(self, tensors: list[Tensor]) -> dict[str, TiledMatrix]:
        """The matrices in our order, permuted by all threads; the file's pages are given back as it goes."""
        result = {}
        with ThreadPool(self.n_threads) as pool:
            for tensor in tensors:
                check_finite(tensor)
                fmt, (n_rows, n_columns) = tensor.format.name, tensor.shape
                if tensor.tiled:  # in a packed executable: used where it is
                    result[tensor.name] = TiledMatrix(fmt, n_rows, n_columns, tensor.data)
                    continue
                data = aligned(tiled_bytes(fmt, n_rows, n_columns), np.uint8)
                n_groups, n_blocks = groups(n_rows), n_columns // LAYOUTS[fmt].block_size
                types = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 5
                permute = self._code[fmt].function(f"{fmt}_tile", None, *types)

                def job(
                    part: int, parts: int, permute=permute, tensor=tensor, data=data, counts=(n_rows, n_groups, n_blocks)
                ) -> None:
                    mine = share(counts[1], part, parts)
                    permute(tensor.data.ctypes.data, data.ctypes.data, *counts, mine.start, mine.stop)

                pool.run(job)
                release_pages(tensor.data)
                result[tensor.name] = TiledMatrix(fmt, n_rows, n_columns, data)
        return result

    def _make_record(self, rope_factors: np.ndarray | None) -> np.ndarray:
        """The run's record, and every array it points at in self._arrays."""
        hyper, plan = self.hyper, self.plan
        dim, positions = _up(hyper.head_dim, ROWS), _up(self.n_ctx, ROWS)
        activation = sizes.activation_bytes(max(plan.buffers[name] for name in ("x", "att", "act")))
        products = 2 * sizes.TILE * sizes.MAX_CHUNK * ROWS * 4
        queries = sizes.QUERIES * dim * 4
        own = {"products_at": activation, "queries_at": activation + products, "scores_at": activation + products + queries}
        stride = _up(own["scores_at"] + sizes.QUERIES * positions * 4, 4096)
        n_partials = hyper.n_head * max(BLOCK, -(-positions // sizes.SPAN))
        arrays = self._arrays = {
            "program": self._program,
            "counters": aligned(len(self._program), np.int64),
            "ids": aligned(BLOCK, np.int32),
            "activations": aligned(BLOCK * activation, np.uint8),
            "scratch": aligned(self.n_threads * stride, np.uint8, 4096),
            "partials": aligned((n_partials, dim + sizes.LANES), np.float32),
        }
        if hyper.rope:
            arrays["rope"] = rope_table(hyper.rope, self.n_ctx, rope_factors)
        if hyper.position == "alibi":
            arrays["slopes"] = alibi_slopes(hyper.n_head, hyper.alibi_max_bias)
        record = aligned(1, RUN)
        values = {
            **{name: array.ctypes.data for name, array in arrays.items()}, **own,
            "n_operations": len(self._program), "activation_stride": activation, "scratch_stride": stride,
            "score_stride": positions * 4, "n_head": hyper.n_head, "n_kv_head": hyper.n_kv_head, "head_dim": hyper.head_dim,
            "padded_dim": dim, "head_stride": positions * dim * 2, "rope_half": hyper.rope.n_dims // 2 if hyper.rope else 0,
            "rope_interleaved": bool(hyper.rope and hyper.rope.pairs == "interleaved"),
            "query_scale": 1 / math.sqrt(hyper.head_dim),
        }  # fmt: skip
        for name, value in values.items():
            record[name] = value
        return record


def _matrix_names(plan: P.Plan) -> list[str]:
    """Every tensor that is a matrix of a product or a table of an embedding, once."""
    names: dict[str, None] = {}
    for op in plan.ops:
        if isinstance(op, P.Embed):
            names |= {name: None for name in (op.table, op.positions) if name}
        elif isinstance(op, P.Linear | P.Logits):
            names |= dict.fromkeys(op.matrix.weights)
    return list(names)
