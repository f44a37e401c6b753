"""SmolLM3: a Llama that has no positions in every fourth layer (NoPE, arXiv:2501.18795)."""

from pocketlm.runtime.architectures.common import LLAMA, Builder, pre_norm

USUAL = LLAMA


def operations(m: Builder) -> None:
    pre_norm(m, lambda b: b.attention(rotated=(b.layer + 1) % 4 != 0))
