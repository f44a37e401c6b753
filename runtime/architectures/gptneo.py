"""GPT-Neo (EleutherAI 2021; the models of arXiv:2305.07759): GPT-2 whose scores are not divided by √head_dim.

Some layers see the last `sliding_window` positions only; `sliding_window_pattern` says which. llama.cpp has no such
architecture.
"""

from __future__ import annotations

from typing import Any

from pocketlm.runtime.architectures.common import Builder

USUAL: dict[str, Any] = {"norm": "layer", "position": "learned", "activation": "gelu_tanh", "gated": False}
SETTINGS: tuple[str, ...] = ("attention.sliding_window", "attention.sliding_window_pattern")


def operations(m: Builder) -> None:
    window, is_local = m.count("attention.sliding_window"), m.numbers("attention.sliding_window_pattern")
    m.embed()
    for b in m.layers():
        b.norm("attn_norm")
        b.attention(scale=1.0, window=window if is_local[b.layer] else 0)
        b.add()
        b.norm("ffn_norm")
        b.feed_forward()
        b.add()
    m.norm("output_norm")
    m.logits()
