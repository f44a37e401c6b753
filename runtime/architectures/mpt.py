"""MPT (MosaicML 2023): LayerNorm, ALiBi, GELU by the tanh formula (the authors': exact), often without any bias.

Some normalise all queries of a token as one vector, and all its keys. A bound on them and on the values (`clamp_kqv`) is
refused, and so is a scale of the activations (`ffn.act`).
"""

from pocketlm.errors import FileError
from pocketlm.runtime.architectures.common import GPT2, Builder, pre_norm

USUAL = {**GPT2, "position": "alibi"}
SETTINGS = ("attention.clamp_kqv",)


def operations(m: Builder) -> None:
    if bound := m.number("attention.clamp_kqv", 0.0):
        problem = f"bounds queries, keys and values (mpt.attention.clamp_kqv = {bound:g})"
        raise FileError(m.path, problem, "pocketlm does not compute that")
    pre_norm(m, lambda b: b.attention(heads=b.norm_queries_and_keys if b.has("attn_q_norm.weight") else None))
