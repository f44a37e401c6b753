"""Families of models as transformers saves them: a row of HUGGING_FACE for each architecture.

In: a configuration, tensors by role. Out: tensors and keys in the form that GGUFs of the architecture have, and a check that
its layers are those that the configuration describes. runtime/architectures says what a family computes; `MODEL_TYPES` in
model_config.py says which `model_type` is which architecture.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pocketlm.errors import FileError, quoted
from pocketlm.export import huggingface_layouts as layouts
from pocketlm.export.canonical import CanonicalModel, CanonicalTensor
from pocketlm.export.dialect import Dialect, Draft
from pocketlm.export.model_config import ModelConfig
from pocketlm.export.tensor_parts import gate_before_up, in_layers
from pocketlm.runtime.activations import CLAMP, CLAMPED_SCALE
from pocketlm.runtime.architectures.exaone4 import HYBRID
from pocketlm.runtime.architectures.table import ARCHITECTURES
from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.hyper_parameters import Rope
from pocketlm.runtime.model_summary import ROPE_FACTORS
from pocketlm.runtime.operations import Attend, Rotate
from pocketlm.runtime.plan import Plan

Step = Callable[[Draft], None]
MXFP4 = FORMATS["MXFP4"]


def _read(written: Mapping[str, str]) -> dict[str, str]:
    """A table of huggingface_layouts.py, role → name in a layer, turned round into the `names` of a Dialect."""
    return {f"*.{name.replace('{n}', 'N')}": role + "#N" * ("{n}" in name) for role, name in written.items()}


HEAD_NORMS = _read(layouts.HEAD_NORMS)
NORMS_AFTER = {"*.post_attention_layernorm": "post_attention_norm", "*.post_feedforward_layernorm": "post_ffw_norm"}
NORMS_AROUND = {**NORMS_AFTER, "*.pre_feedforward_layernorm": "ffn_norm"}
FUSED_EXPERTS = {f"*.mlp.experts.{part}_proj": f"ffn_{part}_exps" for part in ("gate_up", "down")}  # as they are in memory
EXPERTS = _read(layouts.EXPERTS) | FUSED_EXPERTS
MIXTRAL_EXPERTS = _read(layouts.MIXTRAL_EXPERTS) | FUSED_EXPERTS | {"*.mlp.gate": "ffn_gate_inp"}
GRANITE_EXPERTS = {
    **_read(layouts.GRANITE_EXPERTS),
    "*.block_sparse_moe.router": "ffn_gate_inp",
    **{f"*.block_sparse_moe.experts.{part}_proj": f"ffn_{part}_exps" for part in ("gate_up", "down")},
}
EXPERT_KEYS = {"expert_count": ("num_experts num_local_experts", None), "expert_used_count": ("num_experts_per_tok", None)}
GRANITE_KEYS = {
    "embedding_scale": ("embedding_multiplier", 1.0), "residual_scale": ("residual_multiplier", 1.0),
    "attention.scale": ("attention_multiplier", 1.0), "logit_scale": ("logits_scaling", 1.0),
}  # fmt: skip
GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 256.0, "tied": True}  # where the configuration is silent
# `checked` looks at these
COMPUTED = ("layer_types", "sliding_window", "no_rope_layers", "query_pre_attn_scalar", "rope_local_base_freq")


def one_added(draft: Draft) -> None:
    """Add 1 to the weights of norms: Gemma's code multiplies by 1 + weight, runtimes of GGUFs by the weight."""
    for role in [role for role in draft.tensors if role.endswith("norm.weight")]:
        draft.tensors[role] = draft.tensors[role].changed(lambda weights: weights + np.float32(1))


def gate_with_up(draft: Draft) -> None:
    """Phi 3's files keep the two in one tensor, under the name of the second."""
    gate_before_up(draft.tensors, "", "ffn_up")


def llama_if_wide(draft: Draft) -> None:
    """Write a Qwen2 as a Llama if its heads together are not as wide as the model, which llama.cpp's Qwen2 wants."""
    n_head, _, head_dim = draft.heads
    if n_head * head_dim != draft.keys["embedding_length"]:
        draft.architecture = ""


def tanh(draft: Draft) -> None:
    """The first Gemma's code computes GELU by the tanh formula, even where its configuration names the other."""
    if draft.options["activation"] == "gelu_erf" and "activation" not in draft.config.given:
        draft.options["activation"] = "gelu_tanh"


def own_activation(draft: Draft) -> None:
    """Later Gemmas' code reads `hidden_activation` alone, and ignores the older name."""
    if draft.config.raw("hidden_activation") is None and "activation" not in draft.config.given:
        draft.options["activation"] = "gelu_tanh"


def scaled_alone(draft: Draft) -> None:
    """Refuse what a GGUF cannot say: transformers scales only layers without a window, but in a GGUF, as llama.cpp reads it,
    frequency factors (and Gemma 3's attention factor) hold for every layer.
    """
    whole = draft.keys.get("rope.scaling.attn_factor", 1.0) if draft.architecture == "gemma3" else 1.0
    if "attention.sliding_window" in draft.keys and (ROPE_FACTORS & draft.tensors.keys() or not math.isclose(whole, 1.0)):
        problem = "scales rotary positions by llama3, longrope or an attention_factor, but not where it has windows"
        raise FileError(draft.config.path, problem, f"pocketlm computes {draft.architecture} with linear and plain YaRN")


def own_layers(period: int) -> Step:
    """Say which layers have a window, where it is not all but every `period`-th (0: all)."""

    def say(draft: Draft) -> None:
        keys, reach = draft.keys, sys.maxsize if period else draft.keys["context_length"]
        said = draft.config.windows(keys["block_count"], reach) or [-1]
        if max(said) > 0 if not period else max(said) == 0 and isinstance(keys.get("attention.sliding_window"), int):
            keys["attention.sliding_window"] = max(said)  # 0: llama.cpp crashes on a window that no layer has
        pattern, usual = [size > 0 for size in said], [not period or (i + 1) % period > 0 for i in range(len(said))]
        if min(said) >= 0 and pattern != usual and keys.get("attention.sliding_window"):
            keys["attention.sliding_window_pattern"] = pattern

    return say


def own_base(draft: Draft) -> None:
    """Say the rotary base of layers with a window, where it is another one."""
    if (base := draft.config.raw("rope_local_base_freq")) not in (None, draft.keys["rope.freq_base"]):
        draft.keys["rope.freq_base_swa"] = base


def stretched_base(draft: Draft) -> None:
    """Hunyuan's "dynamic" scaling is a larger rotary base, regardless of the length of the text."""
    n_dims = draft.keys["rope.dimension_count"]
    if alpha := draft.config.rope.get("alpha"):
        draft.keys["rope.freq_base"] *= float(alpha) ** (n_dims / (n_dims - 2))


def weights_add_up(always: bool) -> Step:
    """Refuse models that normalise a token's expert weights where GGUFs of the architecture do not, and the other way round."""

    def check(draft: Draft) -> None:
        if bool(draft.config.said("norm_topk_prob", False)) != always:
            problem = f"its configuration has norm_topk_prob = {not always}"
            raise FileError(draft.config.path, problem, f"pocketlm computes {draft.architecture} with {always}")

    return check


def gate_as_vector(draft: Draft) -> None:
    """The shared expert's gate, a matrix of one row, is a vector in GGUFs."""
    for role in in_layers(draft.tensors, r"ffn_gate_inp_shexp\.weight"):
        gate = draft.tensors[role]
        if len(gate.shape) == 2 and gate.shape[0] == 1:
            draft.tensors[role] = gate.changed(lambda rows: rows[0], *gate.shape[1:])


def gpt_oss(draft: Draft) -> None:
    """Transpose the experts' matrices, and separate the interleaved columns of gate and up."""
    draft.options["activation"] = "swiglu_clamped"
    draft.keys["expert_feed_forward_length"] = draft.keys["feed_forward_length"]
    if not draft.config.rope:
        raise FileError(draft.config.path, "its configuration says nothing of rotary positions", "correct config.json")
    if draft.config.rope.get("truncate") is False:
        draft.keys["rope.scaling.truncate"] = False
    for name, value in (("swiglu_limit", CLAMP), ("swiglu_alpha", CLAMPED_SCALE)):
        if (said := draft.config.said(name, value)) != value:
            problem = f"its configuration has {name} = {quoted(said)}"
            raise FileError(draft.config.path, problem, f"pocketlm computes with {value}")
    _unpack_mxfp4(draft)
    for role in in_layers(draft.tensors, r"ffn_(both|down)_exps(_bias)?\.weight"):
        both, kind = draft.tensors.pop(role), "bias" if "_bias" in role else "weight"
        if kind == "weight":
            n, columns, rows = both.shape
            both = both.changed(lambda matrices: matrices.swapaxes(1, 2), n, rows, columns)
        layer, parts = role.rpartition(".ffn_")[0], {"down": both}
        if "both" in role:
            parts = {"gate": _every_second(both, 0), "up": _every_second(both, 1)}
        draft.tensors |= {f"{layer}.ffn_{part}_exps.{kind}": tensor for part, tensor in parts.items()}


def _unpack_mxfp4(draft: Draft) -> None:
    """Dequantise the experts of the published checkpoints, which are MXFP4: blocks of 32 4-bit weights, and scales apart."""
    method = (draft.config.raw("quantization_config") or {"quant_method": "mxfp4"}).get("quant_method")
    if method != "mxfp4":
        raise FileError(draft.config.path, f"its weights are quantised by {quoted(method)}", "pocketlm reads mxfp4 of gpt-oss")
    for role in in_layers(draft.tensors, r"ffn_(both|down)_exps_blocks\.weight"):
        blocks, scales = draft.tensors.pop(role), draft.tensors.pop(role.replace("blocks", "scales"), None)
        if scales is None or blocks.shape != (*scales.shape, MXFP4.block_bytes - 1) or len(scales.shape) != 3:
            problem = f"the blocks and scales of {role.replace('_blocks', '')} do not fit together"
            raise FileError(draft.config.path, problem, "the checkpoint is not complete")
        n, n_rows, n_blocks = scales.shape
        shape = n, n_blocks * MXFP4.block_size, n_rows  # transposed, as such folders have it
        draft.tensors[role.replace("_blocks", "")] = CanonicalTensor(shape, _reader_of_mxfp4(blocks, scales))


def _reader_of_mxfp4(blocks: CanonicalTensor, scales: CanonicalTensor) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        packed, (n, n_rows, n_blocks) = np.empty((*scales.shape, MXFP4.block_bytes), np.uint8), scales.shape
        packed[..., 0] = scales.read()
        pairs = blocks.read().astype(np.uint8)  # neighbours share a byte there; in a GGUF weights 16 apart do
        low, high = (pairs >> np.uint8(shift) & np.uint8(15) for shift in (0, 4))
        packed[..., 1::2] = low[..., :8] | low[..., 8:] << np.uint8(4)
        packed[..., 2::2] = high[..., :8] | high[..., 8:] << np.uint8(4)
        assert MXFP4.dequantize is not None
        weights = MXFP4.dequantize(packed.reshape(-1, MXFP4.block_bytes))
        return weights.reshape(n, n_rows, n_blocks * MXFP4.block_size).swapaxes(1, 2)

    return read


def _every_second(tensor: CanonicalTensor, first: int) -> CanonicalTensor:
    """Every second row of every expert, from row `first` on."""
    n, rows, *columns = tensor.shape
    return tensor.changed(lambda matrices: matrices[:, first::2], n, rows // 2, *columns)


def short_convolutions(draft: Draft) -> None:
    """Layers with the tensors of a convolution get 0 key-value heads. Raises FileError if the configuration names others."""
    heads, kinds = [draft.heads[1]] * draft.keys["block_count"], draft.config.raw("layer_types")
    said = [kind == "conv" for kind in kinds] if isinstance(kinds, list) else kinds
    for role in in_layers(draft.tensors, r"shortconv\.conv\.weight"):
        heads[int(role.split(".")[1])] = 0
        weight = draft.tensors[role]
        if len(weight.shape) == 3 and weight.shape[1] == 1:
            draft.tensors[role] = weight.changed(lambda values: values[:, 0], weight.shape[0], weight.shape[2])
        draft.keys["shortconv.l_cache"] = weight.shape[-1]
    if said is not None and said != [n == 0 for n in heads]:
        problem = "its configuration has convolutions in other layers than its weights"
        raise FileError(draft.config.path, problem, "correct layer_types in config.json")
    draft.keys["attention.head_count_kv"] = np.array(heads)


def windows_at_their_depth(draft: Draft) -> None:
    """Refuse an EXAONE 4 whose depth does not tell whether it has windows: llama.cpp recognises such models by their depth."""
    if ("attention.sliding_window" in draft.keys) != (draft.keys["block_count"] == HYBRID):
        problem = f"is an EXAONE 4 of {draft.keys['block_count']} layers that has sliding windows, or lacks them"
        raise FileError(draft.config.path, problem, "pocketlm does not compute that")


def _family(
    architecture: str, *steps: Step, names: Mapping[str, str] | None = None,
    keys: Mapping[str, tuple[str, Any]] | None = None, computes: tuple[str, ...] = (), **fixed: Any,
) -> Dialect:  # fmt: skip
    """A row. `steps` run last; `names`: see Dialect; `keys`: the architecture's key → (entry of config.json, its default)."""
    usual, keys = ARCHITECTURES[architecture].USUAL, keys or {}

    def finish(draft: Draft) -> None:
        for key, (names, default) in keys.items():
            value = draft.config.said(names, default)
            if value is None and default is not None:
                value = type(default)(0)  # null: without
            if value is not None:
                draft.keys[key] = value
        for step in steps:
            step(draft)

    computes = (*COMPUTED, *computes, *(name for names, _ in keys.values() for name in names.split()))
    fixed = {**{name: usual[name] for name in ("norm", "position")}, "rope_pairs": "half", **fixed}
    return Dialect(
        f"Hugging Face {architecture}", (), fixed, architecture=architecture, names=names or {}, computes=computes,
        finish=finish,
    )  # fmt: skip


HUGGING_FACE = {
    row.architecture: row
    for row in (
        _family("qwen2", llama_if_wide, own_layers(0)),
        _family("qwen3", own_layers(0), names=HEAD_NORMS),
        _family(
            "gemma3", one_added, own_activation, scaled_alone, own_layers(6),
            names={**HEAD_NORMS, **NORMS_AROUND},
            keys={
                "attention.sliding_window": ("sliding_window", 4096),
                "rope.freq_base_swa": ("rope_local_base_freq", 10000.0),
                "final_logit_softcapping": ("final_logit_softcapping", None),
            },
            rope_theta=1e6, **GEMMA,
        ),
        _family("phi3", gate_with_up, keys={"attention.sliding_window": ("sliding_window", None)}, rope_part=1.0),
        _family("smollm3", rope_theta=2e6, tied=True),
        _family("granite", keys=GRANITE_KEYS),
        _family(
            "granitemoe", names=GRANITE_EXPERTS,
            keys={**GRANITE_KEYS, **EXPERT_KEYS, "expert_shared_feed_forward_length": ("shared_intermediate_size", None)},
        ),
        _family(
            "hunyuan-dense", stretched_base,
            names={"*.self_attn.query_layernorm": "attn_q_norm", "*.self_attn.key_layernorm": "attn_k_norm"},
            computes=("use_qk_norm",),
        ),
        _family("gemma", one_added, tanh, activation="gelu_tanh", tied=True),
        _family(
            "gemma2", one_added, own_activation, own_layers(2),
            names=NORMS_AROUND,
            keys={
                "attention.sliding_window": ("sliding_window", 4096),
                "attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
                "final_logit_softcapping": ("final_logit_softcapping", 30.0),
            },
            **GEMMA,
        ),
        _family(
            "olmo2", scaled_alone, own_layers(4), own_base,
            names={**HEAD_NORMS, **NORMS_AFTER}, keys={"attention.sliding_window": ("sliding_window", None)},
        ),
        _family(
            "qwen3moe", weights_add_up(True),
            names={**HEAD_NORMS, **EXPERTS},
            keys={**EXPERT_KEYS, "expert_feed_forward_length": ("moe_intermediate_size", None)},
        ),
        _family(
            "qwen2moe", weights_add_up(False), gate_as_vector,
            names={**EXPERTS, **_read(layouts.SHARED_EXPERT)},
            keys={
                **EXPERT_KEYS, "expert_feed_forward_length": ("moe_intermediate_size", None),
                "expert_shared_feed_forward_length": ("shared_expert_intermediate_size", None),
            },
        ),
        _family("olmoe", weights_add_up(False), names={**HEAD_NORMS, **EXPERTS}, keys=EXPERT_KEYS),
        _family(
            "gpt-oss", gpt_oss,
            names={
                "*.self_attn.sinks": "attn_sinks", "*.post_attention_layernorm": "post_attention_norm",
                "*.mlp.router": "ffn_gate_inp",
                **{f"*.mlp.experts.{name}_proj{end}": f"ffn_{part}_exps{end}"
                   for name, part in (("gate_up", "both"), ("down", "down")) for end in ("", "_bias", "_blocks", "_scales")},
            },
            keys={**EXPERT_KEYS, "attention.sliding_window": ("sliding_window", 128)},
            computes=("truncate", "quantization_config"), rope_theta=150000.0,
        ),
        _family(
            "lfm2", short_convolutions,
            names={
                "embedding_norm": "token_embd_norm", "*.operator_norm": "attn_norm",
                "*.self_attn.q_layernorm": "attn_q_norm", "*.self_attn.k_layernorm": "attn_k_norm",
                "*.feed_forward.w1": "ffn_gate", "*.feed_forward.w2": "ffn_down", "*.feed_forward.w3": "ffn_up",
                **{f"*.conv.{part}": f"shortconv.{part}" for part in ("conv", "in_proj", "out_proj")},
            },
            activation="silu", rope_theta=1e6, tied=True,
        ),
        _family(
            "exaone4", windows_at_their_depth,
            names={**HEAD_NORMS, **NORMS_AFTER}, keys={"attention.sliding_window": ("sliding_window", None)},
        ),
    )
}  # fmt: skip
HUGGING_FACE["mistral"] = _family("llama", own_layers(0))
HUGGING_FACE["mixtral"] = _family("llama", names=MIXTRAL_EXPERTS, keys=EXPERT_KEYS, rope_theta=1e6)


# ── what a configuration says of single layers ───────────────────────────────────────────────────────────────────────


def checked(model: CanonicalModel, config: ModelConfig, fixed: Mapping[str, Any]) -> CanonicalModel:
    """The model, with its queries scaled if the configuration wants another attention scale than the architecture's.

    `fixed`: the settings of the family's code. Raises FileError if the architecture would give layers other windows, or other
    rotary positions, than the configuration says.
    """
    plan = model.plan(config.path)
    layers, n_ctx, base = _layers(plan), model.hyper.n_ctx, config.raw("rope_local_base_freq")
    near, far = ({rope for window, rope in layers if bool(window) == has_one} for has_one in (True, False))
    reach = n_ctx if not near or near == far else sys.maxsize  # where positions depend on windows, wider ones count, too
    windows, said_windows = [window if window < reach else 0 for window, _ in layers], config.windows(len(layers), reach)
    if said_windows is None and not any(windows):  # the architecture has none
        config.check_window(n_ctx)
    for what, found, said in (
        ("sliding windows", windows, said_windows),
        ("rotary positions", [rope is not None for _, rope in layers], config.rotary_layers(len(layers))),
        ("rotary bases", list({rope.theta for window, rope in layers if window and rope}), base if base is None else [base]),
    ):
        if said is not None and found and found != said:
            problem = f"its configuration has {what} in other layers, or others, than {model.hyper.architecture} has"
            raise FileError(config.path, problem, "pocketlm does not compute that")
    divisor = config.raw("query_pre_attn_scalar") or fixed.get("query_pre_attn_scalar")
    if divisor is not None and (not isinstance(divisor, (int, float)) or not 0 < divisor < 1e12):
        problem = f"query_pre_attn_scalar is {quoted(divisor)}, expected a number above 0"
        raise FileError(config.path, problem, "correct config.json")
    scale = next(op.scale for op in plan.ops if isinstance(op, Attend))
    if divisor is None or math.isclose(divisor**-0.5, scale, rel_tol=1e-6):
        return model
    factor, at = np.float32(divisor**-0.5 / scale), "attn_q_norm" if "blk.0.attn_q_norm.weight" in model.tensors else "attn_q"
    changed = {
        name: tensor.changed(lambda weights: weights * factor)
        for name, tensor in model.tensors.items()
        if name.split(".")[-2] == at
    }
    return replace(model, tensors={**model.tensors, **changed})


def _layers(plan: Plan) -> list[tuple[int, Rope | None]]:
    """The window of every layer with attention (0: none), and its rotary positions (None: none)."""
    layers, rope = [], None
    for op in plan.ops:
        if isinstance(op, Rotate):
            rope = op.rope
        if isinstance(op, Attend):
            layers.append((op.window, rope))
            rope = None
    return layers
