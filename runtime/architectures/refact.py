"""Refact: a Llama with ALiBi (arXiv:2108.12409) in place of rotary positions."""

from __future__ import annotations

from typing import Any

from pocketlm.runtime.architectures.common import pre_norm

USUAL: dict[str, Any] = {"norm": "rms", "position": "alibi", "activation": "silu", "gated": True}
SETTINGS: tuple[str, ...] = ()
operations = pre_norm
