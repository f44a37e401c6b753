"""What architectures list their operations with: tensors by name, settings by key, and the usual steps of a layer.

In: hyper-parameters, the tensors' names and shapes. Out: operations, buffers, the tensors that are used, and what does not
fit. Knows no values of tensors, and no architecture by name.

A file of an architecture reads like the paper's description of a layer:

    for b in m.layers():
        b.norm("attn_norm")      # h = norm(x)
        b.attention()            # y = W_o attention(h)
        b.add()                  # x += y
        b.norm("ffn_norm")
        b.feed_forward()         # y = W_down activation(W h)
        b.add()

`m` names tensors from the whole model's, `b` from its layer's ("blk.3." comes before the name).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from pocketlm.runtime import operations as P
from pocketlm.runtime.hyper_parameters import Hyper, Rope
from pocketlm.runtime.metadata_keys import Keys

# what decoders mean by themselves, as in hyper.OPTIONS
GPT2: dict[str, Any] = {"norm": "layer", "position": "learned", "activation": "gelu_tanh", "gated": False}
LLAMA: dict[str, Any] = {
    "norm": "rms", "position": "rope", "rope_pairs": "interleaved", "activation": "silu", "gated": True,
}  # fmt: skip
# settings of an architecture that asks for `window` and `window_rope`
WINDOWS = "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"
WINDOW = WINDOWS[:2]  # of one without `window_rope`


class Builder:
    """Collects operations. A layer's builder (`layers`) adds to the same lists."""

    def __init__(self, hyper: Hyper, shapes: Mapping[str, tuple[int, ...]], path: object):
        self.hyper, self.path, self._shapes, self._prefix, self.layer = hyper, path, shapes, "", 0
        prefix = f"{hyper.architecture}."
        keys = self._keys = Keys({prefix + key: value for key, value in hyper.settings.items()}, path, prefix)
        # one of the architecture's SETTINGS: FileError where it is missing without a default, or out of bounds
        self.number, self.count, self.choice = keys.number, keys.count, keys.choice
        self.ops: list[P.Op] = []
        self.buffers: dict[str, int] = {}  # name -> width
        self.used: dict[str, tuple[int, ...]] = {}  # tensor -> the shape that it has to have
        self.problems: list[str] = []

    # ── tensors and settings ─────────────────────────────────────────────────────────────────────────────────────────

    def has(self, name: str) -> bool:
        """Whether the file has the tensor."""
        return self._prefix + name in self._shapes

    def tensor(self, name: str, *shape: int) -> str:
        """Use a tensor, which must be there and have this shape; its full name."""
        name = self._prefix + name
        found = self._shapes.get(name)
        if found is None:
            self.problems.append(f"{name} is missing")
        elif tuple(found) != shape:
            self.problems.append(f"{name} is {'x'.join(map(str, found))}, expected {'x'.join(map(str, shape))}")
        self.used[name] = shape
        return name

    def optional(self, name: str, *shape: int) -> str | None:
        """`tensor` for one that may be missing; None then."""
        return self.tensor(name, *shape) if self.has(name) else None

    def matrix(self, n_in: int, *parts: tuple[str, int]) -> P.Matrix:
        """Matrices (name without ".weight", rows) below each other, with the biases that there are."""
        weights = tuple(self.tensor(f"{name}.weight", rows, n_in) for name, rows in parts)
        biases = tuple(self.optional(f"{name}.bias", rows) for name, rows in parts)
        return P.Matrix(weights, biases, sum(rows for _, rows in parts), n_in)

    def numbers(self, key: str, default: float | None = None) -> list[float]:
        """A number for each layer among the architecture's SETTINGS; a single one is for all of them. FileError."""
        return self._keys.numbers(key, self.hyper.n_layer, default)

    # ── the whole model ──────────────────────────────────────────────────────────────────────────────────────────────

    def embed(self) -> None:
        """x = table[ids], plus the positions' rows where they are learned."""
        h = self.hyper
        learned = self.tensor("position_embd.weight", h.n_ctx, h.n_embd) if h.position == "learned" else None
        self._emit(P.Embed("x", self.tensor("token_embd.weight", h.n_vocab, h.n_embd), learned), h.n_embd)

    def embed_before(self, out: str) -> None:
        """out = table[the id of the token before], zeros for the first token."""
        h = self.hyper
        self._emit(P.Embed(out, self.tensor("token_embd.weight", h.n_vocab, h.n_embd), before=True), h.n_embd)

    def layers(self) -> Iterator[Builder]:
        """A builder for each layer, in order; `layer` says which it is."""
        for i in range(self.hyper.n_layer):
            layer = copy.copy(self)
            layer._prefix, layer.layer = f"blk.{i}.", i
            yield layer
            if len(self.problems) > 100:  # an absurd layer count must not build an endless list
                return

    def window(self, period: int, default: int = 0) -> int:
        """The layer's sliding window, where the SETTINGS have WINDOWS; 0, all positions, in every period-th.

        A file may say another period, 0 for none, or for each layer whether it has a window.
        """
        size, pattern = int(self.number(WINDOWS[0], default)), self.hyper.settings.get(WINDOWS[1])
        if isinstance(pattern, list):
            return size if self.numbers(WINDOWS[1])[self.layer] else 0
        period = int(self.number(WINDOWS[1], period))
        return 0 if period and (self.layer + 1) % period == 0 else size

    def window_rope(self, theta: float | None = None, **changes: Any) -> Rope | None:
        """The rotary positions of layers with a window: the model's with `changes`, and the base that the SETTINGS may have."""
        rope = self.hyper.rope
        return rope and replace(rope, theta=self.number(WINDOWS[2], theta or rope.theta, 1.001), **changes)

    def logits(self, x: str = "h") -> None:
        """logits = W x, with the token table where there is no output matrix."""
        head = "output" if self.has("output.weight") else "token_embd"
        self._emit(P.Logits(x, "logits", self.matrix(self.buffers[x], (head, self.hyper.n_vocab))), self.hyper.n_vocab)

    # ── single operations ────────────────────────────────────────────────────────────────────────────────────────────

    def norm(self, name: str | None, x: str = "x", out: str = "h", kind: str | None = None) -> None:
        """out = norm(x) · weight (+ bias, where there is one); without weights where `name` is None."""
        width, h = self.buffers[x], self.hyper
        weight = self.tensor(f"{name}.weight", width) if name else None
        bias = self.optional(f"{name}.bias", width) if name else None
        self._emit(P.Norm(x, out, kind or h.norm, weight, bias, h.norm_eps, width), width)

    def linear(self, x: str, out: str, *parts: tuple[str, int]) -> None:
        """out = [W0; W1; …] x (+ biases): matrices (name, rows) below each other."""
        matrix = self.matrix(self.buffers[x], *parts)
        self._emit(P.Linear(x, out, matrix), matrix.n_out)

    def add(self, x: str = "y", out: str = "x", factor: float = 1.0) -> None:
        """out += factor · x."""
        self._emit(P.Add(x, out, factor), self.buffers[x])

    def gate(
        self, name: str, x: str, y: str, out: str, factor: float = 1.0, n_groups: int = 1, column: int = 0
    ) -> None:  # fmt: skip
        """out += factor · sigmoid(W x') · y in n_groups from a column of out on; x' is as many columns of x as W has.

        The weights of one group may be a vector.
        """
        found = self._shapes.get(f"{self._prefix}{name}.weight", (self.buffers[x],))
        n_columns = min(found[-1], self.buffers[x])
        shape = (n_columns,) if n_groups == len(found) == 1 else (n_groups, n_columns)
        weight = self.tensor(f"{name}.weight", *shape)
        self.ops.append(P.Gate(x, y, out, weight, n_columns, self.buffers[y] // n_groups, n_groups, column, factor))

    def scale(self, x: str, factor: float, out: str | None = None) -> None:
        """out, or x itself, = factor · x."""
        self._emit(P.Scale(x, out or x, factor), self.buffers[x])

    def softcap(self, x: str, cap: float) -> None:
        """x = cap · tanh(x / cap)."""
        self._emit(P.Softcap(x, x, cap), self.buffers[x])

    # ── a layer ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def attention(
        self, x: str = "h", out: str = "y", rope: Rope | None = None, heads: Callable[[], None] | None = None,
        rotated: bool = True, **attend: object,
    ) -> None:  # fmt: skip
        """out = W_o attention(x): `qkv`, `rotate` (where `rotated`), `attend` and `attention_output` after each other.

        `heads`: what happens to queries and keys before they are rotated, as `norm_heads`.
        """
        self.qkv(x)
        if heads:
            heads()
        if rotated:
            self.rotate(rope)
        self.attend(**attend)  # type: ignore[arg-type]
        self.attention_output(out)

    def qkv(self, x: str = "h") -> None:
        """qkv = the queries, keys and values of x, from one tensor or three."""
        q, kv = self.hyper.q_width, self.hyper.kv_width
        fused = [("attn_qkv", q + 2 * kv)]
        self.linear(x, "qkv", *(fused if self.has("attn_qkv.weight") else [("attn_q", q), ("attn_k", kv), ("attn_v", kv)]))

    def embed_values(self, factor: float) -> None:
        """v += factor · sigmoid(attn_v_gate h) · attn_v_embd[ids], a gate a head; nothing in layers without the table."""
        h = self.hyper
        if self.has("attn_v_embd.weight"):
            self._emit(P.Embed("values", self.tensor("attn_v_embd.weight", h.n_vocab, h.kv_width)), h.kv_width)
            self.gate("attn_v_gate", "h", "values", "qkv", factor, h.n_kv_head, h.q_width + h.kv_width)

    def norm_heads(
        self, q: str | None = "attn_q_norm", k: str | None = "attn_k_norm", kind: str | None = None, own: bool = False
    ) -> None:
        """Normalise every head of queries and keys. Weights: (head_dim,), with `own` (heads, head_dim); no name: none."""
        h, column = self.hyper, 0
        for name, heads in ((q, h.n_head), (k, h.n_kv_head)):
            shape = (heads, h.head_dim) if own else (h.head_dim,)
            self._norm_part(name, shape, kind, h.head_dim, heads, column)
            column += heads * h.head_dim

    def norm_queries_and_keys(self) -> None:
        """Normalise all queries of a token as one vector, and all its keys as another."""
        h = self.hyper
        self._norm_part("attn_q_norm", (h.q_width,), None, h.q_width, 1, 0)
        self._norm_part("attn_k_norm", (h.kv_width,), None, h.kv_width, 1, h.q_width)

    def _norm_part(
        self, name: str | None, shape: tuple[int, ...], kind: str | None, width: int, groups: int, column: int
    ) -> None:
        weight = self.tensor(f"{name}.weight", *shape) if name else None
        bias = self.optional(f"{name}.bias", *shape) if name else None
        kind = kind or self.hyper.norm
        self.ops.append(P.Norm("qkv", "qkv", kind, weight, bias, self.hyper.norm_eps, width, groups, column))

    def rotate(self, rope: Rope | None = None) -> None:
        """Rotary positions on queries and keys, `rope` or the model's; nothing where the model has others."""
        h, rope = self.hyper, rope or self.hyper.rope
        if rope is not None:
            whole = copy.copy(self)
            whole._prefix = ""  # the factors are the whole model's
            half = rope.n_dims // 2
            factors = whole.optional("rope_freqs.weight", half) or whole.optional("rope_factors_short.weight", half)
            long_factors = whole.optional("rope_factors_long.weight", half)
            self.ops.append(P.Rotate("qkv", h.n_head + h.n_kv_head, h.head_dim, rope, factors, long_factors))

    def attend(
        self, scale: float | None = None, window: int | None = None, softcap: float = 0.0, alibi_max_bias: float | None = None,
        sinks: str | None = None,
    ) -> None:  # fmt: skip
        """att = attention of qkv; where they are not given, `scale` is 1/√head_dim, `window` what the SETTINGS say for the
        layer, if they say anything, and ALiBi the model's.
        """
        h = self.hyper
        op = P.Attend(
            "qkv", "att", self.layer, h.n_head, h.n_kv_head, h.head_dim,
            scale=1 / math.sqrt(h.head_dim) if scale is None else scale,
            window=self.window(0) if window is None else window, softcap=softcap,
            alibi_max_bias=h.alibi_max_bias if alibi_max_bias is None else alibi_max_bias,
            sinks=self.tensor(sinks, h.n_head) if sinks else None,
        )  # fmt: skip
        self._emit(op, h.q_width)

    def attention_output(self, out: str = "y") -> None:
        """out = W_o att."""
        self.linear("att", out, ("attn_output", self.hyper.n_embd))

    def short_convolution(self, taps: int) -> None:
        """y = W_out (C · conv(B · z)), where W_in h is B, C and z below each other."""
        n = self.hyper.n_embd
        self.linear("h", "bcz", ("shortconv.in_proj", 3 * n))
        self._emit(P.Convolve("bcz", "conv", self.layer, self.tensor("shortconv.conv.weight", n, taps), n, taps), n)
        self.linear("conv", "y", ("shortconv.out_proj", n))

    def feed_forward(self, x: str = "h", out: str = "y", n_ff: int | None = None, end: str = "") -> None:
        """out = W_down f(W_up x), or W_down (f(W_gate x) · W_up x); gate and up may be one tensor, `ffn_up`.

        `end`: of the tensors' names, and of the buffers between.
        """
        h, n, ff, act = self.hyper, n_ff or self.hyper.n_ff, f"ff{end}", f"act{end}"
        separate = h.gated and (self.has(f"ffn_gate{end}.weight") or not self._is_twice(f"ffn_up{end}.weight", n))
        parts = [(f"ffn_gate{end}", n), (f"ffn_up{end}", n)] if separate else [(f"ffn_up{end}", n * (1 + h.gated))]
        self.linear(x, ff, *parts)
        self._emit(P.Activate(ff, act, h.activation, h.gated, n), n)
        self.linear(act, out, (f"ffn_down{end}", h.n_embd))

    def shared_expert(self, n_ff: int, gate: str | None = None) -> None:
        """y += a feed-forward layer of every token's, times sigmoid(W h) where W, `gate`, is a tensor's name."""
        self.feed_forward("h", "shared", n_ff, "_shexp")
        if gate:
            self.gate(gate, "h", "shared", "y")
        else:
            self.add("shared", "y")

    def experts(self, x: str = "h", out: str = "y", n_ff: int | None = None, normalised: bool = True) -> None:
        """out = the weighted sum of feed-forward layers (gate, up, down) of `n_ff` that a router chooses for each token.

        The architecture has expert_count and expert_used_count among its SETTINGS.
        """
        h, n, k = self.hyper, self.count("expert_count"), self.count("expert_used_count")
        if k > n:
            raise self._keys.fail("expert_used_count", f"is {k}, more than the {n} experts")
        n_ff = n_ff or h.n_ff
        self.linear(x, "router", ("ffn_gate_inp", n))
        self._emit(P.Route("router", "chosen", n, k, normalised), 2 * k)
        self._experts(x, "ff", (("ffn_gate_exps", n_ff), ("ffn_up_exps", n_ff)), n, k, own=False)
        self._emit(P.Activate("ff", "act", h.activation, True, k * n_ff), k * n_ff)
        self._experts("act", "parts", (("ffn_down_exps", h.n_embd),), n, k, own=True)
        self._emit(P.Mix("parts", out, "chosen", k), h.n_embd)

    def _experts(self, x: str, out: str, parts: tuple[tuple[str, int], ...], n: int, k: int, own: bool) -> None:
        n_in = self.buffers[x] // k if own else self.buffers[x]
        weights = tuple(self.tensor(f"{name}.weight", n, rows, n_in) for name, rows in parts)
        biases = tuple(self.optional(f"{name}.bias", n, rows) for name, rows in parts)
        matrix = P.Matrix(weights, biases, sum(rows for _, rows in parts), n_in)
        self._emit(P.Experts(x, out, "chosen", matrix, n, k, own), k * matrix.n_out)

    def _is_twice(self, name: str, n: int) -> bool:
        return self._shapes.get(self._prefix + name, (0,))[0] == 2 * n

    def _emit(self, op: P.Op, width: int) -> None:
        self.ops.append(op)
        self.buffers[op.qkv if isinstance(op, P.Rotate) else op.out] = width


Step = Callable[[Builder], None]


def pre_norm(
    m: Builder, attention: Step = Builder.attention, feed_forward: Step = Builder.feed_forward, embed: Step = Builder.embed,
    ffn_norm: str | None = "ffn_norm", last_norm: str = "output_norm", factor: float = 1.0,
) -> None:  # fmt: skip
    """The decoder that GPT-2 made usual: a norm before attention and before the feed-forward layer, each added to x.

    `attention`, `feed_forward` (of a layer's builder), `embed`: what an architecture does in their place. `ffn_norm`,
    `last_norm`: what it calls these norms; without the first, the feed-forward layer takes what attention took. `factor`: of
    what is added to x.
    """
    embed(m)
    for b in m.layers():
        b.norm("attn_norm")
        attention(b)
        b.add(factor=factor)
        if ffn_norm:
            b.norm(ffn_norm)
        feed_forward(b)
        b.add(factor=factor)
    m.norm(last_norm)
    m.logits()


def post_norm(m: Builder, attention: Step) -> None:
    """The same with norms behind attention and the feed-forward layer, which take x as it is."""
    m.embed()
    for b in m.layers():
        attention(b)
        b.norm("post_attention_norm", "y", "y")
        b.add()
        b.feed_forward("x")
        b.norm("post_ffw_norm", "y", "y")
        b.add()
    m.norm("output_norm")
    m.logits()
