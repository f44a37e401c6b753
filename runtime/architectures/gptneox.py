"""GPT-NeoX (arXiv:2204.06745; Pythia, arXiv:2304.01373): attention and feed-forward side by side, a LayerNorm each."""

from pocketlm.runtime.architectures.common import GPT2, Builder, pre_norm

USUAL = {**GPT2, "position": "rope", "rope_pairs": "half"}
SETTINGS = ("use_parallel_residual",)


def operations(m: Builder) -> None:
    is_parallel = m.choice("use_parallel_residual", True, (True, False))

    def attention(b: Builder) -> None:
        if is_parallel:
            b.norm("ffn_norm", out="h2")
        b.attention()

    def feed_forward(b: Builder) -> None:
        if not is_parallel:
            b.norm("ffn_norm", out="h2")
        b.feed_forward("h2")

    pre_norm(m, attention, feed_forward, ffn_norm=None)
