"""Gemma 2 (arXiv:2408.00118): Gemma with norms after each block, too, and with capped scores and logits.

Every other layer sees a window.
"""

from pocketlm.runtime.architectures import gemma
from pocketlm.runtime.architectures.common import WINDOWS, Builder, pre_norm

USUAL = gemma.USUAL
SETTINGS = (*WINDOWS, "attn_logit_softcapping", "final_logit_softcapping")


def feed_forward(b: Builder) -> None:
    b.feed_forward()
    b.norm("post_ffw_norm", "y", "y")


def operations(m: Builder) -> None:
    h = m.hyper
    is_27b = h.n_layer == 46  # the only one that does not divide by the root of a head's width
    scale = (h.n_embd // h.n_head if is_27b else h.head_dim) ** -0.5
    local = m.window_rope()
    softcap = m.number("attn_logit_softcapping", 50.0)

    def attention(b: Builder) -> None:
        window = b.window(2, 4096)
        b.attention(rope=local if window else None, scale=scale, softcap=softcap, window=window)
        b.norm("post_attention_norm", "y", "y")

    pre_norm(m, attention, feed_forward, gemma.embed)
    if cap := m.number("final_logit_softcapping", 30.0):
        m.softcap("logits", cap)
