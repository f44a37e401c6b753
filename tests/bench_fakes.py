"""Backends that misbehave, for the tests of `pocketlm bench`: each is an adapter that a child process imports by name."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.bench.adapter_pocketlm import Pocketlm


class Honest(Pocketlm):
    """The float32 reference itself. `seconds`: what every call takes longer, so that figures are known."""

    def __init__(self, path: str, n_threads: int, n_ctx: int, seconds: float = 0.0, **options: Any):
        super().__init__(path, n_threads, n_ctx, "numpy")
        self._seconds = seconds

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        time.sleep(self._seconds)
        return super().forward(ids, rows)


class Crashing(Honest):
    """Ends as a program does that reads address zero, when it is asked for a second prompt."""

    calls = 0

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        self.calls += 1
        if self.calls > 1:
            if os.name == "nt":  # where ctypes makes an OSError of it
                ctypes.windll.kernel32.TerminateProcess(ctypes.c_void_p(-1), 0xC0000005)
            ctypes.string_at(0)
        return super().forward(ids, rows)


class Hanging(Honest):
    """Does not come back from decoding a token."""

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        if len(ids) == 1:
            time.sleep(3600)
        return super().forward(ids, rows)


class Lying(Honest):
    """Is fast at decoding because it returns what it knew before."""

    last = np.zeros((1, 1), np.float32)

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        if len(ids) > 1:
            logits = super().forward(ids, rows)
            self.last = logits[-1:]
            return logits
        return self.last


class Nan(Honest):
    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        return super().forward(ids, rows) * np.float32(np.nan)


class Greedy(Honest):
    def __init__(self, *arguments: Any, **options: Any):
        raise MemoryError


class Raising(Honest):
    def __init__(self, *arguments: Any, **options: Any):
        raise ValueError("a long story\nover two lines")


class Chatty(Honest):
    """Prints where the answers go."""

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        print('{"answer": {}}', flush=True)
        return super().forward(ids, rows)


class Recording(Honest):
    """Writes down what it is asked: a line a call, `truncate LENGTH` or `forward IDS`."""

    def __init__(self, path: str, n_threads: int, n_ctx: int, log: str, **options: Any):
        super().__init__(path, n_threads, n_ctx, **options)
        self._log = Path(log).open("a", buffering=1, encoding="utf-8")  # noqa: SIM115  # until the process ends

    def truncate(self, length: int) -> None:
        print("truncate", length, file=self._log)
        super().truncate(length)

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        print("forward", len(ids), file=self._log)
        return super().forward(ids, rows)
