"""EXAONE 4 (arXiv:2507.11407): no norm before a block, one behind it; heads normalised before they are rotated.

The 32B (64 layers) sees a sliding window in three layers of four, and rotates positions in these layers only.
"""

from pocketlm.runtime.architectures.common import LLAMA, WINDOWS, Builder, post_norm

USUAL = {**LLAMA, "rope_pairs": "half"}
SETTINGS = WINDOWS
HYBRID = 64  # layers of the models that have windows, whatever a file of another size states


def operations(m: Builder) -> None:
    is_hybrid = m.hyper.n_layer == HYBRID
    local = m.window_rope() if is_hybrid else None

    def attention(b: Builder) -> None:
        window = b.window(4, 4096) if is_hybrid else 0
        b.attention("x", rope=local, heads=b.norm_heads, rotated=bool(window) or not is_hybrid, window=window)

    post_norm(m, attention)
