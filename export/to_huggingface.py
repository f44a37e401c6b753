"""Writes a folder that Hugging Face's transformers loads, and whatever reads such folders: vLLM, MLX, OpenVINO, CTranslate2.

In: a `CanonicalModel` and its keys. Out: `config.json`, `model.safetensors`, `generation_config.json` and, where there is a
tokenizer, `tokenizer.json` and `tokenizer_config.json`. `LAYOUTS` has the classes of transformers that compute what pocketlm
does; a model that none of them computes is refused with the reason. Format of the weights: the README of safetensors.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pocketlm.errors import FileError
from pocketlm.export.assemble import Tensors, constant, fuse_qkv, interleave, split_qkv, transposed
from pocketlm.export.canonical import CanonicalModel
from pocketlm.export.model_config import llama3_factors
from pocketlm.export.rules import LARGEST
from pocketlm.export.tensor_encoder import Encoded, Encoder
from pocketlm.runtime.architectures.common import pre_norm
from pocketlm.runtime.architectures.table import ARCHITECTURES
from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.hyper import Hyper, Rope
from pocketlm.runtime.model_summary import ROPE_FACTORS
from pocketlm.tokenizer import Tokenizer, from_metadata
from pocketlm.tokenizer.huggingface_writer import to_tokenizer_json

WEIGHTS = "model.safetensors"
FILES = ("config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
LLAMA3_CONTEXTS = (8192, 4096, 2048, 16384, 32768)  # original contexts that rotary factors may have been made for

_QKV = ("attn_q", "attn_k", "attn_v")
_NORMS = ("attn_norm", "ffn_norm", "output_norm")
_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    **{
        f"blk.{{i}}.{role}": f"model.layers.{{i}}.{name}"
        for role, name in {
            "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        }.items()
    },
}  # fmt: skip
_GPT2_NAMES = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f", "output": "lm_head",
    **{
        f"blk.{{i}}.{role}": f"transformer.h.{{i}}.{name}"
        for role, name in {
            "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
        }.items()
    },
}  # fmt: skip
_STARCODER2_NAMES = {
    **_LLAMA_NAMES, "blk.{i}.ffn_up": "model.layers.{i}.mlp.c_fc", "blk.{i}.ffn_down": "model.layers.{i}.mlp.c_proj",
}  # fmt: skip
_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "gelu_erf": "gelu", "silu": "silu", "relu": "relu"}


def _llama(hyper: Hyper) -> dict[str, Any]:
    return {
        "hidden_size": hyper.n_embd, "intermediate_size": hyper.n_ff, "num_hidden_layers": hyper.n_layer,
        "num_attention_heads": hyper.n_head, "num_key_value_heads": hyper.n_kv_head, "head_dim": hyper.head_dim,
        "hidden_act": _ACTIVATIONS[hyper.activation], "max_position_embeddings": hyper.n_ctx, "rms_norm_eps": hyper.norm_eps,
    }  # fmt: skip


def _starcoder2(hyper: Hyper) -> dict[str, Any]:
    config = _llama(hyper)
    del config["head_dim"]
    return {**config, "norm_epsilon": config.pop("rms_norm_eps"), "sliding_window": None}


def _gpt2(hyper: Hyper) -> dict[str, Any]:
    activation = {**_ACTIVATIONS, "gelu_tanh": "gelu_new"}[hyper.activation]
    return {
        "n_embd": hyper.n_embd, "n_inner": hyper.n_ff, "n_layer": hyper.n_layer, "n_head": hyper.n_head,
        "n_positions": hyper.n_ctx, "activation_function": activation, "layer_norm_epsilon": hyper.norm_eps,
    }  # fmt: skip


class Layout(NamedTuple):
    """How a class of transformers names the parts of a decoder, and what its configuration says.

    `biases`: the setting that turns biases on → the parts that have them then; the setting "" is on always.
    """

    model_type: str
    model_class: str
    names: Mapping[str, str]
    config: Callable[[Hyper], dict[str, Any]]
    biases: Mapping[str, tuple[str, ...]]
    narrow: bool = True  # heads are together as wide as the model
    grouped: bool = True  # fewer heads for keys than for queries are possible
    conv1d: bool = False  # matrices of layers are stored (in, out)


# (norm, positions, gated) → the class that computes it
LAYOUTS = {
    ("rms", "rope", True): Layout(
        "llama", "LlamaForCausalLM", _LLAMA_NAMES, _llama,
        {"attention_bias": (*_QKV, "attn_output"), "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down")}, narrow=False,
    ),
    ("layer", "rope", False): Layout(
        "starcoder2", "Starcoder2ForCausalLM", _STARCODER2_NAMES, _starcoder2,
        {"": _NORMS, "use_bias": (*_QKV, "attn_output", "ffn_up", "ffn_down")},
    ),
    ("layer", "learned", False): Layout(
        "gpt2", "GPT2LMHeadModel", _GPT2_NAMES, _gpt2, {"": (*_NORMS, "attn_qkv", "attn_output", "ffn_up", "ffn_down")},
        grouped=False, conv1d=True,
    ),
}  # fmt: skip


# architectures whose layers are not the plain ones → the class that computes them as they usually are
OWN_LAYOUTS = {
    "qwen3": Layout(
        "qwen3", "Qwen3ForCausalLM",
        {**_LLAMA_NAMES, **{f"blk.{{i}}.attn_{p}_norm": f"model.layers.{{i}}.self_attn.{p}_norm" for p in "qk"}},
        _llama, {"attention_bias": (*_QKV, "attn_output")}, narrow=False,
    ),
}  # fmt: skip


def layout_of(model: CanonicalModel, source: object) -> Layout:
    """The class of transformers that computes this model. Raises FileError, with the reason, where none does."""
    hyper, rope = model.hyper, model.hyper.rope
    layout = LAYOUTS.get((hyper.norm, hyper.position, hyper.gated))
    what = f"{hyper.norm} norm, {hyper.position} positions and a feed-forward {'with' if hyper.gated else 'without'} a gate"
    usual = ARCHITECTURES[hyper.architecture].USUAL
    if all(getattr(hyper, name) == usual.get(name) for name in ("norm", "position", "gated")):
        layout = OWN_LAYOUTS.get(hyper.architecture, layout)
    if ARCHITECTURES[hyper.architecture].operations is not pre_norm and layout is not OWN_LAYOUTS.get(hyper.architecture):
        raise _refused(source, f"the layers of {hyper.architecture}")
    if layout is None:
        raise _refused(source, what)
    able = {part for parts in layout.biases.values() for part in parts}
    with_bias = [name for name in model.tensors if name.endswith(".bias") and _part(name) not in {*able, *_fused(able)}]
    if stray := next((name for name in with_bias if model.tensors[name].read().any()), None):
        raise _refused(source, f"a {stray}")
    if layout.narrow and hyper.q_width != hyper.n_embd:
        raise _refused(source, f"{what}, {hyper.n_head} heads of {hyper.head_dim} in a width of {hyper.n_embd}")
    if not layout.grouped and hyper.n_kv_head != hyper.n_head:
        raise _refused(source, f"{what}, {hyper.n_kv_head} heads for keys beside {hyper.n_head} for queries")
    if rope and rope.n_dims != hyper.head_dim:
        raise _refused(source, f"rotary positions in {rope.n_dims} of a head's {hyper.head_dim} dimensions")
    return layout


def _refused(source: object, what: str) -> FileError:
    return FileError(source, f"no architecture of transformers that pocketlm writes has {what}", "export a GGUF")


def _part(name: str) -> str:
    """"attn_q" of "blk.3.attn_q.weight"."""
    return name.split(".")[-2]


def _fused(parts: set[str]) -> set[str]:
    return {"attn_qkv"} if "attn_q" in parts else {*_QKV} if "attn_qkv" in parts else set()


def write_huggingface(
    folder: Path, metadata: Mapping[str, Any], model: CanonicalModel, source: object, quant: str, encoder: Encoder
) -> tuple[list[Encoded], list[str]]:
    """Write the files into a folder that exists; what became of every tensor, and notes. Raises FileError."""
    layout = layout_of(model, source)
    tensors, settings, zeros = _arranged(model, layout)
    done = _write_weights(folder / WEIGHTS, tensors, layout, source, quant, encoder)
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
    """The tensors as the class wants them, by role, its settings about biases, and which of the biases were made here."""
    hyper, tensors = model.hyper, {name: tensor for name, tensor in model.tensors.items() if name not in ROPE_FACTORS}
    if "blk.{i}.attn_qkv" in layout.names:
        fuse_qkv(tensors, hyper.n_layer, hyper.q_width, hyper.kv_width)
    else:
        split_qkv(tensors, hyper.q_width, hyper.kv_width)
    if hyper.rope and hyper.rope.pairs == "interleaved":
        interleave(tensors, (hyper.n_head, hyper.n_kv_head, hyper.head_dim), hyper.rope.n_dims, back=True)
    settings: dict[str, bool] = {}
    able: set[str] = set()
    for setting, parts in layout.biases.items():
        on = setting == "" or any(name.endswith(".bias") and _part(name) in parts for name in tensors)
        settings |= {setting: on} if setting else {}
        able |= {*parts} if on else set()
    for name in [name for name in tensors if name.endswith(".bias") and _part(name) not in able]:
        del tensors[name]  # zeros, as layout_of has made sure
    weights = {name: tensor for name, tensor in tensors.items() if name.endswith(".weight") and _part(name) in able}
    rows = {name.removesuffix("weight") + "bias": tensor.shape[0] for name, tensor in weights.items()}
    zeros = {bias: constant(np.zeros(n, np.float32)) for bias, n in rows.items() if bias not in tensors}
    return {**tensors, **zeros}, settings, frozenset(zeros)


def _write_weights(
    path: Path, tensors: Tensors, layout: Layout, source: object, quant: str, encoder: Encoder
) -> list[Encoded]:  # fmt: skip
    """The safetensors file, read back and compared; what became of every tensor."""
    format = FORMATS[quant.upper()]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stored, at = {}, 0
    for role, tensor in tensors.items():
        turned = layout.conv1d and role.startswith("blk.") and len(tensor.shape) == 2
        stored[role] = transposed(tensor) if turned else tensor
        size = math.prod(tensor.shape) * format.block_bytes // format.block_size
        entries[_name(role, layout)] = {
            "dtype": format.name, "shape": list(stored[role].shape), "data_offsets": [at, at + size],
        }  # fmt: skip
        at += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    done = []
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for role, tensor in stored.items():
            weights, largest = encoder.read(role, tensor)
            if largest > LARGEST[format.name]:
                problem = f"tensor {role} has weights up to {largest:.3g}, too large for {DTYPES[quant]}"
                raise FileError(source, problem, "add --quant bf16")
            encoded = Encoded(role, tuple(tensor.shape), format)
            for piece in encoder.pieces(encoded, weights):
                file.write(piece)
            done.append(encoded)
    with open(path, "rb") as file:
        file.seek(8 + len(header))
        wrong = [tensor.name for tensor in done if zlib.crc32(file.read(tensor.n_bytes)) != tensor.crc]
    if wrong:
        raise FileError(path, f"{wrong[0]} is not what was written", "the disk may be failing; the old file is unchanged")
    return done


def _name(role: str, layout: Layout) -> str:
    """What transformers calls the tensor."""
    if not role.startswith("blk."):
        part, end = role.rsplit(".", 1)
        return f"{layout.names[part]}.{end}"
    _, layer, part, end = role.split(".")
    return f"{layout.names[f'blk.{{i}}.{part}'].replace('{i}', layer)}.{end}"


# ── what stands beside them ──────────────────────────────────────────────────────────────────────────────────────────


def _rope(model: CanonicalModel, source: object) -> dict[str, Any]:
    """The keys about rotary positions, in the form that every version of transformers reads."""
    rope, factors = model.hyper.rope, model.tensors.get("rope_freqs.weight")
    if rope is None:
        return {}
    if "rope_factors_long.weight" in model.tensors:
        raise _refused(source, "rotary factors that depend on the context's length")
    plain = rope.scaling != "yarn" and rope.attention_factor != 1.0
    if plain or rope.extrapolation != 1.0 or (factors is not None and rope.scaling != "none"):
        raise _refused(source, "rotary positions scaled in this way")
    scaling: dict[str, Any] | None = None
    if factors is not None:
        scaling = _llama3(rope, factors.read())
    elif rope.scaling != "none":
        scaling = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "yarn":
        scaling = {
            "rope_type": "yarn", "factor": rope.factor, "original_max_position_embeddings": rope.original_ctx,
            "attention_factor": rope.attention_factor * (1 + 0.1 * math.log(rope.factor)), "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
        }  # fmt: skip
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _llama3(rope: Rope, factors: np.ndarray) -> dict[str, Any]:
    """The settings of Llama 3 that give these factors; where none do, the factors themselves."""
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
    """Begin and end tokens: the tokenizer's own end first, then the others that end a turn."""
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
    """Numbers of 32 bits as a person would write them: 1e-05, not 9.999999747378752e-06."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return float(str(np.float32(value))) if isinstance(value, float) else value
