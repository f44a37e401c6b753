"""Qwen3's mixtures of experts (arXiv:2505.09388): Qwen3 whose feed-forward layers are a few of many, chosen for each token."""

from pocketlm.runtime.architectures.common import LLAMA, Builder, pre_norm

USUAL = {**LLAMA, "rope_pairs": "half"}
SETTINGS = ("expert_count", "expert_used_count", "expert_feed_forward_length")


def operations(m: Builder) -> None:
    n_ff = m.count("expert_feed_forward_length", max(m.hyper.n_ff // m.count("expert_used_count"), 1))
    pre_norm(m, lambda b: b.attention(heads=b.norm_heads), lambda b: b.experts(n_ff=n_ff))
