"""StableLM (Stability AI 2023; StableLM 2, arXiv:2402.17834): a Llama with LayerNorm that rotates a part of every head.

A layer without `ffn_norm` is parallel: the feed-forward takes what attention takes. The 12B normalises heads, each by itself.
"""

from functools import partial

from pocketlm.runtime.architectures.common import LLAMA, Builder, pre_norm

USUAL = {**LLAMA, "norm": "layer", "rope_pairs": "half"}
SETTINGS = ("use_parallel_residual",)  # what llama.cpp wants to see there; the tensors say it, too


def operations(m: Builder) -> None:
    def attention(b: Builder) -> None:
        b.attention(heads=partial(b.norm_heads, own=True) if b.has("attn_q_norm.weight") else None)

    def feed_forward(b: Builder) -> None:
        if b.has("ffn_norm.weight"):
            b.norm("ffn_norm")
        b.feed_forward()

    pre_norm(m, attention, feed_forward, ffn_norm=None)
