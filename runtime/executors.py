"""Which executor runs a plan: the choice, the memory check, and the fall-back. Knows no tokens."""

from __future__ import annotations

from collections.abc import Mapping

from pocketlm.errors import UsageError
from pocketlm.runtime import memory
from pocketlm.runtime.gguf import Tensor
from pocketlm.runtime.numpy_executor import NumpyExecutor
from pocketlm.runtime.plan import Plan

BACKENDS = ("auto", "native", "numpy")


def make_executor(backend: str, plan: Plan, tensors: Mapping[str, Tensor], n_ctx: int, n_threads: int, path: object) -> NumpyExecutor:
    """An executor of `plan`. Raises UsageError for an unknown backend, FileError when the memory is too small."""
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    memory.require(path, *NumpyExecutor.memory(plan, n_ctx), n_ctx)
    return NumpyExecutor(plan, tensors, n_ctx, n_threads)
