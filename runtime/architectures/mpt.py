"""MPT (MosaicML 2023): LayerNorm, ALiBi, GELU by the tanh formula (the authors': exact), often without any bias.

Some normalise all queries of a token as one vector, and all its keys. A bound on them and on the values (`clamp_kqv`) is
refused, and so is a scale of the activations (`ffn.act`).
"""

from __future__ import annotations

from typing import Any

from pocketlm.errors import FileError
from pocketlm.runtime.architectures.common import Builder

USUAL: dict[str, Any] = {"norm": "layer", "position": "alibi", "activation": "gelu_tanh", "gated": False}
SETTINGS: tuple[str, ...] = ("attention.clamp_kqv",)


def operations(m: Builder) -> None:
    if bound := m.number("attention.clamp_kqv", 0.0):
        problem = f"bounds queries, keys and values (mpt.attention.clamp_kqv = {bound:g})"
        raise FileError(m.settings.path, problem, "pocketlm does not compute that")
    m.embed()
    for b in m.layers():
        b.norm("attn_norm")
        b.qkv()
        if b.has("attn_q_norm.weight"):
            b.norm_queries_and_keys()
        b.attend()
        b.attention_output()
        b.add()
        b.norm("ffn_norm")
        b.feed_forward()
        b.add()
    m.norm("output_norm")
    m.logits()
