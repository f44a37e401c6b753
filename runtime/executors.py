"""Which executor runs a plan: the choice, the memory check, and the fall-back. Knows no tokens."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from pocketlm.errors import one_of
from pocketlm.runtime import memory
from pocketlm.runtime.hyper import Hyper
from pocketlm.runtime.ids import Ids
from pocketlm.runtime.kv_cache import KINDS, KVCache
from pocketlm.runtime.plan import Plan
from pocketlm.runtime.sampling import Selection
from pocketlm.runtime.tensor import Tensor
from pocketlm.terminal_text import print

BACKENDS = ("auto", "native", "numpy")


class Executor(Protocol):
    """What the engine, the session, the sampler and the tools need of an executor: weights that every text shares, and passes
    over tokens of several texts, whose state is a cache each. `cache` and `forward` are for whoever has only one text.
    """

    name: str
    hyper: Hyper
    n_ctx: int
    n_threads: int
    block: int  # tokens that a pass takes at most
    arithmetic: str  # what the last bits of its results depend on beside the weights
    same_bits: bool  # logits do not depend on how a text is cut into passes

    @property
    def cache(self) -> KVCache: ...

    def new_cache(self, n_ctx: int | None = None) -> KVCache:
        """The state of one more text, of at most the executor's own context."""
        ...

    def new_selection(self) -> Selection | None:
        """A faster way to find the largest logits than NumPy's, for one sampler."""
        ...

    def step(
        self, work: Sequence[tuple[Any, Ids, int]], samplers: Sequence[Any] = (), most: int = 1, wanted: Any = None, /
    ) -> tuple[list[np.ndarray], int]:
        """A pass over tokens of several texts: for each (its cache, ids [n] to append, of how many of the last the logits are
        wanted) logits float32 [rows, n_vocab], valid until the next call. Raises PocketlmError as `forward` does, before
        anything is done.

        And how many passes were made: up to `most` where samplers of `new_selection` draw in them; the logits are the last's.
        """
        ...

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        """Append ids [n] to the executor's own cache; logits float32 [n, n_vocab] ("all") or [1, n_vocab] ("last", valid until
        the next call).

        Raises PocketlmError when an id is not in the vocabulary, the context is too short for all of them, or it is closed.
        """
        ...

    def close(self) -> None:
        """End the threads, give the weights and the cache back; whoever computes in another thread gets a PocketlmError. A
        second call does nothing.
        """
        ...


def memory_needed(plan: Plan, tensors: Mapping[str, Tensor], n_ctx: int, n_threads: int) -> tuple[int, int, int]:
    """Bytes of weights, cache and scratch that the native executor takes for a context of `n_ctx`."""
    from pocketlm.runtime.native.executor import NativeExecutor

    return NativeExecutor.memory(plan, tensors, n_ctx, n_threads)


def make_executor(
    backend: str, plan: Plan, tensors: Mapping[str, Tensor], n_ctx: int, n_threads: int, path: object,
    kv: str = KINDS[0], may_use_fewer: bool = False,
) -> Executor:  # fmt: skip
    """An executor of `plan`. "auto" is native, or numpy with one line on stderr where there is no native code for the plan or
    code cannot be made executable. `kv`: how caches keep keys and values, one of kv_cache.KINDS. `may_use_fewer`: single
    tokens are computed by fewer threads, where that is faster.

    Raises UsageError for an unknown backend or kind of cache, FileError when the memory is too small or weights are NaN, and
    NativeUnavailable where "native" was asked for by name and cannot run here.
    """
    one_of("backend", backend, BACKENDS)
    one_of("kv", kv, KINDS)
    for name in plan.weights:
        if tensors[name].format.dequantize is None:
            tensors[name].to_float32()  # raises the error that names the format
    if backend != "numpy":
        from pocketlm.runtime.native.executor import NativeExecutor, NativeUnavailable

        try:
            memory.require(path, partial(NativeExecutor.memory, plan, tensors, n_threads=n_threads, kv=kv), n_ctx)
            executor = NativeExecutor(plan, tensors, n_ctx, n_threads, kv)
            if may_use_fewer:
                executor.use_fewer_threads(path)
            return executor
        except NativeUnavailable as reason:
            if backend == "native":
                raise
            print(f"pocketlm: running on NumPy, which is slower: {reason}", file=sys.stderr)
    from pocketlm.runtime.numpy_executor import NumpyExecutor

    memory.require(path, partial(NumpyExecutor.memory, plan, tensors, n_threads=n_threads, kv=kv), n_ctx)
    return NumpyExecutor(plan, tensors, n_ctx, n_threads, kv)
