"""The classes of transformers that a model can be exported to: how each names a decoder's parts, and its config.json.

In: a `CanonicalModel`. Out: the row that computes it, or the reason why none does. Knows no files; to_huggingface.py writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pocketlm.errors import FileError
from pocketlm.export.canonical import CanonicalModel
from pocketlm.runtime.architectures import llama
from pocketlm.runtime.architectures.common import pre_norm
from pocketlm.runtime.architectures.table import ARCHITECTURES
from pocketlm.runtime.hyper import Hyper

_QKV = ("attn_q", "attn_k", "attn_v")
_NORMS = ("attn_norm", "ffn_norm", "output_norm")
_QKVO = (*_QKV, "attn_output")
HEAD_NORMS = {f"attn_{part}_norm": f"self_attn.{part}_norm" for part in "qk"}
EXPERTS = {  # {n}: the number of each
    "ffn_gate_inp": "mlp.gate", **{f"ffn_{part}_exps": f"mlp.experts.{{n}}.{part}_proj" for part in ("gate", "up", "down")},
}  # fmt: skip
SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
}
MIXTRAL_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    **{f"ffn_{part}_exps": f"block_sparse_moe.experts.{{n}}.w{i}" for i, part in ((1, "gate"), (2, "down"), (3, "up"))},
}
GRANITE_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.router.layer", "ffn_gate_up_exps": "block_sparse_moe.input_linear",
    "ffn_down_exps": "block_sparse_moe.output_linear", "ffn_gate_up_shexp": "shared_mlp.input_linear",
    "ffn_down_shexp": "shared_mlp.output_linear",
}  # fmt: skip


def _in_layers(layers: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"blk.{{i}}.{role}": f"{layers}.{{i}}.{name}" for role, name in names.items()}


_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    **_in_layers("model.layers", {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }),
}  # fmt: skip


def _llama_with(more: Mapping[str, str]) -> dict[str, str]:
    return _LLAMA_NAMES | _in_layers("model.layers", more)


_GPT2_NAMES = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f", "output": "lm_head",
    **_in_layers("transformer.h", {
        "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
    }),
}  # fmt: skip
_STARCODER2_NAMES = _llama_with({"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"})
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
    return {**config, "norm_epsilon": config.pop("rms_norm_eps"),
            "sliding_window": hyper.settings.get("attention.sliding_window")}  # fmt: skip


def _experts(hyper: Hyper) -> dict[str, Any]:
    said, n_used = hyper.settings, hyper.settings["expert_used_count"]
    return {
        **_llama(hyper), "num_experts": said["expert_count"], "num_experts_per_tok": n_used, "decoder_sparse_step": 1,
        "moe_intermediate_size": said.get("expert_feed_forward_length", max(hyper.n_ff // n_used, 1)), "mlp_only_layers": [],
    }  # fmt: skip


def _qwen2moe(hyper: Hyper) -> dict[str, Any]:
    shared = hyper.settings.get("expert_shared_feed_forward_length", hyper.n_ff)
    return {**_experts(hyper), "norm_topk_prob": False, "shared_expert_intermediate_size": shared}


def _mixtral(hyper: Hyper) -> dict[str, Any]:
    said = hyper.settings
    return {
        **_llama(hyper), "num_local_experts": said["expert_count"], "num_experts_per_tok": said["expert_used_count"],
        "sliding_window": None,
    }  # fmt: skip


def _granite(hyper: Hyper) -> dict[str, Any]:
    said = hyper.settings
    return {
        **_llama(hyper), "attention_multiplier": said.get("attention.scale") or hyper.head_dim**-0.5,
        "residual_multiplier": said.get("residual_scale", 1.0), "embedding_multiplier": said.get("embedding_scale", 1.0),
        "logits_scaling": said["logit_scale"],
    }  # fmt: skip


def _granitemoe(hyper: Hyper) -> dict[str, Any]:
    said = hyper.settings
    return {
        **_granite(hyper), "num_local_experts": said["expert_count"], "num_experts_per_tok": said["expert_used_count"],
        "shared_intermediate_size": said.get("expert_shared_feed_forward_length", 0),
    }  # fmt: skip


def _gpt2(hyper: Hyper) -> dict[str, Any]:
    activation = {**_ACTIVATIONS, "gelu_tanh": "gelu_new"}[hyper.activation]
    return {
        "n_embd": hyper.n_embd, "n_inner": hyper.n_ff, "n_layer": hyper.n_layer, "n_head": hyper.n_head,
        "n_positions": hyper.n_ctx, "activation_function": activation, "layer_norm_epsilon": hyper.norm_eps,
    }  # fmt: skip


class Layout(NamedTuple):
    """How a class of transformers names the parts of a decoder, and the entries of its config.json.

    `biases`: a setting → the parts that have a bias if it is true; those of the setting "" always have one.
    """

    model_type: str
    model_class: str
    names: Mapping[str, str]
    config: Callable[[Hyper], dict[str, Any]]
    biases: Mapping[str, tuple[str, ...]]
    narrow: bool = True  # heads are together as wide as the model
    grouped: bool = True  # fewer heads for keys than for queries are possible
    conv1d: bool = False  # matrices of layers are stored (in, out)


_STARCODER2 = Layout(
    "starcoder2", "Starcoder2ForCausalLM", _STARCODER2_NAMES, _starcoder2,
    {"": _NORMS, "use_bias": (*_QKVO, "ffn_up", "ffn_down")},
)  # fmt: skip
# (norm, positions, gated) → the class that computes it
LAYOUTS = {
    ("rms", "rope", True): Layout(
        "llama", "LlamaForCausalLM", _LLAMA_NAMES, _llama,
        {"attention_bias": _QKVO, "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down")}, narrow=False,
    ),
    ("layer", "rope", False): _STARCODER2,
    ("layer", "learned", False): Layout(
        "gpt2", "GPT2LMHeadModel", _GPT2_NAMES, _gpt2, {"": (*_NORMS, "attn_qkv", "attn_output", "ffn_up", "ffn_down")},
        grouped=False, conv1d=True,
    ),
}  # fmt: skip


# architectures whose layers are not the plain ones → the class that computes them as they usually are
OWN_LAYOUTS = {
    "starcoder2": _STARCODER2,
    "qwen3": Layout(
        "qwen3", "Qwen3ForCausalLM", _llama_with(HEAD_NORMS), _llama, {"attention_bias": _QKVO}, narrow=False,
    ),
    "mixtral": Layout("mixtral", "MixtralForCausalLM", _llama_with(MIXTRAL_EXPERTS), _mixtral, {}, narrow=False),
    "qwen2moe": Layout(
        "qwen2_moe", "Qwen2MoeForCausalLM", _llama_with(EXPERTS | SHARED_EXPERT), _qwen2moe, {"qkv_bias": _QKV},
    ),
    "qwen3moe": Layout(
        "qwen3_moe", "Qwen3MoeForCausalLM", _llama_with(HEAD_NORMS | EXPERTS),
        lambda hyper: {**_experts(hyper), "norm_topk_prob": True}, {"attention_bias": _QKVO}, narrow=False,
    ),
    "olmoe": Layout(
        "olmoe", "OlmoeForCausalLM", _llama_with(HEAD_NORMS | EXPERTS),
        lambda hyper: {**_experts(hyper), "norm_topk_prob": False, "intermediate_size": hyper.n_ff}, {"attention_bias": _QKVO},
    ),
    "granite": Layout(
        "granite", "GraniteForCausalLM", _LLAMA_NAMES, _granite,
        {"attention_bias": _QKVO, "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down")},
    ),
    "granitemoe": Layout(
        "granitemoeshared", "GraniteMoeSharedForCausalLM", _llama_with(GRANITE_EXPERTS), _granitemoe,
        {"attention_bias": _QKVO},
    ),
}  # fmt: skip


def layout_of(model: CanonicalModel, source: object) -> Layout:
    """The class of transformers that computes this model. Raises FileError, with the reason, if none does."""
    hyper, rope = model.hyper, model.hyper.rope
    layout = LAYOUTS.get((hyper.norm, hyper.position, hyper.gated))
    what = f"{hyper.norm} norm, {hyper.position} positions and a feed-forward {'with' if hyper.gated else 'without'} a gate"
    architecture, usual = ARCHITECTURES[hyper.architecture], ARCHITECTURES[hyper.architecture].USUAL
    own = OWN_LAYOUTS.get("mixtral" if _is_mixtral(hyper) else hyper.architecture)
    if all(getattr(hyper, name) == usual.get(name) for name in ("norm", "position", "gated")):
        layout = own or layout
    is_plain = architecture.operations is pre_norm or (architecture is llama and not _is_mixtral(hyper))
    if not is_plain and layout is not own:
        raise refused(source, f"the layers of {hyper.architecture}")
    if layout is None:
        raise refused(source, what)
    if hyper.settings.get("attention.sliding_window") and layout is not _STARCODER2:
        raise refused(source, f"{what} and sliding windows")
    able = {part for parts in layout.biases.values() for part in parts}
    with_bias = [name for name in model.tensors if name.endswith(".bias") and part_of(name) not in {*able, *_fused(able)}]
    if stray := next((name for name in with_bias if model.tensors[name].read().any()), None):
        raise refused(source, f"a {stray}")
    if layout.narrow and hyper.q_width != hyper.n_embd:
        raise refused(source, f"{what}, {hyper.n_head} heads of {hyper.head_dim} in a width of {hyper.n_embd}")
    if not layout.grouped and hyper.n_kv_head != hyper.n_head:
        raise refused(source, f"{what}, {hyper.n_kv_head} heads for keys beside {hyper.n_head} for queries")
    if rope and rope.n_dims != hyper.head_dim:
        raise refused(source, f"rotary positions in {rope.n_dims} of a head's {hyper.head_dim} dimensions")
    if hyper.settings.get("rope.scaling.finetuned") is False:
        raise refused(source, f"{hyper.architecture} without positions")
    return layout


def _is_mixtral(hyper: Hyper) -> bool:
    return hyper.architecture == "llama" and bool(hyper.settings.get("expert_count"))


def refused(source: object, what: str) -> FileError:
    return FileError(source, f"no architecture of transformers that pocketlm writes has {what}", "export a GGUF")


def part_of(name: str) -> str:
    """The part of a role: "attn_q" of "blk.3.attn_q.weight"."""
    return name.split(".")[-2]


def _fused(parts: set[str]) -> set[str]:
    return {"attn_qkv"} if "attn_q" in parts else {*_QKV} if "attn_qkv" in parts else set()
