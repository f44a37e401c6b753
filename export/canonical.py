"""What a checkpoint is once its dialect has been understood: the one form that every writer takes.

Readers and dialects produce a `CanonicalModel`; the GGUF, fp16-bin and ONNX writers consume it. Tensors carry the names
and row order of GGUF (`blk.0.attn_q.weight`, rows of q and k in interleaved rotary pairs where the architecture says so)
and are read one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pocketlm.runtime.hyper import Hyper


@dataclass(frozen=True)
class CanonicalTensor:
    """One tensor, not yet read: `read` gives float32 of `shape` (NumPy order: rows, columns) every time it is called."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class CanonicalModel:
    """`metadata` holds GGUF keys: general.*, tokenizer.*, pocketlm.*; not the architecture's own, which `hyper` gives."""

    hyper: Hyper
    tensors: dict[str, CanonicalTensor]
    metadata: dict[str, Any]
    dialect: str  # which row of the dialect table it was, for the receipt
    notes: list[str] = field(default_factory=list)  # things the user should know, one line each
    added: frozenset[str] = frozenset()  # tensors that are no parameters: zeros that an architecture wants, rotary factors
