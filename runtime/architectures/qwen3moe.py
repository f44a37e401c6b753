"""Qwen3's mixtures of experts (arXiv:2505.09388): Qwen3 whose feed-forward layers are a few of many, chosen for each token."""

from __future__ import annotations

from typing import Any

from pocketlm.runtime.architectures.common import Builder

USUAL: dict[str, Any] = {
    "norm": "rms", "position": "rope", "rope_pairs": "half", "activation": "silu", "gated": True,
}  # fmt: skip
SETTINGS: tuple[str, ...] = ("expert_count", "expert_used_count", "expert_feed_forward_length")


def operations(m: Builder) -> None:
    n_ff = m.count("expert_feed_forward_length", max(m.hyper.n_ff // m.count("expert_used_count"), 1))
    m.embed()
    for b in m.layers():
        b.norm("attn_norm")
        b.qkv()
        b.norm_heads()
        b.rotate()
        b.attend()
        b.attention_output()
        b.add()
        b.norm("ffn_norm")
        b.experts(n_ff=n_ff)
        b.add()
    m.norm("output_norm")
    m.logits()
