"""Published architectures: a GGUF of random weights gives the logits that llama.cpp computes from it.

A row of MODELS is one architecture with every option that changes what it computes; each is tried in three shapes, by both
executors, the text in one pass and token by token. The texts are longer than the windows and, where rotary positions are
scaled, longer than the context that the model was first trained for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agreement import compare
from families import N_VOCAB, Shapes, write_random
from llama_reference import LlamaReference
from operation_lists import published, reference, tensors_of

import pocketlm
from pocketlm.errors import FileError
from pocketlm.runtime.numpy_executor import NumpyExecutor
from pocketlm.runtime.operations import Norm, Rotate


@dataclass(frozen=True)
class Row:
    """`keys` and `extra` (tensors that the architecture may have) as `write_random` takes them, `{i}`: a layer's number."""

    arch: str
    keys: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, str | int] = field(default_factory=dict)  # name -> width, a number or the name of a size
    sizes: dict[str, int] = field(default_factory=dict)
    n: int = 48  # tokens of the text
    narrow: bool = False  # llama.cpp wants heads that are together as wide as the model
    equal: bool = False  # and as many of keys as of queries
    convolved: tuple[int, ...] = ()  # layers with a short convolution in place of attention
    seed: int = 0  # of the weights; routers whose scores lie near each other choose by the last bits, which is another choice


SHAPES = {
    "grouped heads": {"n_embd": 64, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "n_ff": 96},
    "as many keys": {"n_embd": 96, "n_head": 3, "n_kv_head": 3, "head_dim": 32, "n_ff": 128},
    "wide heads": {"n_embd": 64, "n_head": 6, "n_kv_head": 1, "head_dim": 24, "n_ff": 80},
}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
SWA_BASE = {"rope.freq_base_swa": 500.0}
OWN_HEAD: dict[str, str | int] = {"output.weight": "vocabulary"}


def biases(*names: str) -> dict[str, str | int]:
    """Of every layer's parts, "name: width"."""
    return {f"blk.{{i}}.{name}.bias": width for name, width in (each.split(": ") for each in names)}


QKV_BIASES = biases("attn_q: q", "attn_k: kv", "attn_v: kv")
FUSED: dict[str, str | int] = {"blk.{i}.attn_qkv.weight": "qkv", "blk.{i}.ffn_up.weight": "gate and up"}
GPT_OSS_BIASES = biases(
    "attn_output: embd", "ffn_gate_inp: experts", "ffn_gate_exps: experts, ff", "ffn_up_exps: experts, ff",
    "ffn_down_exps: experts, embd",
)  # fmt: skip
NORM_BIASES = {**biases("attn_norm: embd", "ffn_norm: embd"), "output_norm.bias": "embd"}
OUT_BIASES = biases("attn_output: embd", "ffn_up: ff", "ffn_down: embd")
FUSED_QKV = {**biases("attn_qkv: q, k, v"), "blk.{i}.attn_qkv.weight": "qkv", **OUT_BIASES}
STABLELM = {**OWN_HEAD, **biases("attn_norm: embd"), "output_norm.bias": "embd"}
PHI2 = {**STABLELM, "output.bias": "words"}
NEOX = {**NORM_BIASES, **FUSED_QKV, **OWN_HEAD}
BLOOM = {**NORM_BIASES, **FUSED_QKV, "token_embd_norm.bias": "embd"}
STARCODER2 = {**NORM_BIASES, **QKV_BIASES, **OUT_BIASES}
PART = {"rope.dimension_count": 8}
PARALLEL = {"use_parallel_residual": True, **PART}
FACTORS: dict[str, str | int] = {"rope_factors_long.weight": "half", "rope_factors_short.weight": "half"}
LONGROPE = {"rope.scaling.original_context_length": 256, "rope.scaling.attn_factor": 1.19}
GRANITE = {"logit_scale": 8.0, "embedding_scale": 12.0, "residual_scale": 0.22, "attention.scale": 0.1}
EXPERTS = {"expert_count": 8, "expert_used_count": 3}
MODELS = {
    "mixtral": Row("llama", EXPERTS | {"rope.freq_base": 1e6}, OWN_HEAD, seed=2),
    "mixtral, one of many": Row("llama", {"expert_count": 64, "expert_used_count": 1}, seed=2),
    "qwen2moe": Row(
        "qwen2moe", {**EXPERTS, "expert_feed_forward_length": 48, "expert_shared_feed_forward_length": 112},
        {**OWN_HEAD, **QKV_BIASES}, narrow=True, seed=2,
    ),
    "qwen2moe, widths from the dense one's": Row("qwen2moe", {**EXPERTS, "expert_used_count": 2}, OWN_HEAD, narrow=True),
    "granitemoe": Row("granitemoe", {**GRANITE, **EXPERTS}, seed=2),
    "granitemoe, a shared expert": Row(
        "granitemoe", {**GRANITE, **EXPERTS, "expert_shared_feed_forward_length": 40}, OWN_HEAD, seed=10,
    ),
    "qwen3moe": Row("qwen3moe", EXPERTS | {"expert_feed_forward_length": 48, "rope.freq_base": 1e6}),
    "qwen3moe, yarn, own head": Row("qwen3moe", {**EXPERTS, **YARN, "expert_feed_forward_length": 36}, OWN_HEAD),
    "qwen3moe, one of many": Row(
        "qwen3moe", {"expert_count": 100, "expert_used_count": 1, "expert_feed_forward_length": 32}, OWN_HEAD,
    ),
    "gpt-oss": Row(
        "gpt-oss", {**EXPERTS, **YARN, "expert_feed_forward_length": 48, "attention.sliding_window": 8},
        {**OWN_HEAD, **QKV_BIASES, **GPT_OSS_BIASES}, {"n_layer": 4}, seed=3,
    ),
    "gpt-oss, no yarn": Row(
        "gpt-oss", {**EXPERTS, "expert_feed_forward_length": 64, "attention.sliding_window": 8},
        {**OWN_HEAD, **QKV_BIASES, **GPT_OSS_BIASES},
    ),
    "gpt-oss, another base in windows": Row(
        "gpt-oss", {"expert_count": 2, "expert_used_count": 2, **YARN, **SWA_BASE, "attention.sliding_window": 8,
                    "expert_feed_forward_length": 64},
        {**OWN_HEAD, **QKV_BIASES, **GPT_OSS_BIASES},
    ),
    "olmoe": Row("olmoe", EXPERTS, OWN_HEAD, narrow=True, equal=True, seed=27),
    "olmoe, all of two": Row(
        "olmoe", {**YARN, "expert_count": 2, "expert_used_count": 2}, OWN_HEAD, narrow=True, equal=True,
    ),
    "qwen2": Row("qwen2", {"rope.freq_base": 1e6}, QKV_BIASES, narrow=True),
    "qwen2, yarn, own head": Row("qwen2", YARN, {**QKV_BIASES, **OWN_HEAD}, narrow=True),
    "qwen3": Row("qwen3", {"rope.freq_base": 1e6}),
    "qwen3, yarn, own head": Row("qwen3", YARN, OWN_HEAD),
    "qwen3, yarn, a factor below 1": Row("qwen3", {**YARN, "rope.scaling.factor": 0.5, "rope.scaling.attn_factor": 1.2}),
    "qwen3, a factor alone is linear": Row("qwen3", {"rope.scaling.factor": 4.0}),
    "qwen3, a factor of longrope": Row("qwen3", {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}),
    "qwen3, no scaling whatever the factor": Row("qwen3", {"rope.scaling.type": "none", "rope.scale_linear": 4.0}),
    "gemma3": Row("gemma3", {"attention.sliding_window": 8, "rope.freq_base": 1e6}, sizes={"n_layer": 7}),
    "gemma3, linear, capped logits": Row(
        "gemma3",
        {"attention.sliding_window": 8, "rope.freq_base": 1e6, "final_logit_softcapping": 2.0,
         "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        OWN_HEAD, sizes={"n_layer": 7},
    ),
    "gemma3, another base in windows": Row(
        "gemma3", {"attention.sliding_window": 8, "rope.freq_base": 1e6, "rope.freq_base_swa": 500.0}, sizes={"n_layer": 7},
    ),
    "gemma3, another period": Row(
        "gemma3", {"attention.sliding_window": 8, "attention.sliding_window_pattern": 3}, sizes={"n_layer": 7},
    ),
    "gemma3, windows everywhere": Row(
        "gemma3", {"attention.sliding_window": 8, "attention.sliding_window_pattern": 0}, sizes={"n_layer": 7},
    ),
    "phi3": Row("phi3", {}, FUSED, narrow=True),
    "phi3, longrope, short": Row("phi3", LONGROPE, {**FUSED, **FACTORS, **OWN_HEAD}, narrow=True),
    "phi3, longrope, long": Row("phi3", LONGROPE, {**FUSED, **FACTORS}, {"n_ctx": 512}, 300, narrow=True),
    "phi3, a part of the head rotated": Row(
        "phi3", {**LONGROPE, "rope.dimension_count": 12},
        {**FUSED, "rope_factors_long.weight": 6, "rope_factors_short.weight": 6}, {"n_ctx": 512}, 300, narrow=True,
    ),
    "smollm3": Row("smollm3", {"rope.freq_base": 5e6}, sizes={"n_layer": 5}),
    "smollm3, yarn, own head": Row("smollm3", YARN, OWN_HEAD, {"n_layer": 5}),
    "granite": Row("granite", {"logit_scale": 8.0}),
    "granite, all factors": Row("granite", GRANITE, OWN_HEAD),
    "granite, no positions": Row("granite", {**GRANITE, "rope.scaling.finetuned": False}),
    "gemma": Row("gemma"),
    "gemma2": Row(
        "gemma2", {"attention.sliding_window": 8, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    ),
    "gemma2, windows layer by layer": Row(
        "gemma2", {"attention.sliding_window": 8, "attention.sliding_window_pattern": [False, True, True]},
    ),
    "gemma2, another base in windows": Row("gemma2", {"attention.sliding_window": 8, **SWA_BASE}),
    "gemma2, no caps said": Row("gemma2", {"attention.sliding_window": 8}),
    "gemma2, as deep as 27B": Row("gemma2", {"attention.sliding_window": 8}, {}, {"n_layer": 46}, 12),
    "hunyuan-dense": Row("hunyuan-dense", {"rope.freq_base": 1e6}),
    "hunyuan-dense, own head": Row("hunyuan-dense", {}, OWN_HEAD),
    "gemma3, as deep as 27B": Row("gemma3", {"attention.sliding_window": 8}, {}, {"n_layer": 62}, 12),
    "lfm2": Row("lfm2", {"shortconv.l_cache": 3, "rope.freq_base": 1e6}, {}, {"n_layer": 5}, narrow=True, convolved=(0, 1, 3)),
    "lfm2, longer convolutions, own head": Row("lfm2", {"shortconv.l_cache": 7}, OWN_HEAD, narrow=True, convolved=(1, 2)),
    "lfm2, one position": Row("lfm2", {"shortconv.l_cache": 2}, {}, {"n_layer": 2}, narrow=True, convolved=(0,)),
    "lfm2, windows": Row(
        "lfm2", {"shortconv.l_cache": 3, "rope.freq_base": 1e6, "attention.sliding_window": 8, **SWA_BASE},
        {}, {"n_layer": 5}, narrow=True, convolved=(0, 1, 3),
    ),
    "olmo2": Row("olmo2", {}, OWN_HEAD, narrow=True),
    "olmo2, yarn": Row("olmo2", YARN, OWN_HEAD, narrow=True),
    "olmo3, another period": Row(
        "olmo2", {**YARN, "attention.sliding_window": 8, "attention.sliding_window_pattern": 2}, OWN_HEAD, narrow=True,
    ),
    "olmo3": Row("olmo2", {**YARN, "attention.sliding_window": 8}, OWN_HEAD, {"n_layer": 5}, narrow=True),
    # with LayerNorm, ALiBi or norms behind their blocks: GELU is the tanh formula, as a file of theirs means it here, too
    "stablelm": Row("stablelm", PART, {**STABLELM, **NORM_BIASES, "blk.{i}.ffn_norm.weight": "embd"}, narrow=True),
    "stablelm, biases": Row(
        "stablelm", PART, {**STABLELM, **NORM_BIASES, **QKV_BIASES, "blk.{i}.ffn_norm.weight": "embd"}, narrow=True
    ),
    "stablelm, side by side, heads normalised": Row(
        "stablelm", PARALLEL, {**STABLELM, "blk.{i}.attn_q_norm.weight": "heads", "blk.{i}.attn_k_norm.weight": "kv_heads"},
        narrow=True,
    ),
    "phi2": Row("phi2", PART, {**PHI2, **QKV_BIASES, **OUT_BIASES}, narrow=True),
    "phi2, fused": Row("phi2", PART, {**PHI2, **FUSED_QKV}, narrow=True),
    "gptneox": Row("gptneox", PARALLEL, NEOX, narrow=True, equal=True),
    "gptneox, one after the other": Row("gptneox", {"use_parallel_residual": False}, NEOX, narrow=True, equal=True),
    "starcoder2": Row("starcoder2", {"rope.freq_base": 1e5}, STARCODER2, narrow=True),
    "starcoder2, own head": Row("starcoder2", {}, {**STARCODER2, **OWN_HEAD}, narrow=True),
    "exaone4": Row("exaone4", {"rope.freq_base": 1e6}, narrow=True),
    "exaone4, as deep as 32B": Row("exaone4", {"attention.sliding_window": 8}, {}, {"n_layer": 64}, 24, narrow=True),
    "exaone4, scaled frequencies": Row("exaone4", {}, {**OWN_HEAD, "rope_freqs.weight": "half"}, narrow=True),
    "bloom": Row("bloom", {}, BLOOM, narrow=True, equal=True),
    "bloom, own head": Row("bloom", {}, {**BLOOM, **OWN_HEAD}, narrow=True, equal=True),
    "mpt": Row("mpt", {"attention.max_alibi_bias": 8.0}, {"blk.{i}.attn_qkv.weight": "qkv"}, narrow=True, equal=True),
    "mpt, biases, steeper": Row(
        "mpt", {"attention.max_alibi_bias": 16.0}, {**NORM_BIASES, **FUSED_QKV}, narrow=True, equal=True
    ),
}  # fmt: skip


def tensors(row: Row, sizes: dict[str, int]) -> Shapes:
    """The shapes of `row.extra`, in every layer."""
    q, kv = sizes["n_head"] * sizes["head_dim"], sizes["n_kv_head"] * sizes["head_dim"]
    n, n_ff = (int(row.keys.get(f"expert_{name}", 0)) for name in ("count", "feed_forward_length"))
    shapes: dict[str, tuple[int, ...]] = {
        "q": (q,), "kv": (kv,), "half": (sizes["head_dim"] // 2,), "vocabulary": (N_VOCAB, sizes["n_embd"]),
        "embd": (sizes["n_embd"],), "experts": (n,), "experts, ff": (n, n_ff), "experts, embd": (n, sizes["n_embd"]),
        "qkv": (q + 2 * kv, sizes["n_embd"]), "gate and up": (2 * sizes["n_ff"], sizes["n_embd"]), "q, k, v": (q + 2 * kv,),
        "ff": (sizes["n_ff"],), "words": (N_VOCAB,), "heads": (sizes["n_head"], sizes["head_dim"]),
        "kv_heads": (sizes["n_kv_head"], sizes["head_dim"]),
    }  # fmt: skip
    return {
        name.replace("{i}", str(i)): shapes[width] if isinstance(width, str) else (width,)
        for name, width in row.extra.items()
        for i in range(sizes["n_layer"] if "{i}" in name else 1)
    }


def write(path: Path, row: Row, shape: dict[str, int], **more: Any) -> dict[str, int]:
    """A GGUF of a row in this shape; its sizes. `more`: keys."""
    sizes = {"n_layer": 3, "n_ctx": 64, **shape, **row.sizes}
    if row.equal:
        sizes["n_kv_head"] = sizes["n_head"]
    if row.narrow:
        sizes["n_embd"] = sizes["n_head"] * sizes["head_dim"]
    keys = {**row.keys, **more}
    if row.convolved:
        heads = [0 if layer in row.convolved else sizes["n_kv_head"] for layer in range(sizes["n_layer"])]
        keys["attention.head_count_kv"] = heads
    write_random(path, row.arch, sizes, keys, tensors(row, sizes), row.seed)
    return sizes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_llama_cpps(tmp_path, name, shape):
    row, path = MODELS[name], tmp_path / "model.gguf"
    sizes = write(path, row, SHAPES[shape])
    ids = np.random.default_rng(1).integers(0, 256, row.n)
    with LlamaReference(path, n_ctx=sizes["n_ctx"]) as llama:
        expected = llama.logits(ids)
    assert np.ptp(expected, axis=1).min() > 0.5  # they say something
    for backend in ("numpy", "native"):
        with pocketlm.load(path, backend=backend, threads=2) as model:
            assert compare(expected, model.logits(ids)).worst_cosine >= 0.9999, backend
            executor = model.executor
            executor.cache.truncate(0)
            one_by_one = np.concatenate([executor.forward(ids[i : i + 1]).copy() for i in range(len(ids))])
            assert compare(expected, one_by_one).worst_cosine >= 0.9999, backend


def test_what_mpt_can_and_pocketlm_cannot_is_refused_by_its_key(tmp_path):
    with pytest.raises(FileError, match=r"mpt.attention.clamp_kqv = 6.*pocketlm does not compute that"):
        write(tmp_path / "model.gguf", MODELS["mpt"], SHAPES["as many keys"], **{"attention.clamp_kqv": 6.0})


def test_an_mpt_that_normalises_queries_and_keys_is_what_float64_gives():
    """llama.cpp ends the program on such a file."""
    extra = {f"blk.{i}.attn_{part}_norm.{end}": (64,) for i in range(2) for part in "qk" for end in ("weight", "bias")}
    options = {"norm": "layer", "position": "alibi", "gated": False, "n_kv_head": 4, "activation": "gelu_tanh"}
    plan = published("mpt", extra, architecture="mpt", **options)
    weights, ids = tensors_of(plan), np.random.default_rng(0).integers(0, 96, 24)
    executor = NumpyExecutor(plan, weights, 64, 1)
    assert sum(isinstance(op, Norm) and op.x == "qkv" for op in plan.ops) == 4
    assert np.abs(executor.forward(ids, rows="all") - reference(plan, weights, ids, 64, cached=lambda x: x)).max() < 1e-3
    executor.close()


def test_a_window_that_a_starcoder2_states_is_seen(tmp_path):
    ids, logits = np.random.default_rng(1).integers(0, 256, 40), []
    for keys in ({}, {"attention.sliding_window": 16}):
        write(tmp_path / "model.gguf", MODELS["starcoder2"], SHAPES["grouped heads"], **keys)
        with pocketlm.load(tmp_path / "model.gguf", backend="numpy") as model:
            logits.append(model.logits(ids))
    whole, part = logits
    assert np.abs(whole[:16] - part[:16]).max() < 1e-4
    assert np.abs(whole[16:] - part[16:]).max(1).min() > 1e-3


@pytest.mark.parametrize("name", ["olmo3", "exaone4, as deep as 32B"])
def test_windows_turn_by_the_base_that_a_file_gives_them(tmp_path, name):
    """As in transformers, from which llama.cpp's converter takes it; llama.cpp itself reads it and computes with the other."""
    write(tmp_path / "m.gguf", MODELS[name], SHAPES["wide heads"], **SWA_BASE)
    with pocketlm.load(tmp_path / "m.gguf", backend="numpy") as model:
        bases = [op.rope.theta for op in model._plan.ops if isinstance(op, Rotate)]
    assert bases[:4] == ([500.0] * 3 + [10000.0] if name == "olmo3" else [500.0] * 4), "EXAONE rotates in windows alone"
