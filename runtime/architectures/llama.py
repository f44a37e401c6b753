"""Llama (arXiv:2302.13971, arXiv:2407.21783), and what is built like it: SmolLM, TinyLlama, Mistral.

RMSNorm before each block, rotary positions on adjacent pairs, a feed-forward layer gated by SiLU.
"""

from __future__ import annotations

from typing import Any

from pocketlm.runtime.architectures.common import pre_norm

USUAL: dict[str, Any] = {
    "norm": "rms", "position": "rope", "rope_pairs": "interleaved", "activation": "silu", "gated": True,
}  # fmt: skip
SETTINGS: tuple[str, ...] = ()
operations = pre_norm
