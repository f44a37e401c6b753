"""A model's hyper-parameters, read from a file's metadata and checked.

In: the metadata of a GGUF (or of an fp16 bin, which uses the same keys). Out: one frozen `Hyper`.
Knows the keys and the architectures' defaults; does not know tensors, operations or text.

A row of `ARCHITECTURES` says what an architecture *is*. Files written by pocketlm may state any of these options
themselves (`pocketlm.norm`, `pocketlm.position`, ...), for models that no published architecture describes; the
architecture `pocketlm` has no defaults of its own and states them all.
Key names: the GGUF document in the ggml repository (docs/gguf.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketlm.errors import FileError

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"norm": "layer", "position": "learned", "activation": "gelu_tanh", "gated": False},
    "llama": {"norm": "rms", "position": "rope", "rope_pairs": "interleaved", "activation": "silu", "gated": True},
    "refact": {"norm": "rms", "position": "alibi", "activation": "silu", "gated": True},
    "pocketlm": {},
}
OPTIONS = {
    "norm": ("layer", "rms"),
    "position": ("learned", "rope", "alibi", "none"),
    "rope_pairs": ("interleaved", "half"),
    "activation": ("gelu_tanh", "gelu_erf", "silu", "relu"),
    "gated": (True, False),
}
LIMIT = 1 << 24  # no count of layers, heads, positions or widths above this: guards products against absurd files


@dataclass(frozen=True)
class Rope:
    """Rotary positions (arXiv:2104.09864) and their scaling to longer contexts (linear; YaRN, arXiv:2309.00071)."""

    theta: float  # base of the geometric frequencies
    n_dims: int  # the first n_dims of every head are rotated
    pairs: str  # "interleaved": (0,1),(2,3)…; "half": (0,d/2),(1,d/2+1)…
    scaling: str = "none"  # "none" | "linear" | "yarn"
    factor: float = 1.0  # how many times longer than the original context
    original_ctx: int = 0
    attention_factor: float = 1.0
    extrapolation: float = 1.0  # YaRN: how much of the ramp applies
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class Hyper:
    """What a decoder is, apart from its weights. Every field is checked: positive, finite, consistent."""

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
    activation: str  # "gelu_tanh" | "gelu_erf" | "silu" | "relu"
    gated: bool  # act(gate) * up, as in SwiGLU
    rope: Rope | None = None
    alibi_max_bias: float = 0.0  # head i of n has slope 2^(-max_bias * (i+1) / n) where n is a power of two

    def reaches(self, n_positions: int) -> bool:
        """Whether so many positions are within its training, or without an end: ALiBi is made for longer texts."""
        return n_positions <= self.n_ctx or self.position == "alibi"

    @property
    def q_width(self) -> int:
        return self.n_head * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.n_kv_head * self.head_dim


class _Keys:
    """Typed access to metadata; every complaint names the file and the key."""

    def __init__(self, metadata: Mapping[str, Any], path: object):
        self.metadata, self.path = metadata, path

    def fail(self, key: str, problem: str) -> FileError:
        return FileError(self.path, f"{key} {problem}", "the file is damaged or was exported wrongly")

    def number(self, key: str, default: float | None = None, low: float = 0.0, high: float = 1e12) -> float:
        value = self.metadata.get(key, default)
        if value is None:
            raise self.fail(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(key, f"should be a number, not {type(value).__name__}")
        if not (math.isfinite(value) and low <= value <= high):
            raise self.fail(key, f"is {value}, expected {low:g} to {high:g}")
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(key, default)
        if hasattr(value, "tolist"):  # an array with one value a layer: accepted where all layers agree
            values = set(value.tolist())  # type: ignore[union-attr]
            if len(values) != 1:
                raise FileError(self.path, f"{key} differs from layer to layer", "pocketlm runs models whose layers are alike")
            value = values.pop()
        if value is None:
            raise self.fail(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"should be a whole number, not {type(value).__name__}")
        if not 1 <= value <= LIMIT:
            raise self.fail(key, f"is {value}, expected 1 to {LIMIT}")
        return value

    def choice(self, key: str, default: Any, allowed: tuple) -> Any:
        value = self.metadata.get(key, default)
        if not isinstance(value, (str, bool)) or value not in allowed:
            raise self.fail(key, f"is {value!r:.60}, expected one of {', '.join(map(str, allowed))}")
        return value


def read_hyper(metadata: Mapping[str, Any], n_vocab: int, path: object) -> Hyper:
    """The hyper-parameters in `metadata`; `n_vocab` is the number of rows of the token table.

    Raises FileError, naming the key, for anything missing, absurd or not supported.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise FileError(path, f"architecture {arch!r:.60} is not supported", f"pocketlm runs {', '.join(ARCHITECTURES)}")
    keys = _Keys(metadata, path)
    experts = metadata.get(f"{arch}.expert_count", 0)
    if not isinstance(experts, int) or experts:
        raise FileError(path, "mixture-of-experts models are not supported", "use a dense model")
    chosen = {
        name: keys.choice(
            f"pocketlm.{name}", ARCHITECTURES[arch].get(name, "interleaved" if name == "rope_pairs" else None), allowed
        )
        for name, allowed in OPTIONS.items()
    }
    n_embd, n_head = keys.count(f"{arch}.embedding_length"), keys.count(f"{arch}.attention.head_count")
    n_kv_head = keys.count(f"{arch}.attention.head_count_kv", n_head)
    head_dim = keys.count(f"{arch}.attention.key_length", max(n_embd // n_head, 1))
    if f"{arch}.attention.key_length" not in metadata and n_embd % n_head:
        raise keys.fail(f"{arch}.attention.head_count", f"is {n_head}, which does not divide the width {n_embd}")
    if n_head % n_kv_head:
        raise keys.fail(f"{arch}.attention.head_count_kv", f"is {n_kv_head}, which does not divide the {n_head} heads")
    if keys.count(f"{arch}.attention.value_length", head_dim) != head_dim:
        raise keys.fail(f"{arch}.attention.value_length", f"is not the {head_dim} of the keys")
    eps_key = f"{arch}.attention.layer_norm_{'rms_' if chosen['norm'] == 'rms' else ''}epsilon"
    return Hyper(
        architecture=arch,
        n_layer=keys.count(f"{arch}.block_count"),
        n_embd=n_embd,
        n_head=n_head,
        n_kv_head=n_kv_head,
        head_dim=head_dim,
        n_ff=keys.count(f"{arch}.feed_forward_length"),
        n_vocab=n_vocab,
        n_ctx=keys.count(f"{arch}.context_length"),
        norm=chosen["norm"],
        norm_eps=keys.number(eps_key, 1e-5, high=1.0),
        position=chosen["position"],
        activation=chosen["activation"],
        gated=bool(chosen["gated"]),
        rope=_read_rope(keys, arch, head_dim, chosen["rope_pairs"]) if chosen["position"] == "rope" else None,
        alibi_max_bias=keys.number(f"{arch}.attention.max_alibi_bias", 8.0, high=1024)
        if chosen["position"] == "alibi"
        else 0.0,
    )


def _read_rope(keys: _Keys, arch: str, head_dim: int, pairs: str) -> Rope:
    n_dims = keys.count(f"{arch}.rope.dimension_count", head_dim)
    if n_dims > head_dim or n_dims % 2:
        raise keys.fail(f"{arch}.rope.dimension_count", f"is {n_dims}, expected an even number up to {head_dim}")
    scaling = keys.choice(f"{arch}.rope.scaling.type", "none", ("none", "linear", "yarn"))
    # rope.scale_linear is the key of files older than rope.scaling.*
    factor = keys.number(f"{arch}.rope.scaling.factor", keys.number(f"{arch}.rope.scale_linear", 1.0, low=1e-6), low=1e-6)
    if f"{arch}.rope.scale_linear" in keys.metadata and scaling == "none":
        scaling = "linear"
    return Rope(
        theta=keys.number(f"{arch}.rope.freq_base", 10000.0, low=1.001),  # YaRN divides by its logarithm
        n_dims=n_dims,
        pairs=pairs,
        scaling=scaling,
        factor=factor,
        original_ctx=keys.count(f"{arch}.rope.scaling.original_context_length", keys.count(f"{arch}.context_length")),
        attention_factor=keys.number(f"{arch}.rope.scaling.attn_factor", 1.0, low=1e-6),
        extrapolation=keys.number(f"{arch}.rope.scaling.yarn_ext_factor", 1.0),
        beta_fast=keys.number(f"{arch}.rope.scaling.yarn_beta_fast", 32.0, low=1e-6),
        beta_slow=keys.number(f"{arch}.rope.scaling.yarn_beta_slow", 1.0, low=1e-6),
    )
