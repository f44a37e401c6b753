"""StableLM (Stability AI 2023; StableLM 2, arXiv:2402.17834): a Llama with LayerNorm that rotates a part of every head.

A layer without `ffn_norm` is parallel: the feed-forward takes what attention takes. The 12B normalises heads, each by itself.
"""

from __future__ import annotations

from typing import Any

from pocketlm.runtime.architectures.common import Builder

USUAL: dict[str, Any] = {"norm": "layer", "position": "rope", "rope_pairs": "half", "activation": "silu", "gated": True}
SETTINGS: tuple[str, ...] = ("use_parallel_residual",)  # what llama.cpp wants to see there; the tensors say it, too


def operations(m: Builder) -> None:
    m.embed()
    for b in m.layers():
        b.norm("attn_norm")
        b.qkv()
        if b.has("attn_q_norm.weight"):
            b.norm_heads(own=True)
        b.rotate()
        b.attend()
        b.attention_output()
        b.add()
        if b.has("ffn_norm.weight"):
            b.norm("ffn_norm")
        b.feed_forward()
        b.add()
    m.norm("output_norm")
    m.logits()
