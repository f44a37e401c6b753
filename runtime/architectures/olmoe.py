"""OLMoE (arXiv:2409.02060): a Llama of experts; all queries of a token are normalised as one vector, and all its keys.

The weights of the chosen experts are their shares among all, and do not add up to one.
"""

from pocketlm.runtime.architectures.common import LLAMA, Builder, pre_norm

USUAL = {**LLAMA, "rope_pairs": "half"}
SETTINGS = ("expert_count", "expert_used_count")


def operations(m: Builder) -> None:
    pre_norm(m, lambda b: b.attention(heads=b.norm_queries_and_keys), lambda b: b.experts(normalised=False))
