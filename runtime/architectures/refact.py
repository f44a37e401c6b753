"""Refact: a Llama with ALiBi (arXiv:2108.12409) in place of rotary positions."""

from pocketlm.runtime.architectures.common import LLAMA, pre_norm

USUAL = {**LLAMA, "position": "alibi"}
operations = pre_norm
