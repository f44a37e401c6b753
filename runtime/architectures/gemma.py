"""Gemma (arXiv:2403.08295): embeddings times the root of their width, and a feed-forward layer gated by GELU.

A file's norm weights hold the 1 that is added to Gemma's own.
"""

from __future__ import annotations

import math
from typing import Any

from pocketlm.runtime.architectures.common import Builder

USUAL: dict[str, Any] = {
    "norm": "rms", "position": "rope", "rope_pairs": "half", "activation": "gelu_tanh", "gated": True,
}  # fmt: skip
SETTINGS: tuple[str, ...] = ()


def operations(m: Builder) -> None:
    m.embed()
    m.scale("x", math.sqrt(m.hyper.n_embd))
    for b in m.layers():
        b.norm("attn_norm")
        b.attention()
        b.add()
        b.norm("ffn_norm")
        b.feed_forward()
        b.add()
    m.norm("output_norm")
    m.logits()
