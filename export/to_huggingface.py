"""Writes a folder for Hugging Face's transformers, and for all that reads such folders: vLLM, MLX, OpenVINO, CTranslate2.

In: a `CanonicalModel` and its keys. Out: `config.json`, `model.safetensors`, `generation_config.json` and, where there is a
tokenizer, `tokenizer.json` and `tokenizer_config.json`. huggingface_layouts.py knows which class of transformers computes what
pocketlm does; a model that none computes is refused with the reason. Format of the weights: the README of safetensors.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.errors import FileError
from pocketlm.export.canonical import CanonicalModel
from pocketlm.export.huggingface_layouts import Layout, layout_of, part_of, refused
from pocketlm.export.tensor_encoder import Encoded, Encoder
from pocketlm.export.tensor_parts import Tensors, constant, fuse_qkv, gate_before_up, interleave, split_qkv, transposed
from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.hyper import Hyper, Rope
from pocketlm.runtime.model_summary import ROPE_FACTORS
from pocketlm.runtime.positions import llama3_factors, yarn_magnitude
from pocketlm.tokenizer import Tokenizer, from_metadata
from pocketlm.tokenizer.huggingface_writer import to_tokenizer_json

WEIGHTS = "model.safetensors"
FILES = ("config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
ROWS = ("ffn_gate_inp_shexp",)  # vectors that are a matrix of one row there
LLAMA3_CONTEXTS = (8192, 4096, 2048, 16384, 32768)  # original contexts that rotary factors may have been made for


def write_huggingface(
    folder: Path, metadata: Mapping[str, Any], model: CanonicalModel, source: object, quant: str, encoder: Encoder
) -> tuple[list[Encoded], list[str]]:
    """Write the files into an existing folder; returns what was written for every tensor, and notes. Raises FileError."""
    layout = layout_of(model, source)
    tensors, settings, zeros = _arranged(model, layout)
    done = _write_weights(folder / WEIGHTS, tensors, layout, quant, encoder)
    config = {
        "architectures": [layout.model_class], "model_type": layout.model_type, "vocab_size": model.hyper.n_vocab,
        **layout.config(model.hyper), **settings, **_rope(model, source),
        "tie_word_embeddings": "output.weight" not in tensors, "torch_dtype": DTYPES[quant],
    }  # fmt: skip
    notes: list[str] = []
    tokenizer: Tokenizer | None = None
    if "tokenizer.ggml.tokens" in metadata:
        tokenizer = from_metadata(metadata, source)
        try:
            file, notes = to_tokenizer_json(tokenizer, model.hyper.n_vocab, source)
            _write_json(folder / "tokenizer.json", file)
            _write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, metadata, model.hyper))
        except FileError as error:
            notes.append(f"there is no tokenizer.json: {error.problem}")
    ids = _ends(tokenizer)
    padding = {"pad_token_id": tokenizer.eos_id} if tokenizer else {}
    _write_json(folder / "config.json", {**config, **ids})
    _write_json(folder / "generation_config.json", {**ids, **padding})
    return [tensor for tensor in done if tensor.name not in zeros], notes


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _arranged(model: CanonicalModel, layout: Layout) -> tuple[Tensors, dict[str, bool], frozenset[str]]:
    """The tensors as the class wants them, by role; its settings about biases; and the roles of the zero biases added."""
    hyper, tensors = model.hyper, {name: tensor for name, tensor in model.tensors.items() if name not in ROPE_FACTORS}
    if "blk.{i}.attn_qkv" in layout.names:
        fuse_qkv(tensors, hyper.n_layer, hyper.q_width, hyper.kv_width)
    else:
        split_qkv(tensors, hyper.q_width, hyper.kv_width)
    for end, axis in (("_exps", 1), ("_shexp", 0)):
        if f"blk.{{i}}.ffn_gate_up{end}" in layout.names:
            gate_before_up(tensors, end, f"ffn_gate_up{end}", axis)
    if hyper.rope and hyper.rope.pairs == "interleaved":
        interleave(tensors, (hyper.n_head, hyper.n_kv_head, hyper.head_dim), hyper.rope.n_dims, back=True)
    settings: dict[str, bool] = {}
    able: set[str] = set()
    for setting, parts in layout.biases.items():
        on = setting == "" or any(name.endswith(".bias") and part_of(name) in parts for name in tensors)
        settings |= {setting: on} if setting else {}
        able |= {*parts} if on else set()
    for name in [name for name in tensors if name.endswith(".bias") and part_of(name) not in able]:
        del tensors[name]  # zeros, as layout_of has made sure
    weights = {name: tensor for name, tensor in tensors.items() if name.endswith(".weight") and part_of(name) in able}
    rows = {name.removesuffix("weight") + "bias": tensor.shape[0] for name, tensor in weights.items()}
    zeros = {bias: constant(np.zeros(n, np.float32)) for bias, n in rows.items() if bias not in tensors}
    return {**tensors, **zeros}, settings, frozenset(zeros)


def _write_weights(path: Path, tensors: Tensors, layout: Layout, quant: str, encoder: Encoder) -> list[Encoded]:
    """Write the safetensors file, read it back and compare; returns what was written for every tensor."""
    format = FORMATS[quant.upper()]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stored, at = {}, 0
    for role, tensor in tensors.items():
        turned = layout.conv1d and role.startswith("blk.") and len(tensor.shape) == 2
        stored[role] = transposed(tensor) if turned else tensor
        names, shape = _names(role, layout, stored[role].shape)
        size = math.prod(shape) * format.block_bytes // format.block_size
        for name in names:
            entries[name] = {"dtype": format.name, "shape": shape, "data_offsets": [at, at + size]}
            at += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        done = [encoder.write(file, role, tensor, format, "add --quant bf16") for role, tensor in stored.items()]
    with open(path, "rb") as file:
        file.seek(8 + len(header))
        wrong = [tensor.name for tensor in done if zlib.crc32(file.read(tensor.n_bytes)) != tensor.crc]
    if wrong:
        raise FileError(path, f"{wrong[0]} is not what was written", "the disk may be failing; the old file is unchanged")
    return done


def _names(role: str, layout: Layout, shape: tuple[int, ...]) -> tuple[list[str], list[int]]:
    """The name of a tensor in transformers, or the names of the experts in it, and the shape of each."""
    if not role.startswith("blk."):
        part, end = role.rsplit(".", 1)
        return [f"{layout.names[part]}.{end}"], [*shape]
    _, layer, part, end = role.split(".")
    name = f"{layout.names[f'blk.{{i}}.{part}'].replace('{i}', layer)}.{end}"
    if "{n}" in name:
        return [name.replace("{n}", str(n)) for n in range(shape[0])], [*shape[1:]]
    return [name], [1, *shape] if part in ROWS and len(shape) == 1 else [*shape]


# ── what stands beside them ──────────────────────────────────────────────────────────────────────────────────────────


def _rope(model: CanonicalModel, source: object) -> dict[str, Any]:
    """The keys about rotary positions, in the form that every version of transformers reads."""
    rope, factors = model.hyper.rope, model.tensors.get("rope_freqs.weight")
    if rope is None:
        return {}
    if "rope_factors_long.weight" in model.tensors:
        raise refused(source, "rotary factors that depend on the context's length")
    plain = rope.scaling != "yarn" and rope.attention_factor != 1.0
    if plain or (factors is not None and rope.scaling != "none"):
        raise refused(source, "rotary positions scaled in this way")
    scaling: dict[str, Any] | None = None
    if factors is not None:
        scaling = _llama3(rope, factors.read())
    elif rope.scaling != "none":
        scaling = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "yarn":
        scaling = {
            "rope_type": "yarn", "factor": rope.factor, "original_max_position_embeddings": rope.original_ctx,
            "attention_factor": rope.attention_factor * yarn_magnitude(rope.factor), "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
        }  # fmt: skip
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _llama3(rope: Rope, factors: np.ndarray) -> dict[str, Any]:
    """The llama3 scaling that gives these factors; if there is none, a longrope scaling with the factors themselves."""
    largest = float(factors.max())
    for original in LLAMA3_CONTEXTS:
        if np.allclose(llama3_factors(rope.theta, rope.n_dims, largest, 1.0, 4.0, original), factors, rtol=1e-5):
            return {
                "rope_type": "llama3", "factor": largest, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }  # fmt: skip
    values = factors.tolist()
    return {
        "rope_type": "longrope", "short_factor": values, "long_factor": values, "factor": 1.0, "attention_factor": 1.0,
        "original_max_position_embeddings": rope.original_ctx,
    }  # fmt: skip


def _ends(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Begin and end tokens: first the tokenizer's own end, then the others that end a turn."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    eos = tokenizer.eos_id
    ends = [*([] if eos is None else [eos]), *sorted(tokenizer.end_ids - {eos})]
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None}


def _tokenizer_config(tokenizer: Tokenizer, metadata: Mapping[str, Any], hyper: Hyper) -> dict[str, Any]:
    tokens = tokenizer.vocabulary.tokens
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": hyper.n_ctx, "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.adds_bos, **{name: tokens[i] for name, i in ids.items() if i is not None},
    }  # fmt: skip
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(_short(content), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _short(value: Any) -> Any:
    """`value` with floats in the fewest digits that give the same float32: 1e-05, not 9.999999747378752e-06."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return float(str(np.float32(value))) if isinstance(value, float) else value
