"""Architectures with LayerNorm, ALiBi or norms behind their blocks: the logits that llama.cpp computes, and transformers.

llama.cpp computes GELU by the tanh formula for all of them, which is what a file of these architectures means here, too; the
authors of GPT-NeoX and MPT compute it exactly, and a file that pocketlm exports says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agreement import compare
from families import N_VOCAB, write_random
from llama_reference import LlamaReference
from operation_lists import make, reference, tensors_of

import pocketlm
from pocketlm.errors import FileError
from pocketlm.runtime.architectures import mpt
from pocketlm.runtime.numpy_executor import NumpyExecutor
from pocketlm.runtime.operations import Norm

SHAPES = {
    "grouped heads": {"n_embd": 64, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "n_ff": 96},
    "as many keys": {"n_embd": 96, "n_head": 3, "n_kv_head": 3, "head_dim": 32, "n_ff": 128},
    "one key head": {"n_embd": 96, "n_head": 6, "n_kv_head": 1, "head_dim": 16, "n_ff": 160},
}
NORM_BIASES = "attn_norm:embd ffn_norm:embd"
FUSED = "attn_qkv:qkv attn_output:embd ffn_up:ff ffn_down:embd"


@dataclass(frozen=True)
class Row:
    """`biases` and `more`: tensors in every layer, "name:width"; `top`: those of the whole model."""

    arch: str
    biases: str = ""
    more: str = ""
    top: str = "output_norm.bias:embd"
    keys: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


PART = {"rope.dimension_count": 8}
PARALLEL = {"use_parallel_residual": True, **PART}
ALL_BIASES = f"{NORM_BIASES} {FUSED}"
APART = "attn_q:q attn_k:kv attn_v:kv attn_output:embd ffn_up:ff ffn_down:embd"
MODELS = {
    "stablelm": Row("stablelm", NORM_BIASES, "ffn_norm.weight:embd", "output_norm.bias:embd output.weight:head", PART),
    "stablelm, biases": Row(
        "stablelm", f"{NORM_BIASES} attn_q:q attn_k:kv attn_v:kv", "ffn_norm.weight:embd",
        "output_norm.bias:embd output.weight:head", PART,
    ),
    "stablelm, side by side, heads normalised": Row(
        "stablelm", "attn_norm:embd", "attn_q_norm.weight:heads attn_k_norm.weight:kv_heads",
        "output_norm.bias:embd output.weight:head", PARALLEL,
    ),
    "phi2": Row("phi2", f"attn_norm:embd {APART}", "", "output_norm.bias:embd output.weight:head output.bias:vocab", PART),
    "phi2, fused": Row(
        "phi2", f"attn_norm:embd {FUSED}", "attn_qkv.weight:qkv_in",
        "output_norm.bias:embd output.weight:head output.bias:vocab", PART,
    ),
    "gptneox": Row(
        "gptneox", ALL_BIASES, "attn_qkv.weight:qkv_in", "output_norm.bias:embd output.weight:head", PARALLEL,
    ),
    "gptneox, one after the other": Row(
        "gptneox", ALL_BIASES, "attn_qkv.weight:qkv_in", "output_norm.bias:embd output.weight:head",
        {"use_parallel_residual": False},
    ),
    "starcoder2": Row("starcoder2", f"{NORM_BIASES} {APART}", keys={"rope.freq_base": 1e5}),
    "starcoder2, own head": Row("starcoder2", f"{NORM_BIASES} {APART}", "", "output_norm.bias:embd output.weight:head"),
    "exaone4": Row("exaone4", top="", keys={"rope.freq_base": 1e6}),
    "exaone4, as deep as 32B": Row("exaone4", top="", keys={"attention.sliding_window": 8}, sizes={"n_layer": 64}),
    "exaone4, whose windows have the same base whatever is said": Row(
        "exaone4", top="", keys={"attention.sliding_window": 8, "rope.freq_base_swa": 500.0}, sizes={"n_layer": 64},
    ),
    "exaone4, scaled frequencies": Row("exaone4", top="rope_freqs.weight:half output.weight:head"),
    "bloom": Row("bloom", ALL_BIASES, "attn_qkv.weight:qkv_in", "output_norm.bias:embd token_embd_norm.bias:embd"),
    "bloom, own head": Row(
        "bloom", ALL_BIASES, "attn_qkv.weight:qkv_in", "output_norm.bias:embd token_embd_norm.bias:embd output.weight:head",
    ),
    "mpt": Row("mpt", "", "attn_qkv.weight:qkv_in", "", {"attention.max_alibi_bias": 8.0}),
    "mpt, biases, steeper": Row("mpt", ALL_BIASES, "attn_qkv.weight:qkv_in", keys={"attention.max_alibi_bias": 16.0}),
}  # fmt: skip


def tensors(row: Row, sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The tensors of a row and their shapes."""
    d, embd = sizes["head_dim"], sizes["n_embd"]
    q, kv = sizes["n_head"] * d, sizes["n_kv_head"] * d
    shapes: dict[str, tuple[int, ...]] = {
        "embd": (embd,), "q": (q,), "kv": (kv,), "qkv": (q + 2 * kv,), "ff": (sizes["n_ff"],), "vocab": (N_VOCAB,),
        "half": (d // 2,), "head": (N_VOCAB, embd), "qkv_in": (q + 2 * kv, embd), "heads": (sizes["n_head"], d),
        "kv_heads": (sizes["n_kv_head"], d),
    }  # fmt: skip
    pairs = [pair.split(":") for pair in row.top.split()]
    for i in range(sizes["n_layer"]):
        pairs += [(f"blk.{i}.{name}.bias", width) for name, width in (pair.split(":") for pair in row.biases.split())]
        pairs += [(f"blk.{i}.{name}", width) for name, width in (pair.split(":") for pair in row.more.split())]
    return {name: shapes[width] for name, width in pairs}


def write(path: Path, row: Row, shape: dict[str, int]) -> dict[str, int]:
    """A GGUF of a row in this shape; its sizes."""
    sizes = {"n_layer": 3, "n_ctx": 64, **shape, **row.sizes}
    if row.arch in ("gptneox", "bloom", "mpt"):  # their code has no grouped heads
        sizes["n_kv_head"] = sizes["n_head"]
    write_random(path, row.arch, sizes, row.keys, tensors(row, sizes))
    return sizes


def logits_of(path: Path, backend: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In one block, and token by token."""
    with pocketlm.load(path, backend=backend, threads=2) as model:
        whole = model.logits(ids)
        executor = model.executor
        executor.cache.truncate(0)
        return whole, np.concatenate([executor.forward(ids[i : i + 1]).copy() for i in range(len(ids))])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_llama_cpps(tmp_path: Path, name: str, shape: str) -> None:
    path = tmp_path / "model.gguf"
    sizes = write(path, MODELS[name], SHAPES[shape])
    ids = np.random.default_rng(1).integers(0, 256, 40)
    with LlamaReference(path, n_ctx=sizes["n_ctx"]) as llama:
        expected = llama.logits(ids)
    assert np.ptp(expected, axis=1).min() > 0.5  # they say something
    for backend in ("numpy", "native"):
        for logits in logits_of(path, backend, ids):
            assert compare(expected, logits).worst_cosine >= 0.9999, backend


def test_what_mpt_can_and_pocketlm_cannot_is_refused_by_its_key(tmp_path: Path) -> None:
    row, sizes = MODELS["mpt"], {"n_layer": 3, "n_ctx": 64, **SHAPES["as many keys"]}
    with pytest.raises(FileError, match=r"mpt.attention.clamp_kqv = 6.*pocketlm does not compute that"):
        write_random(tmp_path / "model.gguf", "mpt", sizes, {**row.keys, "attention.clamp_kqv": 6.0}, tensors(row, sizes))


def test_an_mpt_that_normalises_queries_and_keys_is_what_float64_gives() -> None:
    """llama.cpp ends the program on such a file."""
    extra = {f"blk.{i}.attn_{part}_norm.{end}": (64,) for i in range(2) for part in "qk" for end in ("weight", "bias")}
    plan = make(mpt.operations, extra, architecture="mpt", norm="layer", position="alibi", gated=False, n_kv_head=4,
                activation="gelu_tanh")  # fmt: skip
    weights, ids = tensors_of(plan), np.random.default_rng(0).integers(0, 96, 24)
    executor = NumpyExecutor(plan, weights, 64, 1)
    assert sum(isinstance(op, Norm) and op.x == "qkv" for op in plan.ops) == 4
    assert np.abs(executor.forward(ids, rows="all") - reference(plan, weights, ids, 64, cached=lambda x: x)).max() < 1e-3
    executor.close()


def test_a_window_that_a_starcoder2_states_is_seen(tmp_path: Path) -> None:
    row, sizes = MODELS["starcoder2"], {"n_layer": 2, "n_ctx": 64, **SHAPES["grouped heads"]}
    ids = np.random.default_rng(1).integers(0, 256, 40)
    plain, windowed = (
        write_random(tmp_path / f"{len(keys)}.gguf", "starcoder2", sizes, keys, tensors(row, sizes))
        for keys in ({}, {"attention.sliding_window": 16})
    )
    (whole, _), (part, _) = (logits_of(path, "numpy", ids) for path in (plain, windowed))
    assert np.abs(whole[:16] - part[:16]).max() < 1e-4
    assert np.abs(whole[16:] - part[16:]).max(1).min() > 1e-3
