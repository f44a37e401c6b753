"""pocketlm itself, either executor: the executor alone for the engine's figure, `generate` for what a user sees."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import numpy as np

import pocketlm
from pocketlm import __version__


class Pocketlm:
    def __init__(self, path: str, n_threads: int, n_ctx: int, backend: str):
        self._model = pocketlm.load(path, backend, n_threads, n_ctx)
        self.facts = {"version": f"pocketlm {__version__}", "settings": f"{n_threads} threads, float16 KV cache"}
        if backend == "native":
            from pocketlm.runtime.native import levels

            self.facts["build"] = f"kernels for {levels.detect().name}"
        else:
            self.facts["build"] = f"NumPy {np.__version__}, single-threaded BLAS under {n_threads} Python threads"

    def truncate(self, length: int) -> None:
        self._model.executor.cache.truncate(length)

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        return self._model.executor.forward(ids, rows)

    def complete(self, text: str, n_tokens: int) -> tuple[int, float]:
        *_, last = self._model.generate(text, max_tokens=n_tokens, temperature=0, reuse_cache=False)
        return last.generated_tokens, last.prompt_seconds + last.generation_seconds

    def together(self, prompt: list[int], n_tokens: int, conversations: int) -> float:
        """`generate` with default sampling, a session and a thread each."""
        barrier = threading.Barrier(conversations + 1)
        errors = list[BaseException]()

        def speak(number: int) -> None:
            try:
                with self._model.session(ctx=min(self._model.n_ctx, len(prompt) + n_tokens + 2)) as session:
                    pieces = session.generate([*prompt, number], max_tokens=n_tokens + 1, seed=number, ignore_eos=True)
                    next(pieces)
                    barrier.wait()
                    for _ in pieces:
                        pass
            except BaseException as error:
                errors.append(error)
                barrier.abort()

        threads = [threading.Thread(target=speak, args=(number,)) for number in range(conversations)]
        for thread in threads:
            thread.start()
        with suppress(threading.BrokenBarrierError):
            barrier.wait()
        started = time.perf_counter()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return time.perf_counter() - started

    def close(self) -> None:
        self._model.close()
