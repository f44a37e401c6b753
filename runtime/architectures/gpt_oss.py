"""gpt-oss (arXiv:2508.10925): experts with biases and a clamped gate; a share of attention goes to a sink in every head.

Every other layer sees a sliding window, beginning with the first. YaRN: the authors do not round where its ramp begins and ends
to whole pairs; llama.cpp does, and so do we unless the file says not to.
"""

from dataclasses import replace

from pocketlm.runtime.architectures.common import LLAMA, WINDOWS, Builder, pre_norm

USUAL = {**LLAMA, "rope_pairs": "half", "activation": "swiglu_clamped"}
SETTINGS = (
    *WINDOWS, "expert_count", "expert_used_count", "expert_feed_forward_length", "rope.scaling.truncate",
)  # fmt: skip


def operations(m: Builder) -> None:
    n_ff = m.count("expert_feed_forward_length", m.hyper.n_ff)
    truncate = bool(m.choice("rope.scaling.truncate", True, (True, False)))
    rope, local = m.hyper.rope and replace(m.hyper.rope, truncate=truncate), m.window_rope(truncate=truncate)

    def attention(b: Builder) -> None:
        window = b.window(2)
        b.attention(rope=local if window else rope, window=window, sinks="attn_sinks.weight")

    pre_norm(m, attention, lambda b: b.experts(n_ff=n_ff), ffn_norm="post_attention_norm")
