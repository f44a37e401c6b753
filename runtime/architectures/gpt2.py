"""GPT-2 (Radford et al. 2019): LayerNorm before each block, learned positions, GELU by the tanh formula, biases everywhere."""

from pocketlm.runtime.architectures.common import GPT2, pre_norm

USUAL = GPT2
operations = pre_norm
