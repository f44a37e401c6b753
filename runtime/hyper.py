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
from pocketlm.runtime.architectures import table
from pocketlm.runtime.hyper_parameters import Hyper, Rope
from pocketlm.runtime.metadata_keys import Keys

__all__ = ["ARCHITECTURES", "OPTIONS", "Hyper", "Rope", "read_hyper"]
ARCHITECTURES: dict[str, dict[str, Any]] = {name: module.USUAL for name, module in table.ARCHITECTURES.items()}
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
    keys = Keys(metadata, path)
    experts = metadata.get(f"{arch}.expert_count", 0)
    if "expert_count" not in table.ARCHITECTURES[arch].SETTINGS and (not isinstance(experts, int) or experts):
        raise FileError(path, f"mixture-of-experts models of the architecture {arch} are not supported", "use a dense model")
    causal = metadata.get(f"{arch}.attention.causal", True)
    if not isinstance(causal, (bool, int, float)) or not causal == 1:
        raise FileError(path, f"{arch}.attention.causal is {causal!r:.60}", "pocketlm computes with True only")
    chosen = {
        name: keys.choice(
            f"pocketlm.{name}", ARCHITECTURES[arch].get(name, "interleaved" if name == "rope_pairs" else None), allowed
        )
        for name, allowed in OPTIONS.items()
    }
    n_embd, n_head = keys.count(f"{arch}.embedding_length"), keys.count(f"{arch}.attention.head_count")
    some = "attention.head_count_kv" in table.ARCHITECTURES[arch].SETTINGS  # layers have attention, the others 0 heads
    n_kv_head = keys.count(f"{arch}.attention.head_count_kv", n_head, besides_zero=some)
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
        settings=_read_settings(metadata, arch, table.ARCHITECTURES[arch].SETTINGS),
    )


def _read_settings(metadata: Mapping[str, Any], arch: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The architecture's own keys that the file has, plain; whoever asks for one of them checks it."""
    found = {name: metadata[f"{arch}.{name}"] for name in names if f"{arch}.{name}" in metadata}
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in found.items()}


def _read_rope(keys: Keys, arch: str, head_dim: int, pairs: str) -> Rope:
    n_dims = keys.count(f"{arch}.rope.dimension_count", head_dim)
    if n_dims > head_dim or n_dims % 2:
        raise keys.fail(f"{arch}.rope.dimension_count", f"is {n_dims}, expected an even number up to {head_dim}")
    scaling = keys.choice(f"{arch}.rope.scaling.type", "linear", ("none", "linear", "yarn", "longrope"))
    # rope.scale_linear is the key of files older than rope.scaling.*
    factor = keys.number(f"{arch}.rope.scaling.factor", keys.number(f"{arch}.rope.scale_linear", 1.0, low=1e-6), low=1e-6)
    extrapolation = keys.number(f"{arch}.rope.scaling.yarn_ext_factor", 1.0, low=-1.0)
    if extrapolation not in (1.0, -1.0) and (extrapolation or scaling == "yarn"):  # -1: what goes with the type; 0: of no YaRN
        raise keys.fail(f"{arch}.rope.scaling.yarn_ext_factor", f"is {extrapolation}, and pocketlm computes with 1.0 only")
    if scaling == "none" or (scaling, factor) == ("linear", 1.0):
        scaling, factor = "none", 1.0
    return Rope(
        theta=keys.number(f"{arch}.rope.freq_base", 10000.0, low=1.001),  # YaRN divides by its logarithm
        n_dims=n_dims,
        pairs=pairs,
        scaling=scaling,
        factor=factor,
        original_ctx=keys.count(f"{arch}.rope.scaling.original_context_length", keys.count(f"{arch}.context_length")),
        attention_factor=keys.number(f"{arch}.rope.scaling.attn_factor", 1.0, low=1e-6),
        beta_fast=keys.number(f"{arch}.rope.scaling.yarn_beta_fast", 32.0, low=1e-6),
        beta_slow=keys.number(f"{arch}.rope.scaling.yarn_beta_slow", 1.0, low=1e-6),
    )
