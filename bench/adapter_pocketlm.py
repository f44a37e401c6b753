"""pocketlm itself, either executor: the executor alone for the engine's figure, `generate` for what a user sees."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

import numpy as np

import pocketlm
from pocketlm import __version__
from pocketlm.errors import PocketlmError
from pocketlm.terminal_text import count

# Drafts would make random weights that repeat themselves look fast: other engines are compared without theirs, too
CACHES = {"q16": "int16", "q8": "int8"}
WHOLE: dict[str, Any] = {"ignore_eos": True, "draft": False}


class Pocketlm:
    def __init__(self, path: str, n_threads: int, n_ctx: int, backend: str, kv: str = "q16"):
        self._model = pocketlm.load(path, backend, n_threads, n_ctx, kv)
        settings = f"{count(n_threads, 'thread')}, {CACHES[kv]} KV cache, no drafts"
        self.facts = {"version": f"pocketlm {__version__}", "settings": settings}
        if backend == "native":
            from pocketlm.runtime.native import levels

            self.facts["build"] = f"kernels for {levels.detect().name}"
        else:
            self.facts["build"] = f"NumPy {np.__version__}, single-threaded BLAS under {count(n_threads, 'Python thread')}"

    def truncate(self, length: int) -> int:
        """How many are left: none, where sliding windows need what is gone."""
        self._model.executor.cache.truncate(length)
        return self._model.executor.cache.length

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        return self._model.executor.forward(ids, rows)

    def complete(self, text: str, n_tokens: int) -> tuple[int, float]:
        *_, last = self._model.generate(text, max_tokens=n_tokens, temperature=0, reuse_cache=False, draft=False)
        return last.generated_tokens, last.prompt_seconds + last.generation_seconds

    def together(self, prompt: list[int], n_tokens: int, conversations: int) -> float:
        """`generate` with default sampling, a session and a thread each."""
        barrier = threading.Barrier(conversations + 1)
        errors, ended = list[BaseException](), list[float]()

        def speak(number: int) -> None:
            try:
                with self._model.session(ctx=min(self._model.n_ctx, len(prompt) + n_tokens + 2)) as session:
                    pieces = session.generate([*prompt, number], max_tokens=n_tokens + 1, seed=number, **WHOLE)
                    next(pieces)
                    barrier.wait()
                    for _ in pieces:
                        pass
                    ended.append(time.perf_counter())  # giving the session's memory back is no part of its tokens
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
        return max(ended) - started

    def ninth(self, prompt: list[int], n_tokens: int, conversations: int) -> tuple[float, float, int]:
        """Seconds to the first token of one conversation more, begun when each of the others has made n_tokens; how long one of
        theirs took until then; and how many passes ended meanwhile, the one under way at the beginning among them. Passes in a
        row are taken to be of the same length.
        """
        executor, step, ended = self._model.executor, self._model.executor.step, list[float]()

        def counted(*work: Any) -> Any:
            began = time.perf_counter()
            result = step(*work)
            n, seconds = result[1], time.perf_counter() - began
            ended.extend(began + seconds * (i + 1) / n for i in range(n))
            return result

        moments = [list[float]() for _ in range(conversations)]
        done = threading.Event()
        ctx = min(self._model.n_ctx, len(prompt) + 16 * n_tokens)

        def speak(number: int) -> None:
            with self._model.session(ctx=ctx) as session:
                while not done.is_set():  # once, but for tiny models, which end before the slowest thread has begun
                    for _ in session.generate([*prompt, number], max_tokens=15 * n_tokens, seed=number, **WHOLE):
                        moments[number].append(time.perf_counter())
                        if done.is_set():
                            return

        threads = [threading.Thread(target=speak, args=(number,)) for number in range(conversations)]
        with self._model.session(ctx=ctx) as session:
            executor.step = counted  # type: ignore[method-assign]
            for thread in threads:
                thread.start()
            try:
                while min(map(len, moments)) < n_tokens:
                    if not all(thread.is_alive() for thread in threads):
                        raise PocketlmError("a conversation ended before the ninth began")
                    time.sleep(0.001)
                started = time.perf_counter()
                next(session.generate([*prompt, conversations], max_tokens=2, seed=0, **WHOLE))
                first = time.perf_counter() - started
            finally:
                done.set()
                for thread in threads:
                    thread.join()
                executor.step = step  # type: ignore[method-assign]
        before = [moment for moment in moments[0] if moment <= started]
        return first, (before[-1] - before[0]) / (len(before) - 1), sum(started < moment <= started + first for moment in ended)

    def close(self) -> None:
        self._model.close()
