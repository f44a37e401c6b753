"""StarCoder2 (arXiv:2402.19173): LayerNorm, rotary positions, GELU by the tanh formula, biases everywhere.

A file that states the sliding window of the 3B and 7B gets it; llama.cpp attends to everything.
"""

from pocketlm.runtime.architectures.common import GPT2, Builder, pre_norm

USUAL = {**GPT2, "position": "rope", "rope_pairs": "half"}
SETTINGS = ("attention.sliding_window",)


def operations(m: Builder) -> None:
    window = m.count("attention.sliding_window", m.hyper.n_ctx)
    pre_norm(m, lambda b: b.attention(window=window if window < m.hyper.n_ctx else 0))
