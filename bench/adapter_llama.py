"""llama.cpp through llama-cpp-python: `llama_decode` called directly, and `Llama.create_completion` for what a user sees.

The settings are those of llama.cpp's own bench tool: mapped file, repacked weights, one thread count for prompts and
tokens, batches of 512, float16 KV cache, no timers. With flash attention, which is what llama.cpp chooses by itself,
prompts and short contexts are faster; without it, decoding after a few hundred tokens is: each is a row of its own.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable
from typing import Any, cast

import llama_cpp as package
import numpy as np
from llama_cpp import llama_cpp as lib

from pocketlm.errors import PocketlmError

BATCH = 512
_SILENCE = lib.llama_log_callback(lambda level, text, data: None)  # the library keeps its address: it must never be collected


class Llama:
    def __init__(self, path: str, n_threads: int, n_ctx: int, flash: bool = True):
        self._path, self._threads, self._n_ctx, self._length = path, n_threads, n_ctx, 0
        self._flash, self._user = flash, cast(Any, None)
        lib.llama_log_set(_SILENCE, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self._model: Any = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        options: Any = lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = n_ctx, BATCH, BATCH
        options.n_threads = options.n_threads_batch = n_threads
        options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.no_perf = True
        self._options = options
        self._context: Any = lib.llama_init_from_model(self._model, options) if self._model else None
        if not self._context:
            raise PocketlmError("llama.cpp does not run this file")
        vocabulary: Any = lib.llama_model_get_vocab(self._model)
        self._n_vocab = lib.llama_vocab_n_tokens(vocabulary)
        self._memory: Any = lib.llama_get_memory(self._context)
        self._batch = lib.llama_batch_init(BATCH, 0, 1)
        features = lib.llama_print_system_info().decode().replace("CPU :", "").replace(" = 1", "").split("|")
        self.facts = {
            "version": f"llama-cpp-python {package.__version__}",
            "build": " ".join(name.strip() for name in features).strip(),
            "settings": f"n_threads = n_threads_batch = {n_threads}, n_batch = n_ubatch = {BATCH}, flash attention "
            f"{'on' if flash else 'off'}, float16 KV cache, no_perf",
        }

    def truncate(self, length: int) -> None:
        self._length = length
        lib.llama_memory_seq_rm(self._memory, 0, length, -1)

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        parts = []
        for start in range(0, len(ids), BATCH):
            block = ids[start : start + BATCH].tolist()
            last = start + len(block) - 1 if start + BATCH >= len(ids) else -1
            entries = [(token, self._length + i, 0, rows == "all" or start + i == last) for i, token in enumerate(block)]
            self._decode(self._context, entries)
            self._length += len(block)
            if rows == "all":
                parts.append(self._rows(lib.llama_get_logits(self._context), len(block)).copy())
        return np.concatenate(parts) if parts else self._rows(lib.llama_get_logits_ith(self._context, -1), 1)

    def _decode(self, context: Any, entries: list[tuple[int, int, int, bool]]) -> None:
        """One pass over (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if lib.llama_decode(context, batch):
            raise PocketlmError(f"llama_decode failed at position {entries[0][1]}")

    def _rows(self, logits: Any, n: int) -> np.ndarray:
        """llama.cpp's own memory as an array [n, n_vocab]."""
        content = (ctypes.c_float * (n * self._n_vocab)).from_address(ctypes.addressof(logits.contents))
        return np.frombuffer(content, np.float32).reshape(n, self._n_vocab)

    def together(self, prompt: list[int], n_tokens: int, conversations: int) -> float:
        """A sequence each in a context of its own: `llama_decode` of one token of every sequence at a time, nothing drawn."""
        options = self._options
        options.n_seq_max, options.n_ctx = conversations, conversations * (len(prompt) + n_tokens + 2)
        context: Any = lib.llama_init_from_model(self._model, options)
        if not context:
            raise PocketlmError("llama.cpp has no context for so many sequences")

        def each(tokens: Iterable[int], position: int) -> None:
            self._decode(context, [(token, position, sequence, True) for sequence, token in enumerate(tokens)])
            lib.llama_get_logits(context)  # waits until they are there

        try:
            for at, id in enumerate(prompt):
                each([id] * conversations, at)
            each(range(conversations), len(prompt))
            started = time.perf_counter()
            for at in range(len(prompt) + 1, len(prompt) + 1 + n_tokens):
                each([(7 * at + i) % self._n_vocab for i in range(conversations)], at)
            return time.perf_counter() - started
        finally:
            lib.llama_free(context)

    def complete(self, text: str, n_tokens: int) -> tuple[int, float]:
        if self._user is None:
            self._user = package.Llama(
                self._path, n_ctx=self._n_ctx, n_threads=self._threads, n_threads_batch=self._threads, n_batch=BATCH,
                flash_attn=self._flash, verbose=False,
            )  # fmt: skip
        self._user.reset()
        started = time.perf_counter()
        done: Any = self._user.create_completion(text, max_tokens=n_tokens, temperature=0, stream=False)
        return done["usage"]["completion_tokens"], time.perf_counter() - started

    def close(self) -> None:
        if self._user is not None:
            self._user.close()
        lib.llama_batch_free(self._batch)
        lib.llama_free(self._context)
        lib.llama_model_free(self._model)
