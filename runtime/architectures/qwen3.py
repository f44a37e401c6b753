"""Qwen3 (arXiv:2505.09388): Qwen2 without biases, every head of queries and keys normalised before it is rotated."""

from __future__ import annotations

from typing import Any

from pocketlm.runtime.architectures.common import Builder

USUAL: dict[str, Any] = {
    "norm": "rms", "position": "rope", "rope_pairs": "half", "activation": "silu", "gated": True,
}  # fmt: skip
SETTINGS: tuple[str, ...] = ()


def operations(m: Builder) -> None:
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
        b.feed_forward()
        b.add()
    m.norm("output_norm")
    m.logits()
