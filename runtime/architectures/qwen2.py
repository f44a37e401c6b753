"""Qwen2 and Qwen2.5 (arXiv:2407.10671, arXiv:2412.15115).

A Llama whose rotary positions turn the halves of a head, and with biases on queries, keys and values.
"""

from __future__ import annotations

from typing import Any

from pocketlm.runtime.architectures.common import pre_norm

USUAL: dict[str, Any] = {
    "norm": "rms", "position": "rope", "rope_pairs": "half", "activation": "silu", "gated": True,
}  # fmt: skip
SETTINGS: tuple[str, ...] = ()
operations = pre_norm
