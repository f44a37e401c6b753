"""Hunyuan's dense models (0.5B to 7B): a Qwen3 that normalises every head of queries and keys after it is rotated."""

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
        b.rotate()
        b.norm_heads()
        b.attend()
        b.attention_output()
        b.add()
        b.norm("ffn_norm")
        b.feed_forward()
        b.add()
    m.norm("output_norm")
    m.logits()
