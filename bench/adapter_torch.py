"""PyTorch in float32, built from the plan with the dequantised weights: eager, or compiled by Inductor, with a KV cache.

One function is one layer and takes its weights as arguments, so that compiling it once serves every layer. The cache is
allocated once and written in place; a prompt's attention is PyTorch's fused one, a single token's is two batched
products in which the heads of a group share their keys.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pocketlm.bench.protocol import Skipped
from pocketlm.runtime import operations as P
from pocketlm.runtime.hyper import read_hyper
from pocketlm.runtime.plan import make_plan
from pocketlm.runtime.positions import alibi_slopes, rope_tables

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "relu": F.relu, "gelu_erf": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip

UNKNOWN = {  # what else these operations can be
    P.Attend: "attention with windows, softcaps or sinks", P.Norm: "norms of parts of a row, or without weights",
    P.Add: "scaled residuals",
}  # fmt: skip


class Torch:
    def __init__(self, path: str, n_threads: int, n_ctx: int, compiled: bool = False):
        if compiled and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "c++", "clang++", "cl")):
            raise Skipped("torch.compile needs a C++ compiler, and there is none: install g++ or clang")
        torch.set_num_threads(n_threads)
        saved = torch.load(path, mmap=True, weights_only=True)
        weights: dict[str, Tensor] = saved["weights"]
        hyper = read_hyper(saved["metadata"], weights["token_embd.weight"].shape[0], path)
        plan = make_plan(hyper, saved["shapes"], path)
        self._embed, *blocks, norm, head = plan.ops
        layers = _layers(blocks)
        if any(_without_names(layer) != _without_names(layers[0]) for layer in layers):
            raise Skipped("the adapter for PyTorch runs models whose layers are alike")
        self._weights = weights
        self._layer_weights = [_weights(layer, weights) for layer in layers]
        self._head, self._head_weights = make_layer([norm, head]), _weights([norm, head], weights)
        self._layer = self._eager = make_layer(layers[0])
        if compiled:
            self._layer = torch.compile(self._eager, dynamic=True)  # lengths change with every token
        shape = (hyper.n_layer, hyper.n_kv_head, n_ctx, hyper.head_dim)
        self._keys, self._values, self._length = torch.zeros(shape), torch.zeros(shape), 0
        self._rope = self._slopes = None
        for table in rope_tables(plan.ops, lambda name: weights[name].numpy(), n_ctx).values():
            self._rope = torch.from_numpy(table)
        if hyper.alibi_max_bias:
            self._slopes = torch.from_numpy(alibi_slopes(hyper.n_head, hyper.alibi_max_bias))[:, None, None]
        how = "one layer compiled by Inductor with dynamic shapes" if compiled else "eager"
        self.facts = {
            "version": f"torch {torch.__version__}",
            "build": f"{torch.backends.cpu.get_cpu_capability()}, MKL {'yes' if torch.backends.mkl.is_available() else 'no'}",
            "settings": f"{n_threads} threads, float32, inference mode, {how}",
        }

    def truncate(self, length: int) -> None:
        self._length = length

    @torch.inference_mode()
    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        start, total = self._length, self._length + len(ids)
        assert isinstance(self._embed, P.Embed)
        x = self._weights[self._embed.table][torch.from_numpy(ids.astype(np.int64))]
        if self._embed.positions:
            x = x + self._weights[self._embed.positions][start:total]
        rope = None if self._rope is None else self._rope[start:total, :, None]
        bias = self._bias(len(ids), start, total)
        layer = self._layer if total > 1 else self._eager  # a length of one would be compiled apart
        for i, weights in enumerate(self._layer_weights):
            x = layer(x, self._keys[i, :, :total], self._values[i, :, :total], rope, bias, weights)
        self._length = total
        return self._head(x if rows == "all" else x[-1:], None, None, None, None, self._head_weights).numpy()

    def _bias(self, n: int, start: int, total: int) -> Tensor | None:
        """What is added to the scores, [heads or 1, n, total]; None where causality alone says it all."""
        if self._slopes is None and (n == 1 or start == 0):
            return None
        distance = torch.arange(total) - torch.arange(start, total)[:, None]
        bias = torch.zeros(1, 1, 1) if self._slopes is None else self._slopes * distance
        return bias.masked_fill(distance > 0, -torch.inf)

    def close(self) -> None:
        self._layer_weights.clear()


def _layers(ops: list[P.Op]) -> list[list[P.Op]]:
    """The operations layer by layer; each ends with its second `Add`."""
    ends = [i + 1 for i, op in enumerate(ops) if isinstance(op, P.Add)][1::2]
    return [ops[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _without_names(ops: list[P.Op]) -> list[P.Op]:
    """The operations without what has to differ from layer to layer; Skipped for one that `make_layer` does not know."""
    plain: list[P.Op] = []
    for op in ops:
        if isinstance(op, P.Norm) and op.weight and op.n_groups == 1:
            plain.append(replace(op, weight="", bias=op.bias and ""))
        elif isinstance(op, P.Linear):
            plain.append(replace(op, matrix=op.matrix.n_out))  # type: ignore[arg-type]
        elif isinstance(op, P.Attend) and not (op.window or op.softcap or op.sinks):
            plain.append(replace(op, layer=0))
        elif isinstance(op, P.Rotate | P.Activate) or (isinstance(op, P.Add) and op.factor == 1):
            plain.append(op)
        else:
            what = UNKNOWN.get(type(op), f"the operation {type(op).__name__}")
            raise Skipped(f"the adapter for PyTorch does not know {what}")
    return plain


def _weights(ops: list[P.Op], weights: dict[str, Tensor]) -> list[Tensor | None]:
    """Weight and bias of every operation that has them, in order, named and transposed as convert.py stacks them."""
    found: list[Tensor | None] = []
    for op in ops:
        if isinstance(op, P.Norm):
            found += [weights[op.weight] if op.weight else None, weights[op.bias] if op.bias else None]
        elif isinstance(op, P.Linear | P.Logits):
            name = "+".join(op.matrix.weights)
            found += [weights[f"{name}:T"], weights.get(f"{name}:bias")]
    return found


Layer = Callable[[Tensor, Any, Any, Any, Any, list[Any]], Tensor]


def make_layer(ops: list[P.Op]) -> Layer:
    """Those operations as one function: x [n, n_embd], the layer's keys and values [n_kv_head, total, head_dim], which end
    with n positions to be written, cos and sin [n, 2, 1, half], bias of the scores, weights -> the last op's output.
    """

    def rotate(op: P.Rotate, qkv: Tensor, rope: Tensor) -> Tensor:  # [n, qkv] -> [n, qkv]
        d, width = op.head_dim, op.n_heads * op.head_dim
        heads = qkv[:, :width].view(len(qkv), -1, d)
        n_dims, cos, sin = op.rope.n_dims, rope[:, 0], rope[:, 1]
        if op.rope.pairs == "interleaved":
            a, b = heads[..., 0:n_dims:2], heads[..., 1:n_dims:2]
            turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
        else:
            a, b = heads[..., : n_dims // 2], heads[..., n_dims // 2 : n_dims]
            turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
        turned = torch.cat((turned, heads[..., n_dims:]), -1) if n_dims < d else turned
        return torch.cat((turned.reshape(len(qkv), -1), qkv[:, width:]), -1)

    def attend(op: P.Attend, qkv: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:  # -> [n, q_width]
        n, d, q_width, kv_width = qkv.shape[0], op.head_dim, op.n_head * op.head_dim, op.n_kv_head * op.head_dim
        q, k, v = qkv.split((q_width, kv_width, kv_width), -1)
        keys[:, -n:], values[:, -n:] = (part.view(n, op.n_kv_head, d).transpose(0, 1) for part in (k, v))
        if n > 1:
            q, grouped = q.view(n, op.n_head, d).transpose(0, 1), op.n_head != op.n_kv_head
            mask = None if bias is None else bias[None]
            mix = F.scaled_dot_product_attention(
                q[None], keys[None], values[None], mask, is_causal=bias is None, enable_gqa=grouped, scale=op.scale
            )
            return mix[0].transpose(0, 1).reshape(n, q_width)
        scores = (q.view(op.n_kv_head, -1, d) * op.scale) @ keys.transpose(1, 2)  # [n_kv_head, group, total]
        if bias is not None:
            scores = scores + bias.view(op.n_kv_head, -1, keys.shape[1])
        return (scores.softmax(-1) @ values).view(1, q_width)

    def norm(op: P.Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if op.kind == "layer":
            return F.layer_norm(x, (op.width,), weight, bias, op.eps)
        y = F.rms_norm(x, (op.width,), weight, op.eps)
        return y if bias is None else y + bias

    def product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:  # [n, n_in], [n_in, n_out] -> [n, n_out]
        return x @ matrix if bias is None else torch.addmm(bias, x, matrix)

    def activate(op: P.Activate, x: Tensor) -> Tensor:
        if not op.gated:
            return ACTIVATIONS[op.kind](x)
        gate, up = x.chunk(2, -1)
        return ACTIVATIONS[op.kind](gate) * up

    def layer(x: Tensor, keys: Any, values: Any, rope: Any, bias: Any, weights: list[Any]) -> Tensor:
        state, given, out = {"x": x}, iter(weights), "x"
        for op in ops:
            out = op.qkv if isinstance(op, P.Rotate) else op.out
            if isinstance(op, P.Norm):
                state[out] = norm(op, state[op.x], next(given), next(given))
            elif isinstance(op, P.Rotate):
                state[out] = rotate(op, state[op.qkv], rope)
            elif isinstance(op, P.Attend):
                state[out] = attend(op, state[op.qkv], keys, values, bias)
            elif isinstance(op, P.Activate):
                state[out] = activate(op, state[op.x])
            elif isinstance(op, P.Add):
                state[out] = state[out] + state[op.x]
            elif isinstance(op, P.Linear | P.Logits):
                state[out] = product(state[op.x], next(given), next(given))
        return state[out]

    return layer
