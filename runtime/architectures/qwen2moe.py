"""Qwen 1.5's and 2's mixtures of experts (arXiv:2407.10671): Qwen2 with a few of many experts, and one that all tokens share.

The weights of the chosen experts are their shares among all, and do not add up to one; the shared expert has a gate.
"""

from pocketlm.runtime.architectures.common import LLAMA, Builder, pre_norm

USUAL = {**LLAMA, "rope_pairs": "half"}
SETTINGS = (
    "expert_count", "expert_used_count", "expert_feed_forward_length", "expert_shared_feed_forward_length",
)  # fmt: skip


def operations(m: Builder) -> None:
    n_ff = m.count("expert_feed_forward_length", max(m.hyper.n_ff // m.count("expert_used_count"), 1))
    n_shared = m.count("expert_shared_feed_forward_length", m.hyper.n_ff)

    def feed_forward(b: Builder) -> None:
        b.experts(n_ff=n_ff, normalised=False)
        b.shared_expert(n_shared, "ffn_gate_inp_shexp")

    pre_norm(m, feed_forward=feed_forward)
