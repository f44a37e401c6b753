"""What a checkpoint's configuration says about the model, under the names that code bases use for it.

In: the plain data of `Checkpoint.config` and the user's `--set`. Out: the value of each `Setting`, if there is one. Knows no
tensors. Settings that pocketlm does not compute are refused here by name, so that no model is exported wrongly.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pocketlm.errors import FileError, UsageError, did_you_mean, quoted
from pocketlm.runtime.hyper import OPTIONS
from pocketlm.runtime.positions import llama3_factors, yarn_magnitude


class Setting(NamedTuple):
    """A setting of a model: its type, the names that configurations use for it, an example for the error message."""

    type: type
    written: str  # the names, with spaces between them
    example: str

    @property
    def names(self) -> list[str]:
        return self.written.split()


SETTINGS: dict[str, Setting] = {
    "n_head": Setting(int, "n_head n_heads num_heads num_attention_heads nhead nheads heads", "8"),
    "head_dim": Setting(int, "head_dim d_head head_size", "64"),
    "n_ctx": Setting(
        int,
        "n_ctx block_size context_length max_seq_len max_seq_length max_position_embeddings n_positions ctx_len context_size"
        " max_context max_len max_length sequence_length sequence_len seq_len seq_length",
        "1024",
    ),
    "norm_eps": Setting(
        float,
        "norm_eps rms_norm_eps layer_norm_epsilon layer_norm_eps rms_eps layernorm_eps ln_eps norm_epsilon layernorm_epsilon"
        " rms_norm_epsilon",
        "1e-5",
    ),
    "norm": Setting(str, "norm norm_type normalization norm_layer", "layer|rms"),
    "activation": Setting(
        str, "activation activation_function hidden_act hidden_activation act_fn act mlp_type ffn_type",
        "gelu_erf|gelu_tanh|silu|relu",
    ),
    "position": Setting(
        str,
        "position positions pos_encoding position_encoding positional_encoding position_embedding_type pos_emb_type pos_type"
        " pos_embedding positional_embedding",
        "alibi|rope|none",
    ),
    "rope_theta": Setting(float, "rope_theta rope_base rotary_base rotary_emb_base rope_freq_base theta", "10000"),
    "rope_pairs": Setting(str, "rope_pairs", "half|interleaved"),
    "rope_part": Setting(float, "partial_rotary_factor rotary_pct rope_pct rotary_percentage", "1.0"),
    "rotary_dim": Setting(int, "rotary_dim rope_dim rotary_ndims", "32"),
    "alibi_max_bias": Setting(float, "alibi_max_bias alibi_bias_max", "8"),
    "tied": Setting(bool, "tie_word_embeddings tie_weights tied tie_embeddings tie_embedding weight_tying", "true|false"),
    "attention_scale": Setting(str, "", "head_dim|n_embd"),  # by whose root scores are divided
    "n_experts_used": Setting(int, "num_experts_per_tok", "2"),
    "logit_softcap": Setting(float, "logit_softcap", "15|20"),
    "model_type": Setting(str, "", "llama"),
    "weights": Setting(str, "", "ema"),  # which set of several in one checkpoint
}  # fmt: skip


def _words(meanings: Mapping[str, str]) -> dict[str, str]:
    """Turn meaning → "word word …" into word → meaning."""
    return {word: meaning for meaning, words in meanings.items() for word in words.split()}


# the options of hyper.py ← words of configurations
WORDS = {
    "norm": _words({"rms": "rmsnorm rms_norm rms", "layer": "layernorm layer_norm low_precision_layernorm ln layer"}),
    "activation": _words({
        "gelu_erf": "gelu gelu_erf gelu_python geglu", "silu": "silu swish swiglu", "relu": "relu reglu",
        "gelu_tanh": "gelu_new gelu_tanh gelu_fast gelu_pytorch_tanh gelu_approximate",
    }),
    "position": _words({
        "learned": "learned absolute learnable embedding", "rope": "rope rotary", "alibi": "alibi", "none": "none nope",
    }),
    "rope_pairs": _words({"half": "half", "interleaved": "interleaved"}),
    "attention_scale": _words({"head_dim": "head_dim head_size", "n_embd": "n_embd c"}),
}  # fmt: skip

FLAGS = {  # a configuration may say yes or no instead of a word
    **dict.fromkeys(("use_alibi", "alibi"), ("position", {True: "alibi"})),
    **dict.fromkeys(("use_rope", "rope", "use_rotary", "use_rope_embeddings"), ("position", {True: "rope"})),
    **dict.fromkeys(("use_rmsnorm", "use_rms_norm", "rmsnorm"), ("norm", {True: "rms", False: "layer"})),
    "rope_interleaved": ("rope_pairs", {True: "interleaved"}),
}

# entries that describe the model: they are searched first, the settings of a training script after them
MODEL_ENTRIES = (
    "model_args", "model_config", "model_cfg", "model_params", "model", "gptconf", "hparams", "hyper_parameters", "cfg",
    "config", "args",
)  # fmt: skip
ROTARY = ("rope_scaling", "rope_parameters")  # entries about rotary positions; the second holds all of it since transformers 5
NOT_MODEL = (
    "optimizer", "generation_config", "vision_config", "quantization_config",
    "_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan",  # how transformers spreads a module over devices
)  # fmt: skip

MODEL_TYPES = {  # of Hugging Face → the architecture that computes it
    "gpt2": "gpt2", "llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "gemma3": "gemma3", "phi3": "phi3", "smollm3": "smollm3",
    "granite": "granite", "mixtral": "mixtral", "qwen2_moe": "qwen2moe", "granitemoe": "granitemoe",
    "granitemoeshared": "granitemoe", "qwen3_moe": "qwen3moe", "olmoe": "olmoe", "gpt_oss": "gpt-oss", "olmo2": "olmo2",
    "olmo3": "olmo2", "gpt_neo": "gptneo", "gpt_neox": "gptneox", "phi": "phi2", "stablelm": "stablelm",
    "hunyuan_v1_dense": "hunyuan-dense", "starcoder2": "starcoder2", "exaone4": "exaone4", "lfm2": "lfm2", "bloom": "bloom",
    "mpt": "mpt", "minimind": "",  # told by its tensors
}  # fmt: skip
ASSUMED = {  # what transformers takes where a configuration has no such entry
    **{name: {"sliding_window": 4096} for name in ("mistral", "exaone4")},
    **{name: {"sliding_window": 4096, "num_attention_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6}
       for name in ("gemma3_text", "gemma3")},
    "olmo3": {"sliding_window": 4096, "rope_theta": 500000.0},
}  # fmt: skip
# what use_scaled_rope of Meta's params.json means, apart from the factor
SCALED_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
WINDOW_ON_DEMAND = ("qwen2", "qwen3", "qwen2moe", "qwen3moe", "smollm3")  # those whose window `use_sliding_window` turns on
# a setting → which of its values change nothing; any other value means a computation that the plan does not have
HARMLESS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys((
        "attn_logit_softcapping", "final_logit_softcapping", "logit_softcap", "soft_cap", "n_routed_experts", "use_moe",
        "clip_qkv", "mlp_only_layers", "scale_embeddings", "use_parallel_residual", "parallel_residual", "parallel_attn",
        "qk_norm", "use_qk_norm", "qk_layernorm", "post_norm", "scale_attn_by_inverse_layer_idx", "add_cross_attention",
        "is_encoder_decoder", "use_bidirectional_attention", "use_scaled_rope", "conv_bias", "no_rope_layers",
        "quantization_config", "zero_centered_norm", "apply_residual_connection_post_layernorm",
        "rope_interleave", "norm_qk", "post_attention_norm", "post_mlp_norm", "attention_logit_softcapping", "n_expert",
        "rope_adjustments", "attention_scores_scalar", "sliding_window_size",  # litGPT's
        "logit_cap", "logits_soft_cap", "final_logit_softcap", "attn_softcap", "parallel_block", "sandwich_norm", "scale_embed",
        "scale_embedding", "emb_scale", "softcap", "logit_softcapping", "post_ln", "use_post_norm", "rope_freq",
    ), lambda v: not v),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_experts"), lambda v: not v or v == 1),
    **dict.fromkeys((
        "decoder_sparse_step", "logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier", "scale_emb",
        "norm_first", "pre_norm", "prenorm", "pre_ln", "use_pre_norm", "normalize_before", "scale_attn_weights",
    ), lambda v: v in (None, 1)),  # True is 1
    **dict.fromkeys(("embed_scale", "embedding_scale", "residual_scale"), lambda v: not v or (v == 1 and v is not True)),
    **dict.fromkeys((
        "attention_multiplier", "query_pre_attn_scalar", "softmax_scale", "attn_scale", "rope_local_base_freq",
    ), lambda v: v is None),
    "norm_2": lambda v: v is not False,  # litGPT's
    "rope_scaling": lambda v: not v or (v == 1 and v is not True) or isinstance(v, dict),
    "norm_position": lambda v: v == "pre",
    "rope_local_type": lambda v: v == "default",
    "rope_indices": lambda v: not v or not any(v),  # litGPT's: layers whose rotary base is the local one
    "layer_types": lambda v: not v or all(kind == "full_attention" for kind in v),
}  # fmt: skip


def read_pairs(pairs: Sequence[str]) -> dict[str, str]:
    """Names and values of `--set NAME=VALUE …`. Raises UsageError."""
    for pair in pairs:
        if "=" not in pair:
            raise UsageError(f"--set {pair}: expected a name and a value, as --set n_head=12")
    return dict(pair.split("=", 1) for pair in pairs)


def parse_overrides(overrides: Mapping[str, str]) -> dict[str, Any]:
    """The values of `--set NAME=VALUE`, of their types. Raises UsageError for an unknown name or value."""
    result = {}
    for name, text in overrides.items():
        if name not in SETTINGS:
            raise UsageError(f"--set {quoted(name)}: expected one of {', '.join(SETTINGS)}{did_you_mean(name, SETTINGS)}")
        value = _typed(name, text)
        if value is None or (name in OPTIONS and value not in OPTIONS[name]):
            raise UsageError(f"--set {name}={quoted(text)}: expected {SETTINGS[name].example}")
        result[name] = value
    return result


def _typed(name: str, value: Any) -> Any:
    """`value` as the setting's type; None if it is no such value."""
    kind = SETTINGS[name].type
    if kind is str:
        word = str(value).strip()
        return WORDS[name].get(word.lower().replace("-", "_")) if name in WORDS else word
    if kind is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(str(value).lower())
    try:
        number = kind(value)
        return number if math.isfinite(number) and number >= (kind is int) and not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        return None


class ModelConfig:
    """Settings from the user's `--set`, else from the configuration: first from the entries that describe the model."""

    def __init__(self, config: Mapping[str, Any], overrides: Mapping[str, str], path: object):
        self.path, self.given = path, parse_overrides(overrides)
        levels = list(_levels(config))
        self.rope, windows = _rotary(levels)
        self._levels = [self.rope, windows, *levels]
        assumed = ASSUMED.get(str(self.raw("model_type")), {})
        self._levels.append({name: value for name, value in assumed.items() if self.said(name, ...) is ...})
        if self.raw("use_scaled_rope") is True:
            narrow = self.raw("dim") in (2048, 3072)  # Llama 3.2's 1B and 3B: transformers' conversion takes 32 for them
            self.rope = {**SCALED_ROPE, "factor": self.raw("rope_scaling_factor") or (32.0 if narrow else 8.0)}
            self._levels.append({"max_seq_len": 131072})
        self.asked: dict[str, None] = {}  # needed settings that nothing says

    def raw(self, *names: str) -> Any:
        """The value of the first of `names` in the first level that has one; None if no level has."""
        found = (level[name] for level in self._levels for name in names if level.get(name) is not None)
        return next(found, None)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a setting, `default` if nothing says it. Raises FileError for a value that pocketlm does not compute."""
        if name in self.given:
            return self.given[name]
        for level in self._levels:
            for alias in SETTINGS[name].names:
                said = level.get(alias)
                value = _typed(name, said) if isinstance(said, (str, int, float)) else None
                if value is not None:
                    return value
                if name in WORDS and isinstance(said, str):
                    known = f"pocketlm computes {SETTINGS[name].example.replace('|', ', ')}"
                    raise FileError(
                        self.path, f"its configuration says {alias} = {quoted(said)}", f"{known}; --set {name}=… overrides it"
                    )
            for flag, (setting, answers) in FLAGS.items():
                if setting == name and isinstance(level.get(flag), bool) and level[flag] in answers:
                    return answers[level[flag]]
        return default

    def denies(self, name: str, answer: str) -> bool:
        """Whether a flag of the configuration rules a value out. Flags of Hugging Face's models mean other things: False."""
        flags = [flag for flag, (setting, answers) in FLAGS.items() if setting == name and answers[True] == answer]
        return not self.model_type and any(level.get(flag) is False for level in self._levels for flag in flags)

    def need(self, name: str, default: Any = None) -> Any:
        """The value of a setting. If nothing says it, it is noted for `ask`, and the first value of its example is returned."""
        value = self.get(name, default)
        if value is None:
            self.asked[name] = None
            value = _typed(name, SETTINGS[name].example.partition("|")[0])
        return value

    def ask(self) -> None:
        """Raises FileError with every needed setting that nothing says."""
        if self.asked:
            flags = " ".join(f"--set {name}={SETTINGS[name].example}" for name in self.asked)
            raise FileError(self.path, f"neither the weights nor a configuration tell {', '.join(self.asked)}", f"add {flags}")

    @property
    def model_type(self) -> str | None:
        """The architecture of Hugging Face's `model_type`; None without one. Raises FileError for an unknown one."""
        found = self.given.get("model_type")
        if found is None:  # home-made configurations have entries of that name too
            levels = (level for level in self._levels if "architectures" in level or "transformers_version" in level)
            found = next((level["model_type"] for level in levels if "model_type" in level), None)
        if found is None:
            return None
        if not isinstance(found, str) or found not in MODEL_TYPES:
            advice = f"pocketlm exports {', '.join(MODEL_TYPES)}; if it computes as one of these, add --set model_type=llama"
            raise FileError(self.path, f"is a model of type {quoted(found)}", advice)
        return MODEL_TYPES[found]

    def check_supported(self, n_ctx: int, computed: Sequence[str] = ()) -> None:
        """Raises FileError for an entry that asks for what pocketlm does not compute. `computed`: entries not to look at."""
        for level in (self.given, *self._levels):
            for name, is_harmless in HARMLESS.items():
                try:
                    harmless = name in computed or name not in level or is_harmless(level[name])
                except TypeError:
                    harmless = False
                if not harmless:
                    problem = f"its configuration asks for {name} = {quoted(level[name])}"
                    raise FileError(self.path, problem, "pocketlm does not compute that")
        if "sliding_window" not in computed:
            self.check_window(n_ctx)

    def check_window(self, n_ctx: int) -> None:
        """Raises FileError if layers have a window smaller than n_ctx."""
        window = self.raw("sliding_window", "attention_window", "window_size")
        if type(window) is int and self.raw("use_sliding_window") is not False and 0 < window < n_ctx:
            raise FileError(
                self.path, f"attends to a sliding window of {window} positions", f"pocketlm does not; add --set n_ctx={window}"
            )

    def said(self, names: str, default: Any = None) -> Any:
        """As `raw`, but a null counts as a value; `names`: with spaces between them; `default` if no level has one."""
        return next((level[name] for level in self._levels for name in names.split() if name in level), default)

    def windows(self, n_layer: int, n_ctx: int) -> list[int] | None:
        """The window of every layer with attention, 0 for none; None if there are some, but nothing says in which layers."""
        size, kinds, used = (self.raw(name) for name in ("sliding_window", "layer_types", "use_sliding_window"))
        is_off = used is False or (used is None and self.model_type in WINDOW_ON_DEMAND)
        if is_off or not isinstance(size, int) or size >= n_ctx:
            size = 0
        if kinds is None and isinstance(period := self.raw("sliding_window_pattern"), int) and period > 0:
            kinds = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(n_layer)]
        if not isinstance(kinds, list):
            first = 0 if self.model_type == "mistral" or not size else self.raw("max_window_layers")
            return [size if i >= first else 0 for i in range(n_layer)] if isinstance(first, int) else None
        sizes, kinds = {"full_attention": 0, "sliding_attention": size}, [kind for kind in kinds if kind != "conv"]
        return [sizes.get(kind, -1) if isinstance(kind, str) else -1 for kind in kinds]

    def rotary_layers(self, n_layer: int) -> list[bool] | None:
        """Whether each layer has rotary positions; None if the configuration does not say it layer by layer."""
        layers, period = self.raw("no_rope_layers"), self.raw("no_rope_layer_interval")
        if layers is None and isinstance(period, int) and period > 0:
            layers = [(i + 1) % period for i in range(n_layer)]
        return [bool(rotates) for rotates in layers] if isinstance(layers, list) else None

    def rope_scaling(
        self, theta: float, n_dims: int, n_ctx: int, computed: Sequence[str] = ()
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The keys below `<architecture>.rope.scaling.`, and tensors that divide rotary frequencies, by name. Raises FileError
        for kinds of scaling that pocketlm does not know. `computed`: as for `check_supported`.
        """
        scaling = self.rope
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            return {}, {}

        def number(name: str, default: float | None = None) -> float:
            value = scaling[name] if scaling.get(name) is not None else default
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
                raise FileError(
                    self.path, f"rope_scaling.{name} is {quoted(value)}, expected a number above 0", "correct config.json"
                )
            return float(value)

        if kind == "dynamic" and scaling.get("alpha") and self.model_type == "hunyuan-dense":
            number("alpha")  # which its family's row makes another base of
            return {}, {}
        if kind not in ("linear", "yarn", "llama3", "longrope", "su"):
            problem = f"scales its rotary positions by {quoted(kind)}"
            raise FileError(self.path, problem, "pocketlm does not; it knows linear, yarn, llama3 and longrope")
        if kind == "linear":
            return {"type": "linear", "factor": number("factor")}, {}
        original = number(
            "original_max_position_embeddings", self.raw("original_max_position_embeddings", "max_position_embeddings")
        )
        if kind in ("longrope", "su"):
            factor = number("factor", n_ctx / original)
            usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
            keys = {"original_context_length": int(original), "attn_factor": number("attention_factor", usual)}
            return keys, {f"rope_factors_{name}.weight": self._factors(f"{name}_factor", n_dims) for name in ("short", "long")}
        factor = number("factor")
        if kind == "llama3":
            low, high = number("low_freq_factor"), number("high_freq_factor")
            return {}, {"rope_freqs.weight": llama3_factors(theta, n_dims, factor, low, high, original)}
        if scaling.get("mscale") or (scaling.get("truncate") is False and "truncate" not in computed):
            raise FileError(self.path, "uses a variant of YaRN (mscale, truncate)", "pocketlm does not")
        usual = yarn_magnitude(factor)  # the runtime multiplies by this itself
        keys = {
            "type": "yarn", "factor": factor, "original_context_length": int(original),
            "attn_factor": number("attention_factor", usual) / usual,
            "yarn_beta_fast": number("beta_fast", 32.0), "yarn_beta_slow": number("beta_slow", 1.0),
        }  # fmt: skip
        return keys, {}

    def _factors(self, name: str, n_dims: int) -> np.ndarray:
        """A list of longrope's scaling, float32 [n_dims/2]. Raises FileError unless all of it are numbers above 0."""
        values = found if isinstance(found := self.rope.get(name), list) else []
        numbers = [v for v in values if isinstance(v, (int, float)) and 0 < v < 1e12]
        if len(numbers) != n_dims // 2 or len(numbers) != len(values):
            raise FileError(
                self.path, f"its longrope scaling has no {name} of {n_dims // 2} numbers above 0", "correct config.json"
            )
        return np.array(numbers, np.float32)


def _levels(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The dicts in a configuration, outer ones first, but those that describe the model before the dict they are in."""
    pending = deque([config])
    while pending:
        level = pending.popleft()
        inner = {name: value for name, value in level.items() if isinstance(value, dict) and name not in NOT_MODEL}
        first = [inner.pop(name) for name in MODEL_ENTRIES if name in inner]
        yield from first
        yield level
        for value in first:
            pending.extend(v for n, v in value.items() if isinstance(v, dict) and n not in NOT_MODEL)
        pending.extend(value for name, value in inner.items() if name not in ROTARY)


def _rotary(levels: list[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The dict about rotary positions; and that of layers with a window, if they have their own, with its older names."""
    said = next((level[name] for level in levels for name in ROTARY if isinstance(level.get(name), dict)), {})
    whole, windows = said.get("full_attention"), said.get("sliding_attention")
    if not isinstance(whole, dict):
        return said, {}
    if not isinstance(windows, dict):
        return whole, {}
    theta = windows.get("rope_theta", 10000.0)
    return whole, {"rope_local_base_freq": theta, "rope_local_type": windows.get("rope_type", "default")}
