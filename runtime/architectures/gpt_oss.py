"""gpt-oss (arXiv:2508.10925): experts with biases and a clamped gate; a share of attention goes to a sink in every head.

Every other layer sees a sliding window, beginning with the first. The authors' YaRN does not begin and end at whole pairs;
llama.cpp's does, and so does that of a file which does not say otherwise.
"""

from __future__ import annotations

from dataclasses import replace

from pocketlm.runtime.architectures.common import LLAMA, WINDOWS, Builder, pre_norm

USUAL = {**LLAMA, "rope_pairs": "half", "activation": "swiglu_clamped"}
SETTINGS: tuple[str, ...] = (
    *WINDOWS, "expert_count", "expert_used_count", "expert_feed_forward_length", "rope.scaling.truncate",
)  # fmt: skip


def operations(m: Builder) -> None:
    n_ff = m.count("expert_feed_forward_length", m.hyper.n_ff)
    rope = m.hyper.rope and replace(m.hyper.rope, truncate=bool(m.choice("rope.scaling.truncate", True, (True, False))))

    def attention(b: Builder) -> None:
        b.attention(rope=rope, window=b.window(2), sinks="attn_sinks.weight")

    pre_norm(m, attention, lambda b: b.experts(n_ff=n_ff), ffn_norm="post_attention_norm")
