"""EXAONE 4 (arXiv:2507.11407): no norm before a block, one behind it; heads normalised before they are rotated.

The 32B (64 layers) sees a sliding window in three layers of four, and rotates positions in these layers only.
"""

from __future__ import annotations

from typing import Any

from pocketlm.runtime.architectures.common import Builder

USUAL: dict[str, Any] = {"norm": "rms", "position": "rope", "rope_pairs": "half", "activation": "silu", "gated": True}
SETTINGS: tuple[str, ...] = ("attention.sliding_window",)
HYBRID = 64  # layers of the models that have windows, whatever a file of another size states


def operations(m: Builder) -> None:
    is_hybrid = m.hyper.n_layer == HYBRID
    m.embed()
    for b in m.layers():
        window = b.window(4, 4096) if is_hybrid else 0
        b.qkv("x")
        b.norm_heads()
        if window or not is_hybrid:
            b.rotate()
        b.attend(window=window)
        b.attention_output()
        b.norm("post_attention_norm", "y", "y")
        b.add()
        b.feed_forward("x")
        b.norm("post_ffw_norm", "y", "y")
        b.add()
    m.norm("output_norm")
    m.logits()
