"""Phi-1, 1.5 and 2 (arXiv:2306.11644): attention and feed-forward side by side, both from one LayerNorm; biases everywhere."""

from __future__ import annotations

from typing import Any

from pocketlm.runtime.architectures.common import Builder

USUAL: dict[str, Any] = {"norm": "layer", "position": "rope", "rope_pairs": "half", "activation": "gelu_tanh", "gated": False}
SETTINGS: tuple[str, ...] = ()


def operations(m: Builder) -> None:
    m.embed()
    for b in m.layers():
        b.norm("attn_norm")
        b.attention()
        b.add()
        b.feed_forward()
        b.add()
    m.norm("output_norm")
    m.logits()
