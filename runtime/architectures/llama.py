"""Llama (arXiv:2302.13971, arXiv:2407.21783), and what is built like it: SmolLM, TinyLlama, Mistral.

RMSNorm before each block, rotary positions on adjacent pairs, a feed-forward layer gated by SiLU.
"""

from __future__ import annotations

from pocketlm.runtime.architectures.common import LLAMA, pre_norm

USUAL = LLAMA
SETTINGS: tuple[str, ...] = ()
operations = pre_norm
