"""A Llama with a tied head, written once more: float64, from the weights that the gguf package dequantises."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from pocketlm.runtime.gguf_reader import open_gguf


class Shape(NamedTuple):
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    theta: float
    eps: float


SMOLLM2 = Shape(30, 9, 3, 64, 100000.0, 1e-5)  # from its model card
POCKET = Shape(4, 8, 4, 32, 10000.0, 1e-5)  # from train/README.md


def exact_logits(weights: dict[str, np.ndarray], ids: np.ndarray, shape: Shape) -> np.ndarray:
    """All positions at once: logits [n, n_vocab]."""
    n_layer, n_head, n_kv_head, head_dim, theta, eps = shape
    n = len(ids)

    def rms_norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weights[f"{name}.weight"].astype(np.float64)

    def times(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].astype(np.float64).T

    turns = np.exp(1j * np.arange(n)[:, None] * theta ** (-np.arange(0, head_dim, 2) / head_dim))  # [n, head_dim / 2]

    def heads(x: np.ndarray, rotated: bool) -> np.ndarray:  # [n, heads * head_dim] -> [heads, n, head_dim]
        x = x.reshape(n, -1, head_dim).transpose(1, 0, 2)
        if not rotated:
            return x
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turns
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    future = np.triu(np.full((n, n), -np.inf), 1)
    x = weights["token_embd.weight"][ids].astype(np.float64)
    for i in range(n_layer):
        at = f"blk.{i}."
        h = rms_norm(x, f"{at}attn_norm")
        q, k = heads(times(h, f"{at}attn_q"), True), heads(times(h, f"{at}attn_k"), True)
        v = heads(times(h, f"{at}attn_v"), False)
        mixed = []
        for head in range(n_head):
            shared = head // (n_head // n_kv_head)
            scores = np.exp(q[head] @ k[shared].T / np.sqrt(head_dim) + future)
            mixed.append(scores / scores.sum(-1, keepdims=True) @ v[shared])
        x = x + times(np.concatenate(mixed, -1), f"{at}attn_output")
        h = rms_norm(x, f"{at}ffn_norm")
        gate = times(h, f"{at}ffn_gate")
        x = x + times(gate / (1 + np.exp(-gate)) * times(h, f"{at}ffn_up"), f"{at}ffn_down")
    return times(rms_norm(x, "output_norm"), "token_embd")


def dequantised(path: Path) -> dict[str, np.ndarray]:
    """The weights, dequantised by the gguf package. Its reader takes 8 s for this vocabulary, so the bytes come from ours."""
    gguf = pytest.importorskip("gguf", reason="the gguf package dequantises the weights")
    with open_gguf(path) as file:
        return {
            name: gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[tensor.format.name])
            .view(np.float32)
            .reshape(tensor.shape)
            for name, tensor in file.tensors.items()
        }
