"""The child process: one backend, asked line by line in JSON, answering line by line.

In: {"do": a method of Bench, ...its arguments}. Out: {"answer": {...}} or {"error": {"status", "reason"}}. Times are taken
here, around the forward pass alone. Before it answers, the child waits until its own threads have gone to sleep: those
of llama.cpp, PyTorch and onnxruntime spin for a while after a call, on the cores that the next backend needs.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.bench.settling import settle
from pocketlm.errors import PocketlmError

FILL = 512  # tokens of a pass while the cache is filled
MAX_PASSES = 16


class Bench:
    """One adapter, its token ids and how far its cache is filled."""

    def __init__(self) -> None:
        self.adapter: Any = None
        self._ids = np.zeros(0, np.int32)
        self._length = 0

    def load(self, adapter: str, path: str, threads: int, n_ctx: int, n_vocab: int, options: dict[str, Any]) -> dict[str, Any]:
        """Import the library and load the model; the seconds of both, and of the first token after a short prompt."""
        started = time.perf_counter()
        module, name = adapter.split(":")
        self.adapter = getattr(importlib.import_module(module), name)(path, threads, n_ctx, **options)
        load_seconds = time.perf_counter() - started
        self._ids = np.random.default_rng(1).integers(0, n_vocab, n_ctx).astype(np.int32)
        self.adapter.forward(self._ids[: min(32, n_ctx)])
        self._length = min(32, n_ctx)
        return {
            "load_seconds": load_seconds,
            "first_token_seconds": time.perf_counter() - started,
            "facts": self.adapter.facts,
            "completes": hasattr(self.adapter, "complete"),
        }

    def prefill(self, n: int, at_least: float) -> dict[str, Any]:
        """Seconds of a prompt of n tokens from an empty cache, over and over until `at_least` seconds are full."""

        def once() -> list[float]:
            self._truncate(0)
            started = time.perf_counter()
            self.adapter.forward(self._ids[:n])
            seconds = time.perf_counter() - started
            self._length = n
            return [seconds]

        return _passes(once, at_least)

    def decode(self, n: int, depth: int, at_least: float) -> dict[str, Any]:
        """Seconds of each of n tokens after `depth` that are in the cache, over and over the same positions."""
        if hasattr(self.adapter, "decode_seconds"):
            return _passes(lambda: self.adapter.decode_seconds(self._ids[: depth + 1], n), at_least)
        self._fill(depth)
        self.adapter.forward(self._ids[depth : depth + 1])  # wakes the threads
        self._length = depth + 1

        def once() -> list[float]:
            self._fill(depth)
            seconds = []
            for i in range(depth, depth + n):
                started = time.perf_counter()
                self.adapter.forward(self._ids[i : i + 1])
                seconds.append(time.perf_counter() - started)
            self._length = depth + n
            return seconds

        return _passes(once, at_least)

    def logits(self, ids: list[int], n_prompt: int, out: str) -> dict[str, Any]:
        """Write the logits of all ids: the first n_prompt in one pass, then token by token. float32 [n, n_vocab], .npy."""
        self._truncate(0)
        array = np.array(ids, np.int32)
        parts = [np.array(self.adapter.forward(array[:n_prompt], rows="all"), np.float32)]
        parts += [np.array(self.adapter.forward(array[i : i + 1]), np.float32) for i in range(n_prompt, len(array))]
        self._length = len(array)
        np.save(out, np.concatenate(parts))
        return {}

    def together(self, n: int, conversations: int) -> dict[str, Any]:
        """Seconds that `conversations` at the same time take for n tokens each, after prompts of 16 tokens."""
        return {"seconds": self.adapter.together(self._ids[:16].tolist(), n, conversations)}

    def ninth(self, n: int, conversations: int) -> dict[str, Any]:
        """Seconds to the first token of one conversation more while so many go on, and of one token of those; the passes."""
        first, others, passes = self.adapter.ninth(self._ids[:16].tolist(), n, conversations)
        return {"first": first, "others": others, "passes": passes}

    def complete(self, text: str, n_tokens: int) -> dict[str, Any]:
        """What a user sees: tokens and seconds of the library's own call."""
        self._truncate(0)
        tokens, seconds = self.adapter.complete(text, n_tokens)
        return {"tokens": tokens, "seconds": seconds}

    def convert(self, kind: str, path: str, out: str) -> dict[str, Any]:
        """Write the model `path` as another kind of file."""
        from pocketlm.bench.convert import KINDS

        KINDS[kind].write(Path(path), Path(out))
        return {}

    def _fill(self, depth: int) -> None:
        """Have `depth` tokens in the cache, not one more."""
        self._truncate(min(self._length, depth))
        for start in range(self._length, depth, FILL):
            self.adapter.forward(self._ids[start : min(start + FILL, depth)])
        self._length = depth

    def _truncate(self, length: int) -> None:
        kept = self.adapter.truncate(length)
        self._length = length if kept is None else kept


def _passes(once: Callable[[], list[float]], at_least: float) -> dict[str, Any]:
    from pocketlm.bench.machine import joules

    before, seconds = joules(), once()
    passes = 1
    while sum(seconds) < at_least and passes < MAX_PASSES:
        seconds += once()
        passes += 1
    after = joules()
    return {"seconds": seconds, "joules": after - before if before is not None and after is not None else None}


def peak_bytes() -> int | None:
    """The most memory this process has held, mapped files included. Linux's own count: getrusage's starts at the parent's."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:  # Windows
        try:
            import psutil
        except ImportError:
            return None
        return getattr(psutil.Process().memory_info(), "peak_wset", None)


def work() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing that a library prints may come between
    bench = Bench()
    for line in sys.stdin:
        request = json.loads(line)
        job = request.pop("do")
        try:
            reply: dict[str, Any] = {"answer": getattr(bench, job)(**request)}
            reply["answer"]["peak_bytes"] = peak_bytes()
        except MemoryError as error:
            reply = {"error": {"status": "no memory", "reason": str(error) or "the memory ran out"}}
        except Exception as error:  # libraries raise what they like; the row says what
            lines = str(error).strip().splitlines() or [type(error).__name__]
            own = isinstance(error, PocketlmError)
            status = "skipped" if type(error).__name__ == "Skipped" else "failed"
            reply = {"error": {"status": status, "reason": lines[0] if own else f"{type(error).__name__}: {lines[0]}"}}
        settle()
        print(json.dumps(reply), file=answers, flush=True)
    if bench.adapter is not None:
        bench.adapter.close()


if __name__ == "__main__":
    work()
