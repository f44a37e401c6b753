"""GPT-2 (Radford et al. 2019): LayerNorm before each block, learned positions, GELU by the tanh formula, biases everywhere."""

from __future__ import annotations

from typing import Any

from pocketlm.runtime.architectures.common import pre_norm

USUAL: dict[str, Any] = {"norm": "layer", "position": "learned", "activation": "gelu_tanh", "gated": False}
SETTINGS: tuple[str, ...] = ()
operations = pre_norm
