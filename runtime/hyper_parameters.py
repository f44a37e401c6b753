"""A decoder's hyper-parameters as plain data: of the whole model, and of rotary positions.

Knows no file, no tensor and no operation. hyper.py reads them from metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rope:
    """Rotary positions (arXiv:2104.09864) and their scaling to longer contexts (linear; YaRN, arXiv:2309.00071)."""

    theta: float  # base of the geometric frequencies
    n_dims: int  # the first n_dims of every head are rotated
    pairs: str  # "interleaved": (0,1),(2,3)…; "half": (0,d/2),(1,d/2+1)…
    scaling: str = "none"  # "none" | "linear" | "yarn" | "longrope" (its factors are tensors)
    factor: float = 1.0  # how many times longer than the original context
    original_ctx: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # YaRN: the ramp begins and ends at whole pairs


@dataclass(frozen=True)
class Hyper:
    """What a file says of a decoder as a whole, apart from its weights. Every field is checked: positive, finite, consistent.

    Norm, positions and activation are what layers take where their architecture says nothing else; what a layer does in the
    end stands on its operations.
    """

    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_ff: int
    n_vocab: int
    n_ctx: int  # positions the model was trained for
    norm: str  # "layer" | "rms"
    norm_eps: float
    position: str  # "learned" | "rope" | "alibi" | "none"
    activation: str  # a name in activations.ACTIVATIONS
    gated: bool  # act(gate) * up, as in SwiGLU
    rope: Rope | None = None
    alibi_max_bias: float = 0.0  # head i of n has slope 2^(-max_bias * (i+1) / n) where n is a power of two
    # what else the architecture asks for (its SETTINGS): keys without the architecture's name, as they stand in the file
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def reaches(self, n_positions: int) -> bool:
        """Whether so many positions are within its training, or without an end: ALiBi is made for longer texts."""
        return n_positions <= self.n_ctx or self.position == "alibi"

    @property
    def q_width(self) -> int:
        return self.n_head * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.n_kv_head * self.head_dim
