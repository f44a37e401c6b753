"""GPT-Neo (EleutherAI 2021; the models of arXiv:2305.07759): GPT-2 whose scores are not divided by √head_dim.

Some layers see the last `sliding_window` positions only; `sliding_window_pattern` says which. llama.cpp has no such
architecture.
"""

from pocketlm.runtime.architectures.common import GPT2, Builder, pre_norm

USUAL = GPT2
SETTINGS = ("attention.sliding_window", "attention.sliding_window_pattern")


def operations(m: Builder) -> None:
    window, is_local = m.count("attention.sliding_window"), m.numbers("attention.sliding_window_pattern")
    pre_norm(m, lambda b: b.attention(scale=1.0, window=window if is_local[b.layer] else 0))
