"""The one place that knows what an architecture is: hyper-parameters in, a short list of operations out.

Every executor runs this list, and the ONNX exporter writes it down: a new architecture is a new list, and works in all
of them. Buffers are named; each holds one row per token. The plan knows tensor names and shapes, not their values.

    x       the residual stream             [n, n_embd]
    h       normalised x                    [n, n_embd]
    qkv     queries, keys, values           [n, q_width + 2 kv_width]
    att     attention's mix of the values   [n, q_width]
    ff      feed-forward, gate before up    [n, n_ff] or [n, 2 n_ff]
    act     after the activation            [n, n_ff]
    y       what a block adds to x          [n, n_embd]
    logits                                  [rows asked for, n_vocab]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pocketlm.errors import FileError
from pocketlm.runtime.hyper import Hyper


@dataclass(frozen=True)
class Matrix:
    """Weight tensors stacked by rows, so that one product serves all: y = [W0; W1; …] x + [b0; b1; …]."""

    weights: tuple[str, ...]
    biases: tuple[str | None, ...]
    n_out: int
    n_in: int


@dataclass(frozen=True)
class Embed:
    """out = table[ids] (+ positions[position])."""

    out: str
    table: str
    positions: str | None


@dataclass(frozen=True)
class Norm:
    """LayerNorm or RMSNorm of every row, times weight (+ bias)."""

    x: str
    out: str
    kind: str  # "layer" | "rms"
    weight: str
    bias: str | None
    eps: float


@dataclass(frozen=True)
class Linear:
    """out = W x (+ bias)."""

    x: str
    out: str
    matrix: Matrix


@dataclass(frozen=True)
class Rotate:
    """Rotary positions on the queries and keys of qkv, in place."""

    qkv: str


@dataclass(frozen=True)
class Attend:
    """Write k and v to the cache; out = softmax(q kᵀ / √head_dim + ALiBi, causal) v, heads grouped over kv heads."""

    qkv: str
    out: str
    layer: int


@dataclass(frozen=True)
class Activate:
    """out = f(x), or f(gate) * up where x holds gate before up."""

    x: str
    out: str
    kind: str
    gated: bool


@dataclass(frozen=True)
class Add:
    """out += x."""

    x: str
    out: str


@dataclass(frozen=True)
class Logits:
    """The last product, for the rows asked for only."""

    x: str
    out: str
    matrix: Matrix


Op = Embed | Norm | Linear | Rotate | Attend | Activate | Add | Logits


@dataclass(frozen=True)
class Plan:
    """buffers: name -> width; ops in order; weights: every tensor the ops name -> its shape (rows, columns) or (n,)."""

    hyper: Hyper
    buffers: dict[str, int]
    ops: tuple[Op, ...]
    weights: dict[str, tuple[int, ...]]
    rope_factors: str | None  # a tensor that divides the rotary frequencies


def make_plan(hyper: Hyper, shapes: Mapping[str, tuple[int, ...]], path: object) -> Plan:
    """The operations of the model whose tensors have these `shapes` (NumPy order).

    Raises FileError that lists every missing, misshapen or left-over tensor. Biases may be there or not, one by one;
    queries, keys and values may be one tensor (`attn_qkv`) or three; a missing `output.weight` means a tied head.
    """
    used: dict[str, tuple[int, ...]] = {}
    problems: list[str] = []

    def tensor(name: str, *shape: int) -> str:
        found = shapes.get(name)
        if found is None:
            problems.append(f"{name} is missing")
        elif tuple(found) != shape:
            problems.append(f"{name} is {'x'.join(map(str, found))}, expected {'x'.join(map(str, shape))}")
        used[name] = shape
        return name

    def optional(name: str, *shape: int) -> str | None:
        return tensor(name, *shape) if name in shapes else None

    def matrix(n_in: int, *parts: tuple[str, int]) -> Matrix:
        weights = tuple(tensor(f"{name}.weight", rows, n_in) for name, rows in parts)
        biases = tuple(optional(f"{name}.bias", rows) for name, rows in parts)
        return Matrix(weights, biases, sum(rows for _, rows in parts), n_in)

    def norm(name: str) -> Norm:
        bias = optional(f"{name}.bias", width)
        return Norm("x", "h", hyper.norm, tensor(f"{name}.weight", width), bias, hyper.norm_eps)

    width, inner, q, kv = hyper.n_embd, hyper.n_ff, hyper.q_width, hyper.kv_width
    learned = tensor("position_embd.weight", hyper.n_ctx, width) if hyper.position == "learned" else None
    ops: list[Op] = [Embed("x", tensor("token_embd.weight", hyper.n_vocab, width), learned)]
    for i in range(hyper.n_layer):
        at = f"blk.{i}."
        fused = f"{at}attn_qkv.weight" in shapes
        parts = [("attn_qkv", q + 2 * kv)] if fused else [("attn_q", q), ("attn_k", kv), ("attn_v", kv)]
        ops += [norm(f"{at}attn_norm"), Linear("h", "qkv", matrix(width, *((at + n, rows) for n, rows in parts)))]
        ops += [Rotate("qkv")] if hyper.rope else []
        ops += [Attend("qkv", "att", i), Linear("att", "y", matrix(q, (f"{at}attn_output", width))), Add("y", "x")]
        parts = [("ffn_gate", inner), ("ffn_up", inner)] if hyper.gated else [("ffn_up", inner)]
        ops += [norm(f"{at}ffn_norm"), Linear("h", "ff", matrix(width, *((at + n, rows) for n, rows in parts)))]
        ops += [Activate("ff", "act", hyper.activation, hyper.gated)]
        ops += [Linear("act", "y", matrix(inner, (f"{at}ffn_down", width))), Add("y", "x")]
        if len(problems) > 100:  # an absurd layer count must not build an endless list
            break
    head = "output" if "output.weight" in shapes else "token_embd"
    ops += [norm("output_norm"), Logits("h", "logits", matrix(width, (head, hyper.n_vocab)))]
    rope_factors = optional("rope_freqs.weight", hyper.rope.n_dims // 2) if hyper.rope else None
    left_over = [name if name.isprintable() else ascii(name) for name in shapes if name not in used]
    problems += [f"{name} is not part of the architecture {hyper.architecture}" for name in left_over]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise FileError(path, "; ".join(problems[:3]) + more, "the tensors do not fit the hyper-parameters")
    ff = 2 * inner if hyper.gated else inner
    buffers = {"x": width, "h": width, "qkv": q + 2 * kv, "att": q, "ff": ff, "act": inner, "y": width, "logits": hyper.n_vocab}
    return Plan(hyper, buffers, tuple(ops), used, rope_factors)
