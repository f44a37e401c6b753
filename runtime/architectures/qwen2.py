"""Qwen2 and Qwen2.5 (arXiv:2407.10671, arXiv:2412.15115).

A Llama whose rotary positions turn the halves of a head, and with biases on queries, keys and values. A file may say that
layers see a sliding window.
"""

from pocketlm.runtime.architectures.common import LLAMA, WINDOW, pre_norm

USUAL = {**LLAMA, "rope_pairs": "half"}
SETTINGS = WINDOW
operations = pre_norm
