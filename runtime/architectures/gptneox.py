"""GPT-NeoX (arXiv:2204.06745; Pythia, arXiv:2304.01373): attention and feed-forward side by side, a LayerNorm each."""

from pocketlm.runtime.architectures.common import GPT2, Builder

USUAL = {**GPT2, "position": "rope", "rope_pairs": "half"}
SETTINGS = ("use_parallel_residual",)


def operations(m: Builder) -> None:
    is_parallel = m.choice("use_parallel_residual", True, (True, False))
    m.embed()
    for b in m.layers():
        b.norm("attn_norm")
        if is_parallel:
            b.norm("ffn_norm", out="h2")
        b.attention()
        b.add()
        if not is_parallel:
            b.norm("ffn_norm", out="h2")
        b.feed_forward("h2")
        b.add()
    m.norm("output_norm")
    m.logits()
