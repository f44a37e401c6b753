"""SmolLM3: a Llama that has no positions in every fourth layer (NoPE, arXiv:2501.18795)."""

from __future__ import annotations

from typing import Any

from pocketlm.runtime.architectures.common import Builder

USUAL: dict[str, Any] = {
    "norm": "rms", "position": "rope", "rope_pairs": "interleaved", "activation": "silu", "gated": True,
}  # fmt: skip
SETTINGS: tuple[str, ...] = ()


def operations(m: Builder) -> None:
    m.embed()
    for b in m.layers():
        b.norm("attn_norm")
        b.qkv()
        if (b.layer + 1) % 4:
            b.rotate()
        b.attend()
        b.attention_output()
        b.add()
        b.norm("ffn_norm")
        b.feed_forward()
        b.add()
    m.norm("output_norm")
    m.logits()
