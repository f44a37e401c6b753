"""OLMo 2 and OLMo 3 (arXiv:2501.00656): a Llama with norms after each block instead of before it.

All queries of a token are normalised as one vector, and all its keys. OLMo 3 sees a window in three of four layers, whose
rotary positions are not scaled.
"""

from pocketlm.runtime.architectures.common import LLAMA, WINDOWS, Builder, post_norm

USUAL = {**LLAMA, "rope_pairs": "half"}
SETTINGS = WINDOWS


def operations(m: Builder) -> None:
    local = m.window_rope(scaling="none", factor=1.0, attention_factor=1.0)

    def attention(b: Builder) -> None:
        window = b.window(4)
        b.attention("x", rope=local if window else None, heads=b.norm_queries_and_keys, window=window)

    post_norm(m, attention)
