"""BLOOM (arXiv:2211.05100): GPT-2 with ALiBi in place of positions, and a LayerNorm behind the token table."""

from pocketlm.runtime.architectures.common import GPT2, Builder, pre_norm

USUAL = {**GPT2, "position": "alibi"}


def operations(m: Builder) -> None:
    def embed(m: Builder) -> None:
        m.embed()
        m.norm("token_embd_norm", "x", "x")

    pre_norm(m, embed=embed)
