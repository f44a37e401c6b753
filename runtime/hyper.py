"""A model's hyper-parameters, read from a file's metadata and checked.

In: the metadata of a GGUF (or of an fp16 bin, which uses the same keys). Out: one frozen `Hyper`.
Knows the keys; what an architecture means by itself stands in its file in architectures/. Does not know tensors, operations
or text.

Files written by pocketlm may state any of OPTIONS themselves (`pocketlm.norm`, `pocketlm.position`, ...), for models that no
published architecture describes; the architecture `pocketlm` has no defaults of its own and states them all.
Key names: the GGUF document in the ggml repository (docs/gguf.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketlm.errors import FileError
from pocketlm.runtime.activations import ACTIVATIONS
from pocketlm.runtime.architectures.table import ARCHITECTURES
from pocketlm.runtime.hyper_parameters import Hyper, Rope
from pocketlm.runtime.metadata_keys import Keys

__all__ = ["OPTIONS", "Hyper", "Rope", "read_hyper"]
OPTIONS = {
    "norm": ("layer", "rms"),
    "position": ("learned", "rope", "alibi", "none"),
    "rope_pairs": ("interleaved", "half"),
    "activation": tuple(ACTIVATIONS),
    "gated": (True, False),
}


def read_hyper(metadata: Mapping[str, Any], n_vocab: int, path: object) -> Hyper:
    """The hyper-parameters in `metadata`; `n_vocab` is the number of rows of the token table.

    Raises FileError, naming the key, for anything missing, absurd or not supported.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise FileError(path, f"architecture {arch!r:.60} is not supported", f"pocketlm runs {', '.join(ARCHITECTURES)}")
    usual = {"rope_pairs": "interleaved", **ARCHITECTURES[arch].USUAL}
    of_its_own = getattr(ARCHITECTURES[arch], "SETTINGS", ())
    keys, ours = Keys(metadata, path, f"{arch}."), Keys(metadata, path, "pocketlm.")
    experts = metadata.get(f"{arch}.expert_count", 0)
    if "expert_count" not in of_its_own and (not isinstance(experts, int) or experts):
        raise FileError(path, f"mixture-of-experts models of the architecture {arch} are not supported", "use a dense model")
    causal = metadata.get(f"{arch}.attention.causal", True)
    if not isinstance(causal, (bool, int, float)) or not causal == 1:
        raise keys.fail("attention.causal", f"is {causal!r:.60}", "pocketlm computes with True only")
    chosen = {name: ours.choice(name, usual.get(name), allowed) for name, allowed in OPTIONS.items()}
    n_embd, n_head = keys.count("embedding_length"), keys.count("attention.head_count")
    some = "attention.head_count_kv" in of_its_own  # layers have attention, the others 0 heads
    n_kv_head = keys.count("attention.head_count_kv", n_head, besides_zero=some)
    head_dim = keys.count("attention.key_length", max(n_embd // n_head, 1))
    if "attention.key_length" not in keys and n_embd % n_head:
        raise keys.fail("attention.head_count", f"is {n_head}, which does not divide the width {n_embd}")
    if n_head % n_kv_head:
        raise keys.fail("attention.head_count_kv", f"is {n_kv_head}, which does not divide the {n_head} heads")
    if keys.count("attention.value_length", head_dim) != head_dim:
        raise keys.fail("attention.value_length", f"is not the {head_dim} of the keys")
    return Hyper(
        architecture=arch,
        n_layer=keys.count("block_count"),
        n_embd=n_embd,
        n_head=n_head,
        n_kv_head=n_kv_head,
        head_dim=head_dim,
        n_ff=keys.count("feed_forward_length"),
        n_vocab=n_vocab,
        n_ctx=keys.count("context_length"),
        norm=chosen["norm"],
        norm_eps=keys.number(f"attention.layer_norm_{'rms_' * (chosen['norm'] == 'rms')}epsilon", 1e-5, high=1.0),
        position=chosen["position"],
        activation=chosen["activation"],
        gated=bool(chosen["gated"]),
        rope=_read_rope(keys, head_dim, chosen["rope_pairs"]) if chosen["position"] == "rope" else None,
        alibi_max_bias=keys.number("attention.max_alibi_bias", 8.0, high=1024) if chosen["position"] == "alibi" else 0.0,
        # plain; whoever asks for one of them checks it
        settings={name: keys.given(name) for name in of_its_own if name in keys},
    )


def _read_rope(keys: Keys, head_dim: int, pairs: str) -> Rope:
    n_dims = keys.count("rope.dimension_count", head_dim)
    if n_dims > head_dim or n_dims % 2:
        raise keys.fail("rope.dimension_count", f"is {n_dims}, expected an even number up to {head_dim}")
    scaling = keys.choice("rope.scaling.type", "linear", ("none", "linear", "yarn", "longrope"))
    # rope.scale_linear is the key of files older than rope.scaling.*
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0, low=1e-6), low=1e-6)
    extrapolation = keys.number("rope.scaling.yarn_ext_factor", 1.0, low=-1.0)
    if extrapolation not in (1.0, -1.0) and (extrapolation or scaling == "yarn"):  # -1: what goes with the type; 0: of no YaRN
        raise keys.fail("rope.scaling.yarn_ext_factor", f"is {extrapolation}, and pocketlm computes with 1.0 only")
    if scaling == "none" or (scaling, factor) == ("linear", 1.0):
        scaling, factor = "none", 1.0
    return Rope(
        theta=keys.number("rope.freq_base", 10000.0, low=1.001),  # YaRN divides by its logarithm
        n_dims=n_dims,
        pairs=pairs,
        scaling=scaling,
        factor=factor,
        original_ctx=keys.count("rope.scaling.original_context_length", keys.count("context_length")),
        attention_factor=keys.number("rope.scaling.attn_factor", 1.0, low=1e-6),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0, low=1e-6),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0, low=1e-6),
    )
