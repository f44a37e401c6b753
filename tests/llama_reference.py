"""llama.cpp as an independent implementation for the tests: logits, token ids and quantised bytes.

Uses the low-level functions of llama-cpp-python; a test that needs them skips where the package is not installed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GGML_TYPES = {
    "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13,
    "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "BF16": 30, "MXFP4": 39,
}  # fmt: skip


@functools.lru_cache
def library() -> Any:
    """The ctypes bindings, silent; skips the test where llama-cpp-python is not installed."""
    bindings = pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")
    library.silence = bindings.llama_log_callback(lambda level, text, data: None)  # type: ignore[attr-defined]  # kept alive
    bindings.llama_log_set(library.silence, ctypes.c_void_p(0))  # type: ignore[attr-defined]
    bindings.llama_backend_init()
    return bindings


class LlamaReference:
    """A GGUF opened by llama.cpp, with a context of its own; `close` it or use it in a `with` statement.

    `vocab_only` opens no weights: only `tokenize` works then. RuntimeError where llama.cpp refuses the file.
    """

    def __init__(self, path: str | Path, n_ctx: int = 512, n_threads: int = 2, vocab_only: bool = False):
        self._lib = library()
        options = self._lib.llama_model_default_params()
        options.vocab_only, options.n_gpu_layers = vocab_only, 0
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self._context = None
        if not vocab_only:
            context = self._lib.llama_context_default_params()
            context.n_ctx, context.n_batch, context.n_ubatch = n_ctx, n_ctx, n_ctx
            context.n_threads = context.n_threads_batch = n_threads
            self._context = self._lib.llama_init_from_model(self._model, context)
            if not self._context:
                raise RuntimeError(f"llama.cpp makes no context of {n_ctx} for {path}")
        self.length = 0

    def logits(self, ids: Sequence[int] | np.ndarray, keep: bool = False) -> np.ndarray:
        """Logits of every position, float32 (len(ids), n_vocab); `keep` goes on after the ids of the last call."""
        if not keep:
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
            self.length = 0
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), self.length + i, 1, 1
            batch.seq_id[i][0] = 0
        status = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        self.length += len(ids)
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), shape=(len(ids), self.n_vocab)).copy()

    def tokenize(self, text: str, special: bool = False, bos: bool = False) -> list[int]:
        """Ids of a text; `special` reads markers as their tokens, `bos` adds what the file asks for."""
        data = text.encode()
        room = len(data) + 16
        ids = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, bos, special)
        if count < 0:
            raise RuntimeError(f"llama_tokenize returned {count}")
        return list(ids[:count])

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
            self._context = None
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> LlamaReference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.lru_cache
def _ggml() -> Any:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    import llama_cpp

    assert llama_cpp.__file__
    found = sorted((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*"))
    if not found:
        pytest.skip("llama-cpp-python came without the ggml-base library")
    ggml = ctypes.CDLL(str(found[0]))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return ggml


def quantize_file(source: Path, out: Path, file_type: int) -> None:
    """What llama.cpp's own program for it makes of a GGUF; `file_type`: the number of the mix of formats."""
    lib = library()
    options = lib.llama_model_quantize_default_params()
    options.ftype, options.nthread = file_type, 1
    assert lib.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options)) == 0


def quantize(format_name: str, weights: np.ndarray) -> np.ndarray:
    """ggml's own quantiser: float32 [rows, columns] to the bytes of the format, uint8 (n,)."""
    ggml = _ggml()
    weights = np.ascontiguousarray(weights, np.float32)
    room = np.zeros(weights.nbytes + 1024, np.uint8)
    rows, columns = weights.shape
    size = ggml.ggml_quantize_chunk(GGML_TYPES[format_name], weights.ctypes.data, room.ctypes.data, 0, rows, columns, None)
    return room[:size].copy()
