"""onnxruntime-genai on the CPU: 4-bit weights, products in 8 bits, fused attention, a cache that stays where it is.

The model is what its own builder makes of a Hugging Face folder (convert.py). The graph computes the logits of the last
position only, which is all that generation needs, so that logits of every position are asked for token by token.
"""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import numpy as np

package: Any = import_module("onnxruntime_genai")  # compiled: what is in it cannot be looked up


class Genai:
    def __init__(self, path: str, n_threads: int, n_ctx: int):
        config = package.Config(path)
        options = {"intra_op_num_threads": n_threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = package.Model(config)
        parameters = package.GeneratorParams(self._model)
        parameters.set_search_options(max_length=n_ctx, batch_size=1)
        self._generator, self._length = package.Generator(self._model, parameters), 0
        self.facts = {
            "version": f"onnxruntime-genai {package.__version__}",
            "build": "CPU, int4 in blocks of 32, accuracy level 4 (8-bit products), logits of the last position",
            "settings": f"intra_op_num_threads = {n_threads}, cache of {n_ctx} positions shared between calls",
        }

    def truncate(self, length: int) -> None:
        if length < self._length:
            self._generator.rewind_to(length)
            self._length = length

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        if rows == "all":
            return np.concatenate([self.forward(ids[i : i + 1]).copy() for i in range(len(ids))])
        self._generator.append_tokens(ids.astype(np.int32))
        self._length += len(ids)
        return self._generator.get_logits().reshape(1, -1)

    def close(self) -> None:
        del self._generator, self._model
