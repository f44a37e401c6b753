"""The parent's side of a child process: requests with a time limit, and one line about every way a child can fail.

Knows the form of requests and answers (worker.py), not what they mean.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pocketlm.bench.protocol import Backend
from pocketlm.errors import PocketlmError

THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
ENDING = 5.0  # seconds a child may take to end when asked
LONGEST = 1e6  # seconds: more than a lock can wait for is an error in Python
REASON = 300  # characters of a reason that are kept


class Failure(PocketlmError):
    """A child that did not do what it was asked. `status` is a word for the table."""

    def __init__(self, status: str, reason: str):
        self.status = status
        super().__init__(reason[:REASON])


class Worker:
    """A Python process of its own that serves requests; `close` ends it, whatever it is doing."""

    def __init__(self, n_threads: int, environment: Mapping[str, str] | None = None):
        variables = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(n_threads)), **(environment or {})}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # open until `close`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pocketlm.bench.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, encoding="utf-8", env=variables,
            start_new_session=True,  # Ctrl-C is the parent's to handle; what the child starts ends with it
        )  # fmt: skip
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, job: str, limit: float, **arguments: Any) -> dict[str, Any]:
        """What the child answers within `limit` seconds. Raises Failure, and ends the child, where it does not."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it is gone already: there will be no answer
            print(json.dumps({"do": job, **arguments}), file=self._process.stdin, flush=True)
        try:
            line = self._answers.get(timeout=min(limit, LONGEST))
        except queue.Empty:
            self.close(patience=0)
            raise Failure("hung", f"no answer to {job} within {limit:g} s") from None
        reply = json.loads(line) if line else {"error": {"status": "crashed", "reason": f"{self._how_it_ended()} in {job}"}}
        if "error" in reply:
            self.close()
            raise Failure(**reply["error"])
        return reply["answer"]

    def load(self, backend: Backend, path: Path, limit: float, threads: int, n_ctx: int, n_vocab: int) -> dict[str, Any]:
        """Have the child load a model with a backend; what its `load` answers. Raises Failure as `ask` does."""
        return self.ask(
            "load", limit, adapter=backend.adapter, path=str(path), threads=threads, n_ctx=n_ctx, n_vocab=n_vocab,
            options=dict(backend.options),
        )  # fmt: skip

    def close(self, patience: float = ENDING) -> None:
        """End the child: by itself, if it can within `patience` seconds, else by force. A second call does nothing."""
        if self._errors.closed:
            return
        with suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        with suppress(OSError):  # and whatever it has started
            os.killpg(self._process.pid, signal.SIGKILL) if hasattr(os, "killpg") else self._process.kill()
        self._process.wait()
        self._errors.close()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._answers.put(line)
        self._answers.put("")

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        if code >= 1 << 31:  # Windows: what ended it, as its documents write that
            return f"ended by {code:#X}".replace("0X", "0x")
        if code >= 0:
            return ": ".join([f"ended with status {code}", *last])
        names = {number.value: number.name for number in signal.Signals}
        return f"ended by {names.get(-code, f'signal {-code}')}" + (" (out of memory?)" if code == -9 else "")
