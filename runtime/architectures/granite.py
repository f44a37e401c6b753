"""Granite 3 and 4: a Llama with factors on embeddings, on scores, on what each block adds, and on the logits."""

from pocketlm.runtime.architectures.common import LLAMA, Builder, Step, pre_norm

USUAL = LLAMA
SETTINGS = ("attention.scale", "residual_scale", "embedding_scale", "logit_scale", "rope.scaling.finetuned")


def operations(m: Builder, feed_forward: Step = Builder.feed_forward) -> None:
    """`feed_forward`: what a layer does in its place."""
    scale = m.number("attention.scale", 0.0) or None  # of scores; 1/√head_dim where the file has none
    residual = m.number("residual_scale", 1.0)
    rotated = bool(m.choice("rope.scaling.finetuned", True, (True, False)))  # Granite 4 has models without positions

    def embed(m: Builder) -> None:
        m.embed()
        m.scale("x", m.number("embedding_scale", 1.0))

    pre_norm(m, lambda b: b.attention(rotated=rotated, scale=scale), feed_forward, embed, factor=residual)
    m.scale("logits", 1 / m.number("logit_scale", low=1e-6))
