"""Qwen3 (arXiv:2505.09388): Qwen2 without biases, every head of queries and keys normalised before it is rotated."""

from pocketlm.runtime.architectures.common import LLAMA, WINDOW, Builder, pre_norm

USUAL = {**LLAMA, "rope_pairs": "half"}
SETTINGS = WINDOW


def operations(m: Builder) -> None:
    pre_norm(m, lambda b: b.attention(heads=b.norm_heads))
