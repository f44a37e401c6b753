"""LFM2 (arXiv:2511.23404): gated short convolutions in most layers, attention in the others.

A convolution sees the last few positions only; `attention.head_count_kv` is 0 in its layer. Elsewhere Qwen3's attention: every
head of queries and keys normalised before it is rotated. A file may give all of them a sliding window. The last norm is called
`token_embd_norm`.
"""

from pocketlm.runtime.architectures.common import LLAMA, Builder, pre_norm

USUAL = {**LLAMA, "rope_pairs": "half"}
SETTINGS = ("attention.head_count_kv", "shortconv.l_cache", "attention.sliding_window")


def operations(m: Builder) -> None:
    n_kv_heads, taps = m.numbers("attention.head_count_kv", m.hyper.n_kv_head), m.count("shortconv.l_cache")
    window = int(m.number("attention.sliding_window", 0))

    def attention(b: Builder) -> None:
        if n_kv_heads[b.layer]:
            b.attention(heads=b.norm_heads, window=window)
        else:
            b.short_convolution(taps)

    pre_norm(m, attention, last_norm="token_embd_norm")
