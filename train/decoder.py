"""The decoder, configurable over everything the runtime's plan covers. Ids in, logits out; knows no text and no training."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pocketlm.runtime.positions import alibi_slopes
from pocketlm.train.presets import Shape

ACTIVATIONS = {"silu": F.silu, "gelu_erf": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
ALIBI_MAX_BIAS = 8.0


def norm(shape: Shape) -> nn.Module:
    if shape.norm == "rms":
        return nn.RMSNorm(shape.n_embd, shape.norm_eps)
    return nn.LayerNorm(shape.n_embd, shape.norm_eps, bias=shape.bias)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [b, heads, n, d], [n, d/2] -> [b, heads, n, d]
    """Rotary positions (arXiv:2104.09864): value i turns with value i + d/2."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.head_dim, self.n_shared = shape.n_embd // shape.n_head, shape.n_head // shape.n_kv_head
        kv_width = shape.n_kv_head * self.head_dim
        self.q_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=shape.bias)
        self.k_proj = nn.Linear(shape.n_embd, kv_width, bias=shape.bias)
        self.v_proj = nn.Linear(shape.n_embd, kv_width, bias=shape.bias)
        self.o_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, bias: Tensor | None) -> Tensor:
        # [b, n, n_embd], cos and sin [n, head_dim/2], what is added to scores [1, n_head, n, n] -> [b, n, n_embd]
        b, n, _ = x.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).view(b, n, -1, self.head_dim).transpose(1, 2) for project in projections)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        k, v = (t.repeat_interleave(self.n_shared, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None)
        return self.o_proj(y.transpose(1, 2).reshape(b, n, -1))


class FeedForward(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.act = ACTIVATIONS[shape.activation]
        self.gate_proj = nn.Linear(shape.n_embd, shape.n_ff, bias=shape.bias) if shape.gated else None
        self.up_proj = nn.Linear(shape.n_embd, shape.n_ff, bias=shape.bias)
        self.down_proj = nn.Linear(shape.n_ff, shape.n_embd, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:  # [..., n_embd] -> the same
        up = self.up_proj(x)
        return self.down_proj(self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up)


class Layer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.attn_norm, self.attn = norm(shape), Attention(shape)
        self.ffn_norm, self.ffn = norm(shape), FeedForward(shape)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, bias: Tensor | None, drop: nn.Module) -> Tensor:
        x = x + drop(self.attn(self.attn_norm(x), rope, bias))
        return x + drop(self.ffn(self.ffn_norm(x)))


class Decoder(nn.Module):
    """`dropout` acts on the embedding and on what every sub-layer adds. `checkpointing` (arXiv:1604.06174): keep each layer's
    input alone, and compute the layer again for its gradients."""

    def __init__(self, shape: Shape, dropout: float = 0.0, checkpointing: bool = False):
        super().__init__()
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.alibi: Tensor
        self.layers: Any
        self.shape, self.drop, self.checkpointing = shape, nn.Dropout(dropout), checkpointing
        self.tok_emb = nn.Embedding(shape.n_vocab, shape.n_embd)
        self.pos_emb = nn.Embedding(shape.n_ctx, shape.n_embd) if shape.position == "learned" else None
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.n_layer))
        self.out_norm = norm(shape)
        self.head = None if shape.tied else nn.Linear(shape.n_embd, shape.n_vocab, bias=False)
        for name, weight in self.named_parameters():  # what is added to the stream grows with depth (GPT-2, section 2.3)
            scale = math.sqrt(2 * shape.n_layer) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02 / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
        half = shape.n_embd // shape.n_head // 2
        frequencies = shape.rope_theta ** (-torch.arange(half).double() / max(half, 1))
        angles = torch.outer(torch.arange(shape.n_ctx).double(), frequencies).float()
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)
        self.register_buffer("alibi", torch.from_numpy(alibi_slopes(shape.n_head, ALIBI_MAX_BIAS)), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:  # int64 [b, n] -> float [b, n, n_vocab]
        n, position = ids.shape[1], self.shape.position
        x = self.tok_emb(ids)
        if self.pos_emb is not None:
            x = x + self.pos_emb.weight[:n]
        rope = (self.rope_cos[:n], self.rope_sin[:n]) if position == "rope" else None
        bias = self.alibi_bias(n).to(x.dtype) if position == "alibi" else None
        x = self.drop(x)
        for layer in self.layers:
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, rope, bias, self.drop, use_reentrant=False)
            else:
                x = layer(x, rope, bias, self.drop)
        return F.linear(self.out_norm(x), self.tok_emb.weight if self.head is None else self.head.weight)

    def alibi_bias(self, n: int) -> Tensor:  # -> float32 [1, n_head, n, n]
        """What ALiBi (arXiv:2108.12409) adds to scores [query, key]: a hard -inf ahead, -slope · distance behind."""
        at = torch.arange(n, device=self.alibi.device)
        ahead = at[None] - at[:, None]
        return (self.alibi[:, None, None] * ahead).masked_fill(ahead > 0, -math.inf)[None]
