"""BLOOM (arXiv:2211.05100): GPT-2 with ALiBi in place of positions, and a LayerNorm behind the token table."""

from __future__ import annotations

from typing import Any

from pocketlm.runtime.architectures.common import Builder

USUAL: dict[str, Any] = {"norm": "layer", "position": "alibi", "activation": "gelu_tanh", "gated": False}
SETTINGS: tuple[str, ...] = ()


def operations(m: Builder) -> None:
    m.embed()
    m.norm("token_embd_norm", "x", "x")
    for b in m.layers():
        b.norm("attn_norm")
        b.attention()
        b.add()
        b.norm("ffn_norm")
        b.feed_forward()
        b.add()
    m.norm("output_norm")
    m.logits()
