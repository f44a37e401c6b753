"""Dialects of the families with LayerNorm that transformers saves: GPT-NeoX, Phi 1 and 2, StableLM, StarCoder 2, BLOOM
and MPT.

Rows for dialects.py, and the functions that bring their tensors and keys into the form of GGUFs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pocketlm.errors import FileError
from pocketlm.export.dialect import Dialect, Draft
from pocketlm.export.tensor_parts import in_layers, reorder


def _apart(draft: Draft) -> None:
    """Reorder rows of (query, key, value) per head into all queries, all keys, all values."""
    n_head, _, head_dim = draft.heads
    order = np.arange(3 * n_head * head_dim).reshape(n_head, 3, head_dim).swapaxes(0, 1).ravel()
    reorder(draft.tensors, r"attn_qkv\.(weight|bias)", order)


def _gptneox(draft: Draft) -> None:
    _apart(draft)
    draft.keys["use_parallel_residual"] = draft.config.raw("use_parallel_residual") is not False


def _stablelm(draft: Draft) -> None:
    """Join the norms of single heads into one matrix [heads, head_dim]."""
    draft.keys["use_parallel_residual"] = draft.config.raw("use_parallel_residual") is True
    n_head, n_kv_head, head_dim = draft.heads
    for part, n in (("q", n_head), ("k", n_kv_head)):
        for role in in_layers(draft.tensors, rf"attn_{part}_norm\.weight"):
            if math.prod(draft.tensors[role].shape) == n * head_dim:  # else the plan says what is wrong
                draft.tensors[role] = draft.tensors[role].changed(lambda norms: norms.reshape(-1, head_dim), n, head_dim)


def _starcoder2(draft: Draft) -> None:
    if isinstance(window := draft.config.raw("sliding_window"), int):
        draft.keys["attention.sliding_window"] = window


def _mpt(draft: Draft) -> None:
    if draft.config.raw("alibi") is False:
        raise FileError(draft.config.path, "is an MPT without ALiBi", "pocketlm does not compute that")


_FIXED: dict[str, Any] = {"norm": "layer", "norm_eps": 1e-5}
_ROPE = {**_FIXED, "position": "rope", "rope_pairs": "half"}
LAYER_NORM = (
    Dialect(
        "Hugging Face GPT-NeoX", (r"(.*\.)?layers\.N\.attention\.query_key_value\.weight",),
        {**_ROPE, "activation": "gelu_erf", "rope_part": 0.25}, architecture="gptneox", finish=_gptneox,
        names={"*.attention.query_key_value": "attn_qkv"}, computes=("use_parallel_residual",),
    ),
    Dialect(
        "Hugging Face Phi", (r"(.*\.)?layers\.N\.self_attn\.dense\.weight", r"(.*\.)?layers\.N\.mlp\.fc1\.weight"),
        {**_ROPE, "activation": "gelu_tanh", "rope_part": 0.5}, architecture="phi2",
    ),
    Dialect(
        "Hugging Face StableLM", (r"(.*\.)?layers\.N\.input_layernorm\.bias", r"(.*\.)?layers\.N\.mlp\.gate_proj\.weight"),
        {**_ROPE, "rope_part": 0.25}, architecture="stablelm", computes=("use_parallel_residual", "qk_layernorm"),
        finish=_stablelm,
        names={f"*.self_attn.{part}_layernorm.norms.{i}": f"attn_{part}_norm#{i}" for part in "qk" for i in range(256)},
    ),
    Dialect(
        "Hugging Face StarCoder 2", (r"(.*\.)?layers\.N\.self_attn\.q_proj\.weight", r"(.*\.)?layers\.N\.mlp\.c_fc\.weight"),
        {**_ROPE, "activation": "gelu_tanh", "tied": True}, architecture="starcoder2", finish=_starcoder2,
        computes=("sliding_window", "layer_types"),
    ),
    Dialect(
        "Hugging Face BLOOM",
        (r"(.*\.)?h\.N\.self_attention\.query_key_value\.weight", r"(.*\.)?word_embeddings_layernorm\.weight"),
        {**_FIXED, "position": "alibi", "activation": "gelu_tanh", "n_ctx": 2048, "tied": True}, architecture="bloom",
        finish=_apart,
        names={"word_embeddings_layernorm": "token_embd_norm", "*.self_attention.query_key_value": "attn_qkv"},
    ),
    Dialect(
        "Hugging Face MPT", (r"(.*\.)?blocks\.N\.attn\.Wqkv\.weight", r"(.*\.)?blocks\.N\.ffn\.up_proj\.weight"),
        {**_FIXED, "position": "alibi", "activation": "gelu_erf", "tied": True}, architecture="mpt", finish=_mpt,
        names={"*.attn.q_ln": "attn_q_norm", "*.attn.k_ln": "attn_k_norm"},
    ),
)  # fmt: skip
