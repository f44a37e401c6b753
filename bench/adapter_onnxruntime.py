"""onnxruntime on the CPU, with the graph and KV cache that `pocketlm export` writes (names of Optimum).

The cache goes out of one call and into the next as NumPy arrays over onnxruntime's own memory: nothing is copied, and
OrtValues or an IO binding are no faster.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import onnxruntime as ort

from pocketlm.bench.convert import FIRST_ROW
from pocketlm.errors import PocketlmError


class OnnxRuntime:
    def __init__(self, path: str, n_threads: int, n_ctx: int):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common class
            raise PocketlmError(f"onnxruntime does not load the converted model: {str(error).splitlines()[0]}") from None
        past = [entry for entry in self._session.get_inputs() if entry.name.startswith("past_key_values.")]
        self._past = [entry.name for entry in past]
        self._outputs = ["logits", *(name.replace("past_key_values", "present") for name in self._past)]
        _, heads, _, width = past[0].shape
        self._cache = [np.zeros((1, heads, 0, width), np.float32) for _ in past]
        self._length = 0
        self._mask = np.ones((1, n_ctx), np.int64)
        self.facts = {
            "version": f"onnxruntime {ort.__version__}",
            "build": "CPUExecutionProvider, all graph optimisations",
            "settings": f"intra_op_num_threads = {n_threads}, sequential, spinning allowed",
        }

    def truncate(self, length: int) -> None:
        if length < self._length:
            self._cache = [array[:, :, :length].copy() for array in self._cache]
            self._length = length

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        n, total = len(ids), self._length + len(ids)
        feed = {
            "input_ids": ids.astype(np.int64)[None],
            "attention_mask": self._mask[:, :total],
            FIRST_ROW: np.array([0 if rows == "all" else n - 1], np.int64),
            **dict(zip(self._past, self._cache, strict=True)),
        }
        logits, *self._cache = cast(list[np.ndarray], self._session.run(self._outputs, feed))
        self._length = total
        return logits[0]

    def close(self) -> None:
        self._cache.clear()
