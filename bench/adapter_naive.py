"""A GPT-2 in NumPy float32 as tutorials write it, with a KV cache that grows by concatenation: a row of speed.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from pocketlm.runtime.model_file import open_model


class Naive:
    """Threads are BLAS's."""

    def __init__(self, path: str, n_threads: int, n_ctx: int):
        with open_model(path) as opened:
            self.w = {name: tensor.to_float32().copy() for name, tensor in opened.tensors.items()}
            self.n_layer = opened.metadata["gpt2.block_count"]
            self.n_head = opened.metadata["gpt2.attention.head_count"]
        self.facts = {"version": f"NumPy {np.__version__}", "build": "its own BLAS", "settings": f"{n_threads} BLAS threads"}
        self.cache: list[Any] = [None] * self.n_layer
        self.length = 0

    def truncate(self, length: int) -> None:
        self.length = length
        self.cache = [kv and tuple(x[:length] for x in kv) for kv in self.cache] if length else [None] * self.n_layer

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:  # [n, n_in] -> [n, n_out]
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def layer_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return self.w[f"{name}.weight"] * (x - mean) / np.sqrt(variance + 1e-5) + self.w[f"{name}.bias"]

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:  # [n, width], [t, width] twice
        n, t = len(q), len(k)
        mask = np.triu(np.full((n, t), -np.inf, np.float32), t - n + 1)
        heads = []
        for q_head, k_head, v_head in zip(*(np.split(x, self.n_head, -1) for x in (q, k, v)), strict=True):
            scores = q_head @ k_head.T / np.float32(np.sqrt(q_head.shape[-1])) + mask
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v_head)
        return np.concatenate(heads, -1)

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:  # [n] -> [1 or n, n_vocab]
        places = np.arange(self.length, self.length + len(ids))
        x = self.w["token_embd.weight"][ids] + self.w["position_embd.weight"][places]
        for i in range(self.n_layer):
            at = f"blk.{i}."
            q, k, v = np.split(self.linear(self.layer_norm(x, f"{at}attn_norm"), f"{at}attn_qkv"), 3, -1)
            if self.cache[i] is not None:
                k, v = np.concatenate([self.cache[i][0], k]), np.concatenate([self.cache[i][1], v])
            self.cache[i] = k, v
            x = x + self.linear(self.attention(q, k, v), f"{at}attn_output")
            h = self.linear(self.layer_norm(x, f"{at}ffn_norm"), f"{at}ffn_up")
            h = 0.5 * h * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (h + 0.044715 * h**3)))
            x = x + self.linear(h, f"{at}ffn_down")
        self.length += len(ids)
        return self.layer_norm(x if rows == "all" else x[-1:], "output_norm") @ self.w["token_embd.weight"].T

    def close(self) -> None:
        self.cache.clear()
