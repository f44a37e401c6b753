"""Granite 3's mixtures of experts: Granite with a few of many experts, beside one that all tokens may share."""

from pocketlm.runtime.architectures import granite
from pocketlm.runtime.architectures.common import Builder

USUAL = granite.USUAL
SETTINGS = (*granite.SETTINGS, "expert_count", "expert_used_count", "expert_shared_feed_forward_length")


def operations(m: Builder) -> None:
    n_shared = int(m.number("expert_shared_feed_forward_length", 0))

    def feed_forward(b: Builder) -> None:
        b.experts()
        if n_shared:
            b.shared_expert(n_shared)

    granite.operations(m, feed_forward)
