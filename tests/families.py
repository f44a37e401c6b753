"""What the tests of published architectures run: a GGUF of random weights for any of them."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import add_key, vocabulary, write_out

from pocketlm.runtime.architectures.common import Builder
from pocketlm.runtime.architectures.table import ARCHITECTURES
from pocketlm.runtime.hyper import read_hyper

Shapes = dict[str, tuple[int, ...]]
N_VOCAB = len(vocabulary()["tokenizer.ggml.tokens"])


def write_random(path: Path, arch: str, sizes: dict[str, int], keys: dict[str, Any], extra: Shapes, seed: int = 0) -> Path:
    """Write a GGUF of this architecture; `keys` without its name, `extra`: tensors that it may have and need not.

    llama.cpp refuses a file that lacks a tensor which the architecture needs, or has one that it does not know.
    """
    gguf = pytest.importorskip("gguf", reason="the gguf package writes the test models")
    keys = {
        "context_length": sizes["n_ctx"], "embedding_length": sizes["n_embd"], "block_count": sizes["n_layer"],
        "feed_forward_length": sizes["n_ff"], "attention.head_count": sizes["n_head"],
        "attention.head_count_kv": sizes["n_kv_head"], "attention.key_length": sizes["head_dim"],
        "attention.value_length": sizes["head_dim"], "rope.dimension_count": sizes["head_dim"],
        f"attention.layer_norm_{'rms_' * (ARCHITECTURES[arch].USUAL['norm'] == 'rms')}epsilon": 1e-5,
        **keys,
    }  # fmt: skip
    keys = {f"{arch}.{key}": value for key, value in keys.items()} | vocabulary()
    hyper = read_hyper({"general.architecture": arch, **keys}, N_VOCAB, path)
    wanted = Builder(hyper, extra, path)
    wanted.problems = deque(maxlen=0)  # type: ignore[assignment]  # nothing is there yet
    ARCHITECTURES[arch].operations(wanted)
    random, writer = np.random.default_rng(seed), gguf.GGUFWriter(str(path), arch)
    for key, value in keys.items():
        add_key(writer, key, value)
    for name, shape in {**wanted.used, **extra}.items():
        writer.add_tensor(name, random_weights(random, name, shape))
    write_out(writer)
    return path


def random_weights(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values that keep activations near one and are nowhere near a special one, so that a mixed-up tensor shows."""
    if "rope" in name:
        return random.uniform(1, 4, shape).astype(np.float32)
    noise = random.standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        return np.float32(0.2) * noise + np.float32("norm" in name and name.endswith("weight"))
    return noise * np.float32(0.3 if "embd" in name else 1.5 / np.sqrt(shape[-1]))
