"""Synthetic models mean the same to llama.cpp: what it computes from a file, both executors compute from it too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from agreement import compare
from llama_reference import LlamaReference
from tiny_models import write_model

import pocketlm

SHAPE: dict[str, Any] = {"n_layer": 3, "n_embd": 128, "n_head": 4, "n_ff": 192, "n_ctx": 256}
YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"arch": "gpt2"},
    "refact": {"arch": "refact", "n_kv_head": 2},
    "refact, 6 heads": {"arch": "refact", "n_embd": 192, "n_head": 6},
    "llama": {"arch": "llama", "n_kv_head": 2},
    "llama, own head": {"arch": "llama", "tied": False},
}
FLOAT_ONLY = {
    "llama, linear scaling": {"arch": "llama", "rope": {"type": "linear", "factor": 2.0}},
    "llama, yarn": {"arch": "llama", "rope": YARN},
    "llama, yarn with a longer base": {"arch": "llama", "rope": YARN, "rope_theta": 500000.0},
    "llama, frequency factors": {"arch": "llama", "rope_factors": np.linspace(1, 8, 16)},
    "llama, wide heads": {"arch": "llama", "head_dim": 64},
    "llama, biases": {"arch": "llama", "biases": True},
}


def both(path, backend: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits over 200 tokens: ours and llama.cpp's."""
    ids = np.random.default_rng(7).integers(0, 256, 200)
    with pocketlm.load(path, backend=backend, threads=2) as model, LlamaReference(path, n_ctx=256) as llama:
        return model.logits(ids), llama.logits(ids)


@pytest.mark.parametrize("backend", ["numpy", "native"])
@pytest.mark.parametrize("kind", ["F32", "F16"])
@pytest.mark.parametrize("options", [*MODELS.values(), *FLOAT_ONLY.values()], ids=[*MODELS, *FLOAT_ONLY])
def test_float_weights_point_the_same_way(tmp_path, options, kind, backend):
    ours, theirs = both(write_model(tmp_path / "model.gguf", **SHAPE | options, format=kind), backend)
    assert compare(theirs, ours).worst_cosine >= 0.999


@pytest.mark.parametrize("backend", ["numpy", "native"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_quantised_weights_differ_by_llama_cpps_rounding_only(tmp_path, options, kind, backend):
    """Its activations are rounded to 8 bits; the limits are those of a real model, see test_smollm2."""
    ours, theirs = both(write_model(tmp_path / "model.gguf", **SHAPE | options, format=kind), backend)
    found = compare(ours, theirs)
    assert found.kl <= 4e-3
    assert found.worst_cosine >= 0.985
