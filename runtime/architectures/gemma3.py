"""Gemma 3 (arXiv:2503.19786): Gemma 2 with normalised heads in place of capped scores.

Five of six layers see a window and have rotary positions of their own; the sixth's reach further.
"""

from pocketlm.runtime.architectures import gemma
from pocketlm.runtime.architectures.common import WINDOWS, Builder, pre_norm
from pocketlm.runtime.architectures.gemma2 import feed_forward

USUAL = gemma.USUAL
SETTINGS = (*WINDOWS, "final_logit_softcapping")


def operations(m: Builder) -> None:
    h = m.hyper
    is_27b = h.n_layer == 62  # the only one that does not divide by the root of a head's width
    scale = (h.n_embd // h.n_head if is_27b else h.head_dim) ** -0.5
    local = m.window_rope(10000.0, scaling="none", factor=1.0)

    def attention(b: Builder) -> None:
        window = b.window(6)
        b.attention(rope=local if window else None, heads=b.norm_heads, scale=scale, window=window)
        b.norm("post_attention_norm", "y", "y")

    pre_norm(m, attention, feed_forward, gemma.embed)
    if cap := m.number("final_logit_softcapping", 0.0):
        m.softcap("logits", cap)
