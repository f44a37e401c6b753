"""OLMoE (arXiv:2409.02060): a Llama of experts; all queries of a token are normalised as one vector, and all its keys.

The weights of the chosen experts are their shares among all, and do not add up to one.
"""

from __future__ import annotations

from typing import Any

from pocketlm.runtime.architectures.common import Builder

USUAL: dict[str, Any] = {
    "norm": "rms", "position": "rope", "rope_pairs": "half", "activation": "silu", "gated": True,
}  # fmt: skip
SETTINGS: tuple[str, ...] = ("expert_count", "expert_used_count")


def operations(m: Builder) -> None:
    m.embed()
    for b in m.layers():
        b.norm("attn_norm")
        b.qkv()
        b.norm_queries_and_keys()
        b.rotate()
        b.attend()
        b.attention_output()
        b.add()
        b.norm("ffn_norm")
        b.experts(normalised=False)
        b.add()
    m.norm("output_norm")
    m.logits()
