"""A model as a short list of operations, made by its architecture's file from hyper-parameters and tensor names.

Every executor runs this list, and the ONNX exporter writes it down. Buffers that most architectures use:

    x       the residual stream             [n, n_embd]
    h       normalised x                    [n, n_embd]
    qkv     queries, keys, values           [n, q_width + 2 kv_width]
    att     attention's mix of the values   [n, q_width]
    bcz     a short convolution's inputs    [n, 3 n_embd]
    conv    what it makes of them           [n, n_embd]
    ff      feed-forward, gate before up    [n, n_ff] or [n, 2 n_ff]
    act     after the activation            [n, n_ff]
    router  scores of the experts           [n, n_experts]
    chosen  the largest, and their weights  [n, 2 n_used]
    parts   what each of them adds          [n, n_used · n_embd]
    y       what a block adds to x          [n, n_embd]
    logits                                  [rows asked for, n_vocab]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketlm.errors import FileError
from pocketlm.runtime.architectures.common import Builder
from pocketlm.runtime.architectures.table import ARCHITECTURES
from pocketlm.runtime.hyper import Hyper, read_hyper
from pocketlm.runtime.operations import Attend, Convolve, Experts, Linear, Logits, Op

OLD_EXPERTS = r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight"

@dataclass(frozen=True)
class Plan:
    """buffers: name -> width; ops in order; weights: every tensor the ops name -> its shape (rows, columns) or (n,)."""

    hyper: Hyper
    buffers: dict[str, int]
    ops: tuple[Op, ...]
    weights: dict[str, tuple[int, ...]]

    @property
    def windows(self) -> tuple[int, ...]:
        """How many positions every layer of the cache looks at, its own and those before; 0: all."""
        found = {op.layer: op.window for op in self.ops if isinstance(op, Attend)}
        found |= {op.layer: op.taps for op in self.ops if isinstance(op, Convolve)}
        return tuple(found.get(layer, 0) for layer in range(self.hyper.n_layer))

    @property
    def columns(self) -> tuple[int, ...]:
        """How many numbers of a position every layer of the cache keeps for a convolution; 0: it keeps a key and a value."""
        found = {op.layer: op.n for op in self.ops if isinstance(op, Convolve)}
        return tuple(found.get(layer, 0) for layer in range(self.hyper.n_layer)) if found else ()

    @property
    def experts(self) -> dict[str, float]:
        """Name of each tensor of experts → the share of it that one token needs."""
        ops = [op for op in self.ops if isinstance(op, Experts)]
        return {name: op.n_used / op.n_experts for op in ops for name in op.matrix.weights}

    def bytes_per_token(self, tensors: Mapping[str, Any]) -> int:
        """Bytes of the matrices that one token reads: of its experts only, not of all."""
        matrices = [op.matrix for op in self.ops if isinstance(op, Linear | Logits)]
        shares = {name: 1.0 for matrix in matrices for name in matrix.weights} | self.experts
        return int(sum(tensors[name].data.nbytes * share for name, share in shares.items()))


def make_plan(hyper: Hyper, shapes: Mapping[str, tuple[int, ...]], path: object) -> Plan:
    """The operations of the model whose tensors have these `shapes` (NumPy order).

    Raises FileError that lists every missing, misshapen or left-over tensor, or names a key that makes no sense. Biases may be
    there or not, one by one; queries, keys and values may be one tensor (`attn_qkv`) or three, gate and up one (`ffn_up`) or
    two; a missing `output.weight` means a tied head.
    """
    builder = Builder(hyper, shapes, path)
    ARCHITECTURES[hyper.architecture].operations(builder)
    if any(re.fullmatch(OLD_EXPERTS, name) for name in shapes):
        raise FileError(path, "has a tensor for every expert, as files from before April 2024", "get a newer file of the model")
    left_over = [name if name.isprintable() else ascii(name) for name in shapes if name not in builder.used]
    problems = builder.problems + [f"{name} is not part of the architecture {hyper.architecture}" for name in left_over]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise FileError(path, "; ".join(problems[:3]) + more, "the tensors do not fit the hyper-parameters")
    return Plan(hyper, builder.buffers, tuple(builder.ops), builder.used)


def read_plan(metadata: Mapping[str, Any], tensors: Mapping[str, Any], path: object) -> Plan:
    """The plan of a model file with these keys and tensors, its hyper-parameters in it. Raises FileError."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return make_plan(read_hyper(metadata, shapes.get("token_embd.weight", (0,))[0], path), shapes, path)
