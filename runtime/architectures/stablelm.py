"""StableLM (Stability AI 2023; StableLM 2, arXiv:2402.17834): a Llama with LayerNorm that rotates a part of every head.

A layer without `ffn_norm` is parallel: the feed-forward takes what attention takes. The 12B normalises heads, each by itself.
"""

from functools import partial

from pocketlm.runtime.architectures.common import LLAMA, Builder

USUAL = {**LLAMA, "norm": "layer", "rope_pairs": "half"}
SETTINGS = ("use_parallel_residual",)  # what llama.cpp wants to see there; the tensors say it, too


def operations(m: Builder) -> None:
    m.embed()
    for b in m.layers():
        b.norm("attn_norm")
        b.attention(heads=partial(b.norm_heads, own=True) if b.has("attn_q_norm.weight") else None)
        b.add()
        if b.has("ffn_norm.weight"):
            b.norm("ffn_norm")
        b.feed_forward()
        b.add()
    m.norm("output_norm")
    m.logits()
