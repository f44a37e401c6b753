"""Llama (arXiv:2302.13971, arXiv:2407.21783), and what is built like it: SmolLM, TinyLlama, Mistral, Mixtral.

RMSNorm before each block, rotary positions on adjacent pairs, a feed-forward layer gated by SiLU; in Mixtral
(arXiv:2401.04088) a few of many such layers, chosen for each token. A file of the first Mistral (arXiv:2310.06825) may say that
it sees a sliding window.
"""

from pocketlm.runtime.architectures.common import LLAMA, WINDOW, Builder, pre_norm

USUAL = LLAMA
SETTINGS = ("expert_count", "expert_used_count", *WINDOW)


def operations(m: Builder) -> None:
    pre_norm(m, feed_forward=Builder.experts if m.number("expert_count", 0) else Builder.feed_forward)
