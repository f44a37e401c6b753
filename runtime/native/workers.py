"""The threads of the native executor: Python threads that live inside compiled code.

They wait for a run there, spinning at first, and come back to Python only to sleep. Knows the run record, not what runs.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from contextlib import suppress
from typing import Any

import numpy as np

from pocketlm.errors import PocketlmError
from pocketlm.runtime.memory import aligned
from pocketlm.runtime.native.linker import Loaded
from pocketlm.runtime.native.records import WORKER

CLOSED = -(1 << 62)  # an epoch that stays negative even when another thread begins a run at this moment


class WorkerThreads:
    """Runs what the record describes on n_threads threads, the caller among them. `close` ends the others."""

    def __init__(self, core: Loaded, record: np.ndarray, n_threads: int):
        """`record`: one RUN, complete but for the fields that concern threads; kept alive here."""
        self._core, self._record, self.n_threads = core, record, n_threads
        self._step = core.function("step", ctypes.c_int64, ctypes.c_void_p)
        self._work = core.function("work", None, ctypes.c_void_p, ctypes.c_int64)
        self._address = record.ctypes.data
        self._begin()

    def run(self) -> None:
        """Walk the program once. Raises PocketlmError once the threads are ended."""
        if not self._finalizer.alive:
            raise PocketlmError("this model is closed; load it again")
        if os.getpid() != self._pid:  # after a fork the threads are gone: only the one that forked is here
            self._begin()
        self._finish()
        try:
            self._step(self._address)
        finally:  # Ctrl-C may come between any two lines; a run that has begun must end, others wait for it
            self._finish()

    def _finish(self) -> None:
        """Wake the threads that a begun run needs and do this thread's share; nothing if no run has begun."""
        if self._record["begun"][0]:
            for tid in np.flatnonzero(self._workers["wake"]):
                _wake(self._locks[tid])
                self._workers["wake"][tid] = 0
            self._work(self._address, 0)

    def close(self) -> None:
        """End the threads. A second call does nothing."""
        self._finalizer()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._workers = aligned(self.n_threads, WORKER)
        for name, value in (("epoch", 0), ("arrived", 0), ("arrived2", 0), ("begun", 0), ("n_threads", self.n_threads)):
            self._record[name] = value
        self._record["workers"] = self._workers.ctypes.data
        self._record["give_way"], self._library = _give_way()
        self._locks = [threading.Lock() for _ in range(self.n_threads)]
        for lock in self._locks:
            lock.acquire()
        # the threads know the records and nothing of this object: it can be collected, and then they end
        wait = self._core.function("wait", ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
        threads = [
            threading.Thread(
                target=_live, args=(wait, self._address, tid, self._locks[tid]), daemon=True, name=f"pocketlm-{tid}"
            )
            for tid in range(1, self.n_threads)
        ]
        for thread in threads:
            thread.start()
        self._finalizer = weakref.finalize(self, _end, self._record, self._workers, self._locks, threads, self._pid)


def _live(wait: Any, address: int, tid: int, lock: threading.Lock) -> None:
    while wait(address, tid):
        lock.acquire()


def _end(
    record: np.ndarray, workers: np.ndarray, locks: list[threading.Lock], threads: list[threading.Thread], pid: int
) -> None:
    if os.getpid() != pid:
        return
    record["epoch"] = CLOSED
    for thread, lock in zip(threads, locks[1:], strict=True):
        while thread.is_alive():
            _wake(lock)
            thread.join(0.01)


def _wake(lock: threading.Lock) -> None:
    """Let a thread go on that sleeps or is about to. Where two do so at once, at a program's end, the second finds it open."""
    with suppress(RuntimeError):
        lock.release()


def _give_way() -> tuple[int, Any]:
    """The address of the system's function that gives a time slice away, and the library that holds it."""
    library = ctypes.WinDLL("kernel32") if sys.platform == "win32" else ctypes.CDLL(None)  # type: ignore[attr-defined]
    function = library.SwitchToThread if sys.platform == "win32" else library.sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0, library
