"""StarCoder2 (arXiv:2402.19173): LayerNorm, rotary positions, GELU by the tanh formula, biases everywhere.

A file that states the sliding window of the 3B and 7B gets it; llama.cpp attends to everything.
"""

from __future__ import annotations

from typing import Any

from pocketlm.runtime.architectures.common import Builder

USUAL: dict[str, Any] = {"norm": "layer", "position": "rope", "rope_pairs": "half", "activation": "gelu_tanh", "gated": False}
SETTINGS: tuple[str, ...] = ("attention.sliding_window",)


def operations(m: Builder) -> None:
    window = m.count("attention.sliding_window", m.hyper.n_ctx)
    m.embed()
    for b in m.layers():
        b.norm("attn_norm")
        b.attention(window=window if window < m.hyper.n_ctx else 0)
        b.add()
        b.norm("ffn_norm")
        b.feed_forward()
        b.add()
    m.norm("output_norm")
    m.logits()
