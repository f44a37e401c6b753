"""Refact: a Llama with ALiBi (arXiv:2108.12409) in place of rotary positions."""

from __future__ import annotations

from pocketlm.runtime.architectures.common import LLAMA, pre_norm

USUAL = {**LLAMA, "position": "alibi"}
SETTINGS: tuple[str, ...] = ()
operations = pre_norm
