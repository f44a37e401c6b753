"""Phi-3, Phi-3.5 and Phi-4-mini (arXiv:2404.14219): a Llama with rotary positions on the halves of a head.

Queries, keys and values are one tensor, gate and up another. In longer contexts than it was first trained for, tensors of
factors stretch the rotary positions (LongRoPE, arXiv:2402.13753).
"""

from pocketlm.runtime.architectures.common import LLAMA, Builder, pre_norm

USUAL = {**LLAMA, "rope_pairs": "half"}
SETTINGS = ("attention.sliding_window",)


def operations(m: Builder) -> None:
    window = int(m.number("attention.sliding_window", 0))
    pre_norm(m, lambda b: b.attention(window=window))
