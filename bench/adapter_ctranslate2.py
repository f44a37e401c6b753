"""CTranslate2 on the CPU, int8: a library that generates texts by itself and takes no token from outside while it does.

So a prompt is a text of which it makes one token, and decoding is timed by its own steps: it goes on with the tokens that it
likes best. Logits for the agreement are those of its forward pass over the whole text.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np


class CTranslate2:
    def __init__(self, path: str, n_threads: int, n_ctx: int):
        self._model: Any = ctranslate2.Generator(path, "cpu", compute_type="int8", intra_threads=n_threads, inter_threads=1)
        self._tokens: list[str] = json.loads((Path(path) / "vocabulary.json").read_text("utf-8"))
        self._ids: list[int] = []
        self.facts = {
            "version": f"ctranslate2 {ctranslate2.__version__}",
            "build": f"CPU, int8 weights and activations, {', '.join(sorted(ctranslate2.get_supported_compute_types('cpu')))}",
            "settings": f"intra_threads = {n_threads}, inter_threads = 1, compute_type int8, greedy",
        }

    def truncate(self, length: int) -> None:
        del self._ids[length:]

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        before = len(self._ids)
        self._ids += ids.tolist()
        if rows == "last" and not before:
            results = self._generate(self._ids, 1, 0, return_logits_vocab=True)  # whose memory the logits are
            return np.array(results[0].logits[0][0], np.float32).reshape(1, -1)
        every = np.array(self._model.forward_batch([self._ids]), np.float32)[0]
        return every[before:] if rows == "all" else every[-1:]

    def decode_seconds(self, ids: np.ndarray, n: int) -> list[float]:
        """Seconds of each of the n tokens after the first that follows `ids`."""
        moments: list[float] = []

        def step(_: Any) -> bool:
            moments.append(time.perf_counter())
            return False

        self._generate(ids.tolist(), n + 1, n + 1, callback=step)  # no end before
        return np.diff(moments).tolist()

    def _generate(self, ids: list[int], most: int, least: int, **options: Any) -> Any:
        return self._model.generate_batch(
            [[self._tokens[i] for i in ids]], max_length=most, min_length=least, beam_size=1, sampling_topk=1,
            include_prompt_in_result=False, **options,
        )  # fmt: skip

    def close(self) -> None:
        self._model.unload_model()
        del self._model
