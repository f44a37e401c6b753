"""What a checkpoint is once its dialect has been understood: the one form that every writer takes.

Readers and dialects produce a `CanonicalModel`; the GGUF, fp16-bin and ONNX writers consume it. Tensors carry the names
and row order of GGUF (`blk.0.attn_q.weight`, rows of q and k in interleaved rotary pairs where the architecture says so)
and are read one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.hyper import Hyper
from pocketlm.runtime.plan import Plan, make_plan
from pocketlm.runtime.tensor import Tensor


@dataclass(frozen=True)
class CanonicalTensor:
    """A tensor that is read on demand: `read` gives float32 of `shape` (NumPy's order: rows, columns), each time anew."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def changed(self, change: Callable[[np.ndarray], np.ndarray], *shape: int) -> CanonicalTensor:
        """The tensor that `change` makes of this one when it is read; `shape`: of the result, by default the same."""
        return CanonicalTensor(shape or self.shape, lambda: change(self.read()))


@dataclass(frozen=True)
class CanonicalModel:
    """`metadata`: GGUF keys general.*, tokenizer.* and pocketlm.*; the architecture's own keys are made from `hyper`."""

    hyper: Hyper
    tensors: dict[str, CanonicalTensor]
    metadata: dict[str, Any]
    dialect: str  # which row of the dialect table it was, for the receipt
    notes: list[str] = field(default_factory=list)  # things the user should know, one line each
    added: frozenset[str] = frozenset()  # tensors that are no parameters: zeros that an architecture wants, rotary factors

    def plan(self, path: object) -> Plan:
        """The model's plan. Raises FileError about `path` if the tensors do not fit the hyper-parameters."""
        return make_plan(self.hyper, {name: tensor.shape for name, tensor in self.tensors.items()}, path)


class Float32Tensors(Mapping[str, Tensor]):
    """A model's float32 weights as the tensors that executors take, each read when it is looked up."""

    def __init__(self, model: CanonicalModel, path: Path):
        self._tensors, self._path = model.tensors, path

    def __getitem__(self, name: str) -> Tensor:
        weights = np.ascontiguousarray(self._tensors[name].read(), np.float32)
        return Tensor(name, weights.shape, FORMATS["F32"], weights.reshape(-1).view(np.uint8), 0, self._path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
