"""Gemma (arXiv:2403.08295): embeddings times the root of their width, and a feed-forward layer gated by GELU.

A file's norm weights hold the 1 that is added to Gemma's own.
"""

import math

from pocketlm.runtime.architectures.common import LLAMA, Builder, pre_norm

USUAL = {**LLAMA, "rope_pairs": "half", "activation": "gelu_tanh"}


def embed(m: Builder) -> None:
    m.embed()
    m.scale("x", math.sqrt(m.hyper.n_embd))


def operations(m: Builder) -> None:
    pre_norm(m, embed=embed)
