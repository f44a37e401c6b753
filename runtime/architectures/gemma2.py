"""Gemma 2 (arXiv:2408.00118): Gemma with norms after each block, too, and with capped scores and logits.

Every other layer sees a window.
"""

from __future__ import annotations

import math

from pocketlm.runtime.architectures.common import LLAMA, WINDOWS, Builder

USUAL = {**LLAMA, "rope_pairs": "half", "activation": "gelu_tanh"}
SETTINGS: tuple[str, ...] = (*WINDOWS, "attn_logit_softcapping", "final_logit_softcapping")


def operations(m: Builder) -> None:
    h = m.hyper
    is_27b = h.n_layer == 46  # the only one that does not divide by the root of a head's width
    scale = (h.n_embd // h.n_head if is_27b else h.head_dim) ** -0.5
    softcap = m.number("attn_logit_softcapping", 50.0)
    m.embed()
    m.scale("x", math.sqrt(h.n_embd))
    for b in m.layers():
        b.norm("attn_norm")
        b.attention(scale=scale, softcap=softcap, window=b.window(2, 4096))
        b.norm("post_attention_norm", "y", "y")
        b.add()
        b.norm("ffn_norm")
        b.feed_forward()
        b.norm("post_ffw_norm", "y", "y")
        b.add()
    m.norm("output_norm")
    m.logits()
    if cap := m.number("final_logit_softcapping", 30.0):
        m.softcap("logits", cap)
