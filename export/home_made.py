"""Dialects of code bases that people train their own models with: nanochat, litGPT, minimind, and GPT-Neo's.

Rows for dialects.py, and the functions that bring their tensors and keys into an architecture's form. Variants that pocketlm
does not compute are refused by name.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import numpy as np

from pocketlm.errors import FileError
from pocketlm.export.assemble import has_own_head
from pocketlm.export.canonical import CanonicalTensor
from pocketlm.export.dialect import Dialect, Draft, Tensors
from pocketlm.export.tensor_parts import in_layers, reorder, rows
from pocketlm.runtime.architectures.table import ARCHITECTURES

# ── nanochat ─────────────────────────────────────────────────────────────────────────────────────────────────────────

NANOCHAT_TEMPLATE = (  # a system message goes in front of the first question: the chat does so where a template refuses it
    "{{ '<|bos|>' }}{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{{- '<|user_start|>' + message['content'] + '<|user_end|>' }}{%- elif message['role'] == 'assistant' %}"
    "{{- '<|assistant_start|>' + message['content'] + '<|assistant_end|>' }}"
    "{%- else %}{{- raise_exception('no such role') }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant_start|>' }}{%- endif %}"
)
NANOCHAT_NUMBERS = {
    "resid_lambdas": "residual_scale", "x0_lambdas": "embedding_scale", "smear_lambda": "smear_scale",
    "backout_lambda": "backout_scale",
}  # fmt: skip
NANOCHAT_EPS = float(np.finfo(np.float32).eps)  # PyTorch's rms_norm where none is given


def _finish_nanochat(draft: Draft) -> None:
    """Set what no file of nanochat says, by the version that its tensors show, and reverse its rotation.

    It rotates in the other direction, which is the usual rotation once the halves of every query and key are exchanged.
    """
    tensors, keys, config = draft.tensors, draft.keys, draft.config
    if isinstance(config.raw("code"), str):  # it had the same names in autumn 2024
        raise FileError(config.path, "is a checkpoint of modded-nanogpt", "pocketlm does not compute these models")
    n_head, n_kv_head, head_dim = draft.heads
    for part, n in (("q", n_head), ("k", n_kv_head)):
        order = np.arange(n * head_dim).reshape(n, 2, -1)[:, ::-1].ravel()
        reorder(tensors, rf"attn_{part}\.weight", order)
    n_vocab = config.raw("vocab_size")  # the tables are filled up to a multiple of 64
    for name in ("token_embd.weight", "output.weight", *in_layers(tensors, r"attn_v_embd\.weight")):
        if isinstance(n_vocab, int) and 0 < n_vocab < tensors[name].shape[0]:
            tensors[name] = rows(tensors[name], 0, n_vocab)
    for name, key in NANOCHAT_NUMBERS.items():
        if numbers := tensors.pop(f"{name}.weight", None):
            values = [float(value) for value in numbers.read().ravel()]
            keys[key] = values if name.endswith("s") else values[0]
    gates = tensors.get(next(iter(in_layers(tensors, r"attn_v_gate\.weight")), ""))
    n_columns = gates.shape[-1] if gates else 0
    is_newest, is_new = "smear_gate.weight" in tensors, n_columns == 12
    cap, sharper, part = (15.0, 1.2, 4) if is_newest else (15.0, 1.15, 3) if is_new else (None if gates else 15.0, 1.0, 2)
    keys["final_logit_softcapping"] = config.need("logit_softcap", cap)  # 15 until March 2026, then 20 for a week
    config.ask()
    if gates:
        keys["attention.value_gate_scale"] = 3.0 if is_new or is_newest else 2.0
    if is_new or is_newest:
        keys["attention.scale"] = sharper**2 / math.sqrt(head_dim)
        keys["rope.freq_base"] = config.get("rope_theta", 100000.0)
    n_ctx, pattern = keys["context_length"], config.raw("window_pattern")
    if isinstance(pattern, str) and "S" in pattern.upper():
        letters = [pattern.upper()[i % len(pattern)] for i in range(keys["block_count"] - 1)] + ["L"]  # the last sees all
        short = max(n_ctx // 2, 1) if part == 2 else -(-n_ctx // part // 128) * 128  # whole tiles of its attention kernel
        keys["attention.sliding_window"] = short + 1
        keys["attention.sliding_window_pattern"] = [letter == "S" for letter in letters]


# ── litGPT ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _finish_litgpt(draft: Draft) -> None:
    """Set the architecture, the activation and how positions are scaled. Raises FileError for blocks that are not computed."""
    said, options = draft.config.raw, draft.options
    if (ratio := said("rope_condense_ratio")) not in (None, 1):  # what it divides positions by
        draft.keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": ratio}
    mlp, norm = said("mlp_class_name"), said("norm_class_name")
    if (options["gated"] and mlp == "GemmaMLP") or (norm == "RMSNorm" and "gemma" in str(said("name")).lower()):
        raise FileError(draft.config.path, "is a Gemma model of litGPT", "convert it to a Hugging Face folder with litgpt")
    if "activation" not in draft.config.given:
        gelu = "gelu_tanh" if said("gelu_approximate") == "tanh" else "gelu_erf"
        options["activation"] = "silu" if options["gated"] else gelu
    is_shared = "blk.0.ffn_norm.weight" not in draft.tensors
    if said("parallel_residual") or is_shared:
        draft.architecture = {(False, False): "gptneox", (True, False): "phi2", (True, True): "stablelm"}.get(
            (is_shared, options["gated"]), ""
        )
        usual = ARCHITECTURES[draft.architecture].USUAL if draft.architecture else {}
        if not usual or options["norm"] != usual["norm"]:
            problem = f"its blocks run side by side with {options['norm']} norms and {mlp or 'a feed-forward of its own'}"
            raise FileError(draft.config.path, problem, "pocketlm does not compute that")


def _from_groups(draft: Draft) -> None:
    """Until December 2024 each key-value head's queries, key and value were together; all queries are to come first."""
    n_head, n_kv_head, head_dim = draft.heads
    per_group = n_head // n_kv_head
    grid = np.arange((n_head + 2 * n_kv_head) * head_dim).reshape(n_kv_head, per_group + 2, head_dim)
    order = np.concatenate([part.ravel() for part in (grid[:, :per_group], grid[:, per_group], grid[:, per_group + 1])])
    reorder(draft.tensors, r"attn_qkv\.(weight|bias)", order)
    _finish_litgpt(draft)


# ── minimind ─────────────────────────────────────────────────────────────────────────────────────────────────────────

MINIMIND_TOKENS = 6400
MINIMIND_EXPERTS = ("num_experts", "n_routed_experts", "use_moe")  # entries of its configuration that its rows compute


def _is_minimind(tensors: Tensors) -> bool:
    return any(name.endswith("embed_tokens.weight") and t.shape[:1] == (MINIMIND_TOKENS,) for name, t in tensors.items())


def _guess_minimind(tensors: Tensors) -> dict[str, Any]:
    """It saves no configuration. minimind-3 normalises queries and keys, and uses one expert per token; minimind2 has two
    key-value heads, and uses two experts.
    """
    shapes = {name.partition("layers.0.self_attn.")[2]: t.shape for name, t in tensors.items()}
    norm, keys = shapes.get("q_norm.weight"), shapes.get("k_proj.weight", (0,))
    return {
        "head_dim": norm[0] if norm else keys[0] // 2, "rms_norm_eps": 1e-6 if norm else 1e-5, "rope_theta": 1e6,
        "max_position_embeddings": 32768, "num_experts_per_tok": 1 if norm else 2,
    }  # fmt: skip


def _finish_minimind(draft: Draft) -> None:
    """Models with experts: minimind-3's are those of Qwen3-MoE. minimind2 adds feed-forwards that all tokens share; side by
    side they make the one wide shared feed-forward of Granite-MoE.
    """
    tensors, config, keys = draft.tensors, draft.config, draft.keys
    if "blk.0.ffn_gate_inp.weight" not in tensors:
        return
    if config.said("scoring_func", "softmax") != "softmax" or config.said("norm_topk_prob", True) is not True:
        problem = "its configuration weighs experts by something else than the softmax of the chosen ones"
        raise FileError(config.path, problem, "pocketlm does not compute that")
    keys["expert_count"] = tensors["blk.0.ffn_gate_inp.weight"].shape[0]
    keys["expert_used_count"] = config.get("n_experts_used")
    if draft.architecture == "qwen3":
        draft.architecture = "qwen3moe"
        keys["expert_feed_forward_length"] = keys["feed_forward_length"]
        return
    draft.architecture = "granitemoe"
    keys |= {"logit_scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0, "attention.scale": draft.heads[2] ** -0.5}
    for role in in_layers(tensors, r"ffn_(gate|up|down)_shexps\.weight"):
        every = tensors.pop(role)
        tensors[role.replace("shexps", "shexp")] = _one_layer(every, is_down="down" in role)
    shared = tensors.get("blk.0.ffn_up_shexp.weight")
    keys["expert_shared_feed_forward_length"] = shared.shape[0] if shared else 0


def _one_layer(tensor: CanonicalTensor, is_down: bool) -> CanonicalTensor:
    """Join matrices (n, rows, columns): side by side if `is_down`, else below each other."""
    n, n_rows, n_columns = tensor.shape
    shape = (n_rows, n * n_columns) if is_down else (n * n_rows, n_columns)
    return tensor.changed(lambda every: (every.swapaxes(0, 1) if is_down else every).reshape(shape), *shape)


# ── GPT-Neo ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _finish_gptneo(draft: Draft) -> None:
    """Which layers have a sliding window, from `attention_layers` or `attention_types`."""
    config, n_layer = draft.config, draft.keys["block_count"]
    layers = config.raw("attention_layers")
    if layers is None and isinstance(types := config.raw("attention_types"), list):
        try:
            each = (kind for kinds, times in types for _ in range(times) for kind in kinds)
            layers = list(islice(each, n_layer + 1))  # however many the file asks for
        except (TypeError, ValueError):
            layers = types
    window = config.raw("window_size")
    if not isinstance(layers, list) or len(layers) != n_layer or not set(map(str, layers)) <= {"local", "global"}:
        raise FileError(config.path, "nothing says which of its layers are local", "put its config.json beside it")
    if not isinstance(window, int):
        raise FileError(config.path, "nothing says how wide its local windows are", "put its config.json beside it")
    draft.keys["attention.sliding_window"] = window
    draft.keys["attention.sliding_window_pattern"] = [kind == "local" for kind in layers]


_LITGPT = {"*.attn.qkv": "attn_qkv", "*.attn.attn": "attn_qkv", "*.mlp.fc": "ffn_up", "*.mlp.fc_1": "ffn_gate",
           "*.mlp.fc_2": "ffn_up"}  # fmt: skip
_LITGPT_FIXED = {"position": "rope", "rope_pairs": "half", "activation": "gelu_erf"}
_MINIMIND = {
    "*.mlp.gate": "ffn_gate_inp",
    **{f"*.mlp.{name}.{part}_proj": f"ffn_{part}_{end}" for part in ("gate", "up", "down")
       for name, end in (("experts.N", "exps#N"), ("shared_experts.N", "shexps#N"), ("shared_experts", "shexp"))},
}  # fmt: skip
_ROPE: dict[str, Any] = {"norm": "rms", "position": "rope", "rope_pairs": "half"}
HOME_MADE = (
    Dialect(
        "nanochat", (r"(.*\.)?wte\.weight", r"(.*\.)?h\.N\.attn\.c_q\.weight", r"(.*\.)?h\.N\.mlp\.c_fc\.weight"),
        {**_ROPE, "rope_theta": 10000.0, "activation": "relu_squared", "norm_eps": NANOCHAT_EPS},
        test=has_own_head, architecture="nanochat", finish=_finish_nanochat,
        names={
            **{f"*.attn.c_{part}": f"attn_{part}" for part in "qkv"},
            **{name: name for name in (*NANOCHAT_NUMBERS, "smear_gate")}, "*.attn.ve_gate": "attn_v_gate",
            "value_embeds.*": "attn_v_embd",
        },
        computes=("logit_softcap",),
        template=NANOCHAT_TEMPLATE,
    ),
    Dialect(
        "litGPT", (r"(.*\.)?h\.N\.norm_1\.weight", r"(.*\.)?h\.N\.attn\.qkv\.weight"), _LITGPT_FIXED,
        names=_LITGPT, finish=_finish_litgpt, computes=("parallel_residual",),
    ),
    Dialect(
        "litGPT before 2025", (r"(.*\.)?h\.N\.norm_1\.weight", r"(.*\.)?h\.N\.attn\.attn\.weight"), _LITGPT_FIXED,
        names=_LITGPT, finish=_from_groups, computes=("parallel_residual",),
    ),
    Dialect(
        "minimind 3", (r"(.*\.)?layers\.N\.self_attn\.q_norm\.weight", r"(.*\.)?layers\.N\.post_attention_layernorm\.weight"),
        _ROPE, test=_is_minimind, guess=_guess_minimind, architecture="qwen3", computes=MINIMIND_EXPERTS,
        names={**{f"*.self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"}, **_MINIMIND}, finish=_finish_minimind,
    ),
    Dialect(
        "minimind", (r"(.*\.)?layers\.N\.self_attn\.q_proj\.weight", r"(.*\.)?layers\.N\.post_attention_layernorm\.weight"),
        _ROPE, test=_is_minimind, guess=_guess_minimind, computes=MINIMIND_EXPERTS, names=_MINIMIND, finish=_finish_minimind,
    ),
    Dialect(
        "GPT-Neo", (r"(.*\.)?wpe\.weight", r"(.*\.)?h\.N\.attn\.attention\.q_proj\.weight"),
        {"norm": "layer", "activation": "gelu_tanh", "norm_eps": 1e-5},
        architecture="gptneo", finish=_finish_gptneo, computes=("sliding_window",),
        names={**{f"*.attn.attention.{part}_proj": f"attn_{part}" for part in "qkv"},
               "*.attn.attention.out_proj": "attn_output"},
    ),
)  # fmt: skip
