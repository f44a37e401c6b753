"""Hunyuan's dense models (0.5B to 7B): a Qwen3 that normalises every head of queries and keys after it is rotated."""

from pocketlm.runtime.architectures.common import LLAMA, Builder, pre_norm

USUAL = {**LLAMA, "rope_pairs": "half"}


def operations(m: Builder) -> None:
    def attention(b: Builder) -> None:
        b.qkv()
        b.rotate()
        b.norm_heads()
        b.attend()
        b.attention_output()

    pre_norm(m, attention)
