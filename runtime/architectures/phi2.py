"""Phi-1, 1.5 and 2 (arXiv:2306.11644): attention and feed-forward side by side, both from one LayerNorm; biases everywhere."""

from pocketlm.runtime.architectures.common import GPT2, Builder, pre_norm

USUAL = {**GPT2, "position": "rope", "rope_pairs": "half"}


def operations(m: Builder) -> None:
    pre_norm(m, ffn_norm=None)
