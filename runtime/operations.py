"""The operations that a decoder is made of. What an operation does stands on it, so that layers may differ.

Every executor runs each of them on its own, and the ONNX exporter writes each down. Buffers are named; each holds one row
per token. An operation knows the names of tensors, not their values.
"""

from __future__ import annotations

from dataclasses import dataclass

from pocketlm.runtime.hyper_parameters import Rope


@dataclass(frozen=True)
class Matrix:
    """Weight tensors stacked by rows, so that one product serves all: y = [W0; W1; …] x + [b0; b1; …]."""

    weights: tuple[str, ...]
    biases: tuple[str | None, ...]
    n_out: int
    n_in: int


@dataclass(frozen=True)
class Embed:
    """out = table[ids] (+ positions[position]). With `before` the id of the token before, and zeros where there is none."""

    out: str
    table: str
    positions: str | None = None
    before: bool = False


@dataclass(frozen=True)
class Norm:
    """LayerNorm or RMSNorm, times weight, plus bias where there are any.

    Columns [column, column + n_groups · width) of x go to the same of out; each group of `width` columns is a vector that is
    normalised by itself, such as a head. `weight` and `bias` are (width,), or (n_groups, width) where groups have their own.
    With more columns than these, out is x.
    """

    x: str
    out: str
    kind: str  # "layer" | "rms"
    weight: str | None
    bias: str | None
    eps: float
    width: int
    n_groups: int = 1
    column: int = 0


@dataclass(frozen=True)
class Linear:
    """out = W x (+ bias). out is not x."""

    x: str
    out: str
    matrix: Matrix


@dataclass(frozen=True)
class Rotate:
    """Rotary positions on the first n_heads heads of qkv (the queries and keys), in place.

    `factors` is a tensor (n_dims / 2,) that divides the frequencies; `long_factors` takes its place where the context is
    longer than rope.original_ctx. Operations with equal parameters share a table.
    """

    qkv: str
    n_heads: int
    head_dim: int
    rope: Rope
    factors: str | None = None
    long_factors: str | None = None


@dataclass(frozen=True)
class Attend:
    """Write k and v to the cache; out = softmax(scores) v, causal, heads grouped over kv heads.

    scores = scale · q kᵀ; softcap > 0: softcap · tanh(scores / softcap); then ALiBi's penalty where alibi_max_bias > 0.
    window > 0: a query sees its own position and window - 1 before it. `sinks` is a tensor (n_head,) of one more score for
    every head, which takes its share and has no value.
    """

    qkv: str
    out: str
    layer: int  # of the cache; all layers have the same heads
    n_head: int
    n_kv_head: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    alibi_max_bias: float = 0.0
    sinks: str | None = None


@dataclass(frozen=True)
class Convolve:
    """A gated short convolution: out = C · conv(B · z), where x holds n columns of B, n of C and n of z.

    Every column by itself, causal: conv(v)[t] = Σ_j weight[:, j] · v[t - taps + 1 + j], zeros before the text. The last columns
    of B · z are the layer's state, which the cache keeps as it does keys and values. `weight` is (n, taps).
    """

    x: str
    out: str
    layer: int  # of the cache
    weight: str
    n: int
    taps: int


@dataclass(frozen=True)
class Activate:
    """out = f(x), or f(gate) * up where x holds n columns of gate before n of up (activations.beside: what becomes of up)."""

    x: str
    out: str
    kind: str  # a name in activations.ACTIVATIONS
    gated: bool
    n: int


@dataclass(frozen=True)
class Add:
    """out += factor · x."""

    x: str
    out: str
    factor: float = 1.0


@dataclass(frozen=True)
class Gate:
    """out += factor · sigmoid(W x') · y, group by group; x' is the first `columns` columns of x.

    `weight` is (n_groups, columns). Each group has `width` columns of y and of out; in out they begin at `column`.
    """

    x: str
    y: str
    out: str
    weight: str
    n_columns: int
    width: int
    n_groups: int = 1
    column: int = 0
    factor: float = 1.0


@dataclass(frozen=True)
class Scale:
    """out = factor · x. With a factor of 1, a copy."""

    x: str
    out: str
    factor: float


@dataclass(frozen=True)
class Softcap:
    """out = cap · tanh(x / cap)."""

    x: str
    out: str
    cap: float


@dataclass(frozen=True)
class Route:
    """Which experts a token goes to: out = the numbers of the n_used largest of x, largest first, then their weights.

    Of equal ones the lower number comes first. Weights are the softmax over all of x; with `normalised`, divided
    by their sum.
    """

    x: str
    out: str
    n_experts: int
    n_used: int
    normalised: bool


@dataclass(frozen=True)
class Experts:
    """A product with the matrices of the experts that `chosen`, the result of a Route, names for each token.

    Weights are (n_experts, rows, n_in), biases (n_experts, rows). out holds, one weight tensor after the other, the rows of the
    first chosen expert, of the second, …; matrix.n_out counts the rows of one expert in all tensors. x is one row that all
    experts share or, with `own`, a row for each chosen expert. out is not x.
    """

    x: str
    out: str
    chosen: str
    matrix: Matrix
    n_experts: int
    n_used: int
    own: bool


@dataclass(frozen=True)
class Mix:
    """out = the sum of x's n_used parts, each times its weight in `chosen`."""

    x: str
    out: str
    chosen: str
    n_used: int


@dataclass(frozen=True)
class Logits:
    """The last product, for the rows asked for only. What follows works on these rows of `out`."""

    x: str
    out: str
    matrix: Matrix


Op = (
    Embed | Norm | Linear | Rotate | Attend | Convolve | Activate | Add | Gate | Scale | Softcap  # the dense ones
    | Route | Experts | Mix | Logits
)  # fmt: skip
