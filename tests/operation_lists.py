"""Decoders of every kind: published architectures', and others listed here; what they compute in float64, written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from canonical_models import make_hyper

from pocketlm.runtime import operations as P
from pocketlm.runtime.architectures.common import Builder, pre_norm
from pocketlm.runtime.architectures.table import ARCHITECTURES
from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.hyper import Rope
from pocketlm.runtime.plan import Plan
from pocketlm.runtime.tensor import Tensor

N_VOCAB = 96
Operations = Callable[[Builder], None]


def make(operations: Operations, extra: dict[str, tuple[int, ...]] | None = None, **options: Any) -> Plan:
    """The plan of a small model; `extra` are tensors that `operations` uses only where they are there."""
    sizes = {"n_embd": 64, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "n_ff": 96, "n_vocab": N_VOCAB, "n_ctx": 64}
    hyper = make_hyper(**{**sizes, **options})
    wanted = Builder(hyper, extra or {}, "model")
    operations(wanted)
    shapes = {**(extra or {}), **wanted.used}
    builder = Builder(hyper, shapes, "model")
    operations(builder)
    assert builder.problems == []
    return Plan(hyper, builder.buffers, tuple(builder.ops), builder.used)


def tensors_of(plan: Plan, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 weights; norms' around 1, factors of frequencies from 1 to 4."""
    random, tensors = np.random.default_rng(seed), {}
    for name, shape in plan.weights.items():
        values = random.standard_normal(shape) * (0.3 if len(shape) == 1 else max(shape[-1], 16) ** -0.5)
        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.3 * random.standard_normal(shape)
        if name == "token_embd.weight":
            values = random.standard_normal(shape)
        if "rope" in name:
            values = random.uniform(1, 4, shape)
        data = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
        tensors[name] = Tensor(name, shape, FORMATS["F32"], data, 0, Path("model"))
    return tensors


# ── lists of operations that no architecture here has ────────────────────────────────────────────────────────────────


def olmo(m: Builder) -> None:
    m.embed()
    for b in m.layers():
        b.norm(None)
        b.attention()
        b.add()
        b.norm(None)
        b.feed_forward()
        b.add()
    m.norm(None)
    m.logits()


def routed(**options: Any) -> Operations:
    return lambda m: pre_norm(m, feed_forward=lambda b: b.experts(**options))


def _gates() -> dict[str, tuple[int, ...]]:
    return {"smear_gate.weight": (1, 24), "blk.1.attn_v_gate.weight": (2, 12), "blk.1.attn_v_embd.weight": (64, 32)}


def _fused() -> dict[str, tuple[int, ...]]:
    """Tensors of phi3: q, k and v in one, gate and up in one, factors of frequencies for short and long contexts."""
    shapes: dict[str, tuple[int, ...]] = {"rope_factors_short.weight": (4,), "rope_factors_long.weight": (4,)}
    for i in range(2):
        shapes |= {f"blk.{i}.attn_qkv.weight": (128, 64), f"blk.{i}.ffn_up.weight": (192, 64)}
    return shapes


def _biases() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"output_norm.bias": (64,), "token_embd_norm.bias": (64,)}
    widths = {
        "attn_norm": 64, "attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64, "ffn_norm": 64, "ffn_up": 96,
        "ffn_down": 64,
    }  # fmt: skip
    for i in range(2):
        shapes |= {f"blk.{i}.{name}.bias": (n,) for name, n in widths.items()}
    return shapes


def _without(names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in _biases().items() if not any(part in name for part in names.split())}


def _own_norms() -> dict[str, tuple[int, ...]]:
    """Of stablelm: one after the other, heads normalised."""
    shapes: dict[str, tuple[int, ...]] = {"attn_q_norm": (4, 16), "ffn_norm": (64,)}
    return {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in shapes.items()}


def _expert_biases(n_ff: int) -> dict[str, tuple[int, ...]]:
    widths = {"ffn_gate_inp": (7,), "ffn_gate_exps": (7, n_ff), "ffn_up_exps": (7, n_ff), "ffn_down_exps": (7, 64)}
    return {f"blk.{i}.{name}.bias": shape for i in range(2) for name, shape in widths.items()}


HALF = {"rope": Rope(1000.0, 16, "half")}
PART = {"rope": Rope(1000.0, 4, "half"), "norm": "layer"}
LONG = {"rope": Rope(1000.0, 8, "half", scaling="longrope", attention_factor=1.19, original_ctx=32)}
FACTORS = {"attention.scale": 0.11, "residual_scale": 0.22, "embedding_scale": 12.0, "logit_scale": 8.0}
CONVOLUTIONS = {"shortconv.l_cache": 3, "attention.head_count_kv": [0, 2]}
EXPERTS = {"expert_count": 7, "expert_used_count": 3}
GEMMA2 = {"attention.sliding_window": 7, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
GEMMA3 = {"attention.sliding_window": 5, "attention.sliding_window_pattern": 2, "rope.freq_base_swa": 100.0}
NANOCHAT = {
    "residual_scale": 0.9, "embedding_scale": 0.3, "attention.sliding_window": 9, "attention.sliding_window_pattern": [0, 1],
    "attention.scale": 0.36, "final_logit_softcapping": 15.0,
}  # fmt: skip
GATED = {"smear_scale": 0.7, "attention.value_gate_scale": 3.0, "backout_scale": 0.2, "final_logit_softcapping": 15.0}


def published(name: str, extra: dict[str, tuple[int, ...]] | None = None, **options: Any) -> Plan:
    return make(ARCHITECTURES[name].operations, extra, **options)


LISTS: dict[str, Callable[[], Plan]] = {
    "gemma3": lambda: published("gemma3", settings=GEMMA3, activation="gelu_tanh", **HALF),
    "gemma2": lambda: published("gemma2", settings=GEMMA2, activation="gelu_tanh", **HALF),
    "granite": lambda: published("granite", settings=FACTORS),
    "olmo2": lambda: published("olmo2", **HALF),
    "olmo": lambda: make(olmo, norm="layer"),
    "phi2": lambda: published("phi2", _without("token_embd_norm ffn_norm"), gated=False, activation="gelu_erf", **PART),
    "gptneox": lambda: published("gptneox", _without("token_embd_norm"), gated=False, activation="gelu_erf", **PART),
    "stablelm": lambda: published("stablelm", _own_norms(), **PART),
    "smollm3": lambda: published("smollm3", n_layer=4),
    "bloom": lambda: published("bloom", _biases(), norm="layer", position="alibi", gated=False, activation="gelu_tanh"),
    "gpt-oss": lambda: published(
        "gpt-oss", _expert_biases(36), activation="swiglu_clamped", **HALF,
        settings=EXPERTS | {"expert_feed_forward_length": 36, "attention.sliding_window": 6},
    ),
    "qwen3moe": lambda: published("qwen3moe", settings=EXPERTS | {"expert_feed_forward_length": 48}, **HALF),
    "olmoe": lambda: published("olmoe", settings=EXPERTS, **HALF),
    "mixtral": lambda: published("llama", settings=EXPERTS),
    "qwen2moe": lambda: published("qwen2moe", settings=EXPERTS | {"expert_shared_feed_forward_length": 36}, **HALF),
    "qwen2moe, a gate of one row": lambda: published(
        "qwen2moe", {f"blk.{i}.ffn_gate_inp_shexp.weight": (1, 64) for i in range(2)}, settings=EXPERTS, **HALF
    ),
    "granitemoe": lambda: published("granitemoe", settings=FACTORS | EXPERTS | {"expert_shared_feed_forward_length": 60}),
    "experts, relu": lambda: make(routed(normalised=False), settings=EXPERTS, activation="relu"),
    "experts, most of them": lambda: make(routed(), settings=EXPERTS | {"expert_used_count": 7}),
    "one expert": lambda: make(routed(normalised=False), settings={"expert_count": 1, "expert_used_count": 1}),
    "nanochat": lambda: published("nanochat", settings=NANOCHAT, gated=False, activation="relu_squared", **HALF),
    "gated": lambda: published("nanochat", _gates(), settings=GATED, gated=False, activation="relu_squared", **HALF),
    "phi3": lambda: published("phi3", _fused(), **LONG),
    "lfm2": lambda: published("lfm2", settings=CONVOLUTIONS, **HALF),
    "lfm2, odd widths, longer": lambda: published(
        "lfm2", settings=CONVOLUTIONS | {"shortconv.l_cache": 7}, n_embd=60, n_ff=52, **HALF
    ),
    "odd widths": lambda: published(
        "gemma3", settings=GEMMA3, n_embd=60, head_dim=6, n_ff=52, rope=Rope(1000.0, 6, "interleaved")
    ),
}  # fmt: skip


# ── the reference ────────────────────────────────────────────────────────────────────────────────────────────────────


def half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(np.float16).astype(np.float64)


def angles(rope: Rope, factors: np.ndarray | None, n: int) -> np.ndarray:  # plain and longrope only
    turns = rope.theta ** (-np.arange(rope.n_dims // 2) / (rope.n_dims // 2))
    return np.arange(n)[:, None] * (turns / factors if factors is not None else turns)


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "relu": lambda x: np.where(x > 0, x, 0),
    "relu_squared": lambda x: np.where(x > 0, x, 0) ** 2,
    "swiglu_clamped": lambda x: np.minimum(x, 7) / (1 + np.exp(-1.702 * np.minimum(x, 7))),
}


def reference(plan: Plan, tensors: dict[str, Tensor], ids: np.ndarray, n_ctx: int, cached=half) -> np.ndarray:
    """Logits of the whole text at once, float64, token by token where attention is; `cached`: what a key or value becomes."""
    w = {name: tensor.to_float32().astype(np.float64) for name, tensor in tensors.items()}
    n, s = len(ids), {}
    for op in plan.ops:
        if isinstance(op, P.Embed):
            rows = w[op.table][ids]
            rows = np.concatenate([0 * rows[:1], rows[:-1]]) if op.before else rows
            s[op.out] = rows + (w[op.positions][:n] if op.positions else 0)
        elif isinstance(op, P.Norm):
            rows = s[op.x].copy()
            for g in range(op.n_groups):
                at = slice(op.column + g * op.width, op.column + (g + 1) * op.width)
                x = rows[:, at]
                x = x - x.mean(1, keepdims=True) if op.kind == "layer" else x
                x = x / np.sqrt((x**2).mean(1, keepdims=True) + op.eps)
                for name, combine in ((op.weight, np.multiply), (op.bias, np.add)):
                    if name:
                        x = combine(x, w[name][g] if w[name].ndim > 1 else w[name])
                rows[:, at] = x
            s[op.out] = rows
        elif isinstance(op, P.Linear | P.Logits):
            parts = zip(op.matrix.weights, op.matrix.biases, strict=True)
            s[op.out] = np.concatenate([s[op.x] @ w[a].T + (w[b] if b else 0) for a, b in parts], 1)
        elif isinstance(op, P.Rotate):
            name = op.long_factors if op.long_factors and n_ctx > op.rope.original_ctx else op.factors
            turns = np.exp(1j * angles(op.rope, w[name] if name else None, n)) * op.rope.attention_factor
            s[op.qkv] = s[op.qkv].copy()
            for head in range(op.n_heads):
                for i in range(op.rope.n_dims // 2):
                    a, b = (2 * i, 2 * i + 1) if op.rope.pairs == "interleaved" else (i, i + op.rope.n_dims // 2)
                    a, b = head * op.head_dim + a, head * op.head_dim + b
                    z = (s[op.qkv][:, a] + 1j * s[op.qkv][:, b]) * turns[:, i]
                    s[op.qkv][:, a], s[op.qkv][:, b] = z.real, z.imag
        elif isinstance(op, P.Attend):
            s[op.out] = attention(op, s[op.qkv], w, cached)
        elif isinstance(op, P.Convolve):
            b, c, z = np.split(s[op.x], 3, 1)
            columns = zip(w[op.weight], (b * z).T, strict=True)
            s[op.out] = c * np.array([np.convolve(weight[::-1], column)[:n] for weight, column in columns]).T
        elif isinstance(op, P.Route):
            s[op.out] = np.array([routed_to(op, scores) for scores in s[op.x]])
        elif isinstance(op, P.Experts):
            s[op.out] = np.array([experts(op, x, chosen, w) for x, chosen in zip(s[op.x], s[op.chosen], strict=True)])
        elif isinstance(op, P.Mix):
            parts, weights = s[op.x].reshape(n, op.n_used, -1), s[op.chosen][:, op.n_used :]
            s[op.out] = (parts * weights[:, :, None]).sum(1)
        elif isinstance(op, P.Activate):
            x = s[op.x]
            up = x[:, op.n : 2 * op.n] if op.gated else 1
            up = np.clip(up, -7, 7) + 1 if op.gated and op.kind == "swiglu_clamped" else up
            s[op.out] = ACTIVATIONS[op.kind](x[:, : op.n]) * up
        elif isinstance(op, P.Add):
            s[op.out] = s[op.out] + op.factor * s[op.x]
        elif isinstance(op, P.Gate):
            s[op.out] = s[op.out].copy()
            for g in range(op.n_groups):
                gates = w[op.weight].reshape(op.n_groups, -1)
                share = op.factor / (1 + np.exp(-s[op.x][:, : op.n_columns] @ gates[g]))
                at = op.column + g * op.width
                s[op.out][:, at : at + op.width] += share[:, None] * s[op.y][:, g * op.width : (g + 1) * op.width]
        elif isinstance(op, P.Scale):
            s[op.out] = op.factor * s[op.x]
        elif isinstance(op, P.Softcap):
            s[op.out] = op.cap * np.tanh(s[op.x] / op.cap)
    return s["logits"]


def routed_to(op: P.Route, scores: np.ndarray) -> np.ndarray:  # of one token
    chosen = sorted(range(op.n_experts), key=lambda i: (-scores[i], i))[: op.n_used]
    shares = np.exp(scores) / np.exp(scores).sum()
    weights = shares[chosen] / (shares[chosen].sum() if op.normalised else 1)
    return np.concatenate([chosen, weights])


def experts(op: P.Experts, x: np.ndarray, chosen: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:  # of one token
    out = []
    for name, bias in zip(op.matrix.weights, op.matrix.biases, strict=True):
        for slot, number in enumerate(chosen[: op.n_used].astype(int)):
            own = x.reshape(-1, op.matrix.n_in)[slot if op.own else 0]
            out.append(w[name][number] @ own + (w[bias][number] if bias else 0))
    return np.concatenate(out)


def attention(op: P.Attend, qkv: np.ndarray, w: dict[str, np.ndarray], cached) -> np.ndarray:
    d, n = op.head_dim, len(qkv)
    heads = qkv.reshape(n, -1, d)
    q, k, v = np.split(heads, [op.n_head, op.n_head + op.n_kv_head], axis=1)
    k, v, out = cached(k), cached(v), np.zeros((n, op.n_head, d))
    for t in range(n):
        first = max(0, t - op.window + 1) if op.window else 0
        for head in range(op.n_head):
            shared = head // (op.n_head // op.n_kv_head)
            scores = op.scale * (k[first : t + 1, shared] @ q[t, head])
            scores = op.softcap * np.tanh(scores / op.softcap) if op.softcap else scores
            if op.alibi_max_bias:  # as many heads as a power of two
                scores = scores + 2.0 ** (-op.alibi_max_bias * (head + 1) / op.n_head) * (np.arange(first, t + 1) - t)
            shares = np.exp(scores)
            shares /= shares.sum() + (np.exp(w[op.sinks][head]) if op.sinks else 0)
            out[t, head] = shares @ v[first : t + 1, shared]
    return out.reshape(n, -1)
