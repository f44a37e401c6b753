"""nanochat: norms without weights, the one of queries and keys after their rotation, squared ReLU.

Before a layer x becomes residual_scale · x + embedding_scale · (the embedding), with numbers of the layer's own. Since January
2026 the values of every other layer get an embedding of the token, gated; since March every token's embedding gets some of
the one before (smear), and what a middle layer has made is taken back at the end (backout). llama.cpp has no such architecture.
"""

from pocketlm.runtime.architectures.common import LLAMA, Builder

USUAL = {**LLAMA, "rope_pairs": "half", "activation": "relu_squared", "gated": False}
SETTINGS = (
    "residual_scale", "embedding_scale", "attention.sliding_window", "attention.sliding_window_pattern",
    "final_logit_softcapping", "attention.scale", "attention.value_gate_scale", "smear_scale", "backout_scale",
)  # fmt: skip


def operations(m: Builder) -> None:
    residual, embedding = m.numbers("residual_scale", 1.0), m.numbers("embedding_scale", 0.0)
    is_local, window = m.numbers("attention.sliding_window_pattern", 0.0), m.count("attention.sliding_window", 1)
    scale, backout = m.number("attention.scale", m.hyper.head_dim**-0.5, 1e-12), m.number("backout_scale", 0.0, -1e12)
    m.embed()
    m.norm(None, "x", "x")
    if m.has("smear_gate.weight"):
        m.embed_before("before")
        m.norm(None, "before", "before")
        m.gate("smear_gate", "x", "before", "x", m.number("smear_scale", low=-1e12))
    if any(embedding):
        m.scale("x", 1.0, out="x0")
    for b in m.layers():
        if residual[b.layer] != 1:
            b.scale("x", residual[b.layer])
        if embedding[b.layer]:
            b.add("x0", "x", factor=embedding[b.layer])
        b.norm(None)
        b.qkv()
        b.embed_values(m.number("attention.value_gate_scale", 1.0))
        b.rotate()
        b.norm_heads(None, None)
        b.attend(scale=scale, window=window if is_local[b.layer] else 0)
        b.attention_output()
        b.add()
        b.norm(None)
        b.feed_forward()
        b.add()
        if backout and b.layer == m.hyper.n_layer // 2:
            m.scale("x", 1.0, out="backout")
    if backout:
        m.add("backout", "x", factor=-backout)
    m.norm(None)
    m.logits()
    m.softcap("logits", m.number("final_logit_softcapping", low=1e-6))
