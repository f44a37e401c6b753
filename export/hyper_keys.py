"""The keys of a model file: hyper-parameters as `runtime/hyper.py` reads them.

In: a `CanonicalModel`. Out: a dict of GGUF keys in the order they are written. Knows no container: GGUF, fp16 bin and
ONNX all carry these keys.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from pocketlm.export.canonical import CanonicalModel
from pocketlm.runtime.architectures.table import ARCHITECTURES
from pocketlm.runtime.hyper import OPTIONS, Hyper, Rope

QUANTIZATION_VERSION = 2  # of ggml's block layouts, the one since May 2023
# field of Rope -> key behind {architecture}.rope., written where it is not the field's default
ROPE_KEYS = {
    "scaling": "scaling.type", "factor": "scaling.factor", "attention_factor": "scaling.attn_factor",
    "beta_fast": "scaling.yarn_beta_fast", "beta_slow": "scaling.yarn_beta_slow",
}  # fmt: skip


def architecture_keys(hyper: Hyper) -> dict[str, Any]:
    """The keys from which `read_hyper` makes this `hyper` again (all but n_vocab, which is the token table's height)."""
    arch = hyper.architecture
    keys: dict[str, Any] = {
        f"{arch}.context_length": hyper.n_ctx,
        f"{arch}.embedding_length": hyper.n_embd,
        f"{arch}.block_count": hyper.n_layer,
        f"{arch}.feed_forward_length": hyper.n_ff,
        f"{arch}.attention.head_count": hyper.n_head,
        f"{arch}.attention.head_count_kv": hyper.n_kv_head,
        f"{arch}.attention.layer_norm_{'rms_' if hyper.norm == 'rms' else ''}epsilon": float(hyper.norm_eps),
    }
    if hyper.head_dim * hyper.n_head != hyper.n_embd:
        keys |= {f"{arch}.attention.key_length": hyper.head_dim, f"{arch}.attention.value_length": hyper.head_dim}
    if hyper.position == "alibi":
        keys[f"{arch}.attention.max_alibi_bias"] = float(hyper.alibi_max_bias)
    if rope := hyper.rope:
        keys |= {f"{arch}.rope.dimension_count": rope.n_dims, f"{arch}.rope.freq_base": float(rope.theta)}
        defaults = {field.name: field.default for field in fields(Rope)}
        for name, key in ROPE_KEYS.items():
            if (value := getattr(rope, name)) != defaults[name]:
                keys[f"{arch}.rope.{key}"] = value
        if rope.original_ctx != hyper.n_ctx:
            keys[f"{arch}.rope.scaling.original_context_length"] = rope.original_ctx
    keys |= {f"{arch}.{name}": value for name, value in hyper.settings.items()}
    return keys | {f"pocketlm.{name}": value for name, value in own_options(hyper).items()}


def own_options(hyper: Hyper) -> dict[str, Any]:
    """The options in which the model differs from what its architecture usually has."""
    chosen = {name: getattr(hyper, name) for name in OPTIONS if name != "rope_pairs"}
    if hyper.rope:
        chosen["rope_pairs"] = hyper.rope.pairs
    usual = {"rope_pairs": "interleaved", **ARCHITECTURES[hyper.architecture].USUAL}
    return {name: value for name, value in chosen.items() if usual.get(name) != value}


def file_metadata(model: CanonicalModel, out: Path, file_type: int | None) -> dict[str, Any]:
    """Every key of the file, the architecture first. The model's own keys win over those made here.

    `file_type`: ggml's number for the mix of formats; None leaves out the two keys about formats.
    """
    formats = {"general.file_type": file_type, "general.quantization_version": QUANTIZATION_VERSION}
    keys = {
        "general.architecture": model.hyper.architecture,
        "general.name": out.stem,
        **architecture_keys(model.hyper),
        **{key: value for key, value in model.metadata.items() if key not in formats},
        **(formats if file_type is not None else {}),
    }
    order = sorted(keys, key=lambda key: (not key.startswith("general."), key != "general.architecture"))
    return {key: keys[key] for key in order}
