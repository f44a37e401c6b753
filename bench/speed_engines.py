"""What is measured: pocketlm, llama.cpp, and a plain NumPy loop, each in a process of its own.

A worker reads one JSON request a line and answers each with one line: seconds. Only one of them works at a time; they do not
share a process because llama.cpp's threads go on spinning for a while after each call.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any

import numpy as np

PROMPT = 512  # tokens of a prefill


class Pocketlm:
    """The executor itself, without tokenizer or sampling."""

    def __init__(self, path: str, threads: int, n_ctx: int, backend: str):
        import pocketlm

        self.model = pocketlm.load(path, backend, threads, n_ctx)
        self.n_vocab = self.model.hyper.n_vocab

    def truncate(self, length: int) -> int:
        self.model.executor.cache.truncate(length)
        return self.model.executor.cache.length

    def forward(self, ids: np.ndarray) -> None:
        self.model.executor.forward(ids)


class Llama:
    """llama_decode, called directly; the logits of the last token only, as above."""

    def __init__(self, path: str, threads: int, n_ctx: int, backend: str):
        from llama_cpp import llama_cpp as lib

        self.lib, self.length = lib, 0
        self.silence = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(self.silence, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self.model: Any = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        options: Any = lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = n_ctx, PROMPT, PROMPT
        options.n_threads = options.n_threads_batch = threads
        options.no_perf = True
        self.context: Any = lib.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot run {path}")
        vocabulary: Any = lib.llama_model_get_vocab(self.model)
        self.n_vocab = lib.llama_vocab_n_tokens(vocabulary)
        self.batch = lib.llama_batch_init(PROMPT, 0, 1)

    def truncate(self, length: int) -> int:
        self.length = min(self.length, length)
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), 0, self.length, -1)
        return self.length

    def forward(self, ids: np.ndarray) -> None:
        batch = self.batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, self.length + i, 1, i == len(ids) - 1
            batch.seq_id[i][0] = 0
        if self.lib.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        self.lib.llama_get_logits_ith(self.context, -1)
        self.length += len(ids)


class Naive:
    """A GPT-2 in NumPy float32 as tutorials write it, with a KV cache that grows by concatenation. Threads are BLAS's."""

    def __init__(self, path: str, threads: int, n_ctx: int, backend: str):
        import gguf

        reader = gguf.GGUFReader(path)
        self.w = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
        fields = {name: reader.fields[f"gpt2.{name}"].contents() for name in ("block_count", "attention.head_count")}
        self.n_layer, self.n_head = fields["block_count"], fields["attention.head_count"]
        self.n_vocab = len(self.w["token_embd.weight"])
        self.cache: list[Any] = [None] * self.n_layer
        self.length = 0

    def truncate(self, length: int) -> int:
        self.length = min(self.length, length)
        self.cache = [kv and tuple(x[: self.length] for x in kv) for kv in self.cache] if self.length else [None] * self.n_layer
        return self.length

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:  # [n, n_in] -> [n, n_out]
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def layer_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return self.w[f"{name}.weight"] * (x - mean) / np.sqrt(variance + 1e-5) + self.w[f"{name}.bias"]

    def attention(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray
    ) -> np.ndarray:  # [n, width], [t, width] twice -> [n, width]
        n, t = len(q), len(k)
        mask = np.triu(np.full((n, t), -np.inf, np.float32), t - n + 1)
        heads = []
        for q_head, k_head, v_head in zip(*(np.split(x, self.n_head, -1) for x in (q, k, v)), strict=True):
            scores = q_head @ k_head.T / np.float32(np.sqrt(q_head.shape[-1])) + mask
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v_head)
        return np.concatenate(heads, -1)

    def forward(self, ids: np.ndarray) -> np.ndarray:  # [n] -> [n_vocab]
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
        return self.w["token_embd.weight"] @ self.layer_norm(x[-1:], "output_norm")[0]


ENGINES = {"native": Pocketlm, "numpy": Pocketlm, "llama.cpp": Llama, "naive NumPy": Naive}


def work() -> None:
    """Serve one engine: the first line says which, every other one what to time."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may come between
    start = json.loads(sys.stdin.readline())
    engine: Any = ENGINES[start["engine"]](start["path"], start["threads"], start["n_ctx"], start["engine"])
    ids = np.random.default_rng(1).integers(10, engine.n_vocab - 10, start["n_ctx"]).astype(np.int32)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_seconds(engine, ids, **request)), file=answers, flush=True)


def _seconds(engine: Any, ids: np.ndarray, task: str, n: int, filled: int) -> float:
    """Of one prefill of n tokens, or of n decoding steps with `filled` tokens in the cache, which are put there first."""
    length = engine.truncate(filled)
    for start in range(length, filled, PROMPT):
        engine.forward(ids[start : min(start + PROMPT, filled)])
    if task == "decode":  # one token beforehand wakes the threads
        engine.forward(ids[filled : filled + 1])
    engine.truncate(filled)
    started = time.perf_counter()
    if task == "prefill":
        engine.forward(ids[:n])
    else:
        for i in range(filled, filled + n):
            engine.forward(ids[i : i + 1])
    return time.perf_counter() - started


if __name__ == "__main__":
    work()
