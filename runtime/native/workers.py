"""The threads of the native executor: Python threads that live inside compiled code.

They wait for a run there, spinning at first, and come back to Python only to sleep. Where another program wants a processor,
fewer of them run: what is waited for is always the slowest. Knows the run record, not what runs.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

import numpy as np

from pocketlm.errors import PocketlmError
from pocketlm.runtime.memory import aligned
from pocketlm.runtime.native.linker import Loaded
from pocketlm.runtime.native.records import RUN, WORKER, offset
from pocketlm.runtime.threads import closed_lock, join_threads, open_lock, start_threads

# A thread is left out if more than 1 / LOST of the time lately was spent in waiting for it. One thread is as fast as two that
# lose a fifth of the time (single tokens, which memory limits) to two fifths (eight tokens); two quiet processors lose 1 to 6 %
# with eight clients, most of it when the system wakes two threads on one of them
LOST = 3
LATELY = 0.25  # "lately", in seconds of runs: one late run among many, as every system has them, is no reason
REST = 0.05, 2.0  # seconds that it is left out: the first time, and the longest
CLOSED = -(1 << 62)  # an epoch that stays negative even when another thread begins a run at this moment


class WorkerThreads:
    """Runs what the record describes on n_threads threads, the caller among them. `close` ends the others; without it they
    end by themselves when nobody holds this object any more.
    """

    def __init__(self, core: Loaded, record: np.ndarray, n_threads: int, memory: Sequence[np.ndarray] = ()):
        """`record`: one RUN, complete but for the fields that concern threads. `memory`: the arrays that it and its program
        point at; they live until no thread computes any more. Raises PocketlmError where the system gives no more threads.
        """
        self._core, self._record, self.n_threads, self._memory = core, record, n_threads, tuple(memory)
        self._step = core.function("step", ctypes.c_int64, ctypes.c_void_p)
        self._work = core.function("work", None, ctypes.c_void_p, ctypes.c_int64)
        self._address = record.ctypes.data
        # NumPy takes several times as long to look at a number
        self._epoch, self._begun, self._lost, self._took = (
            ctypes.c_int64.from_buffer(record.view(np.uint8), offset(RUN, name)) for name in ("epoch", "begun", "lost", "took")
        )
        self._begin()

    def run(self) -> None:
        """Walk the program once. Raises PocketlmError once the threads are ended, also in the middle of the run."""
        memory = self._memory  # noqa: F841  another thread may close the model meanwhile
        self.check_open()
        if os.getpid() != self._pid:  # after a fork the threads are gone: only the one that forked is here
            self._begin()
        if self._lost.value:
            self._keep_apart(range(1, self._active))
        self._finish()
        if self._share or self._lost.value or self._active < self.n_threads:
            self._adapt()
        began = monotonic()
        try:
            self._step(self._address)
        finally:  # Ctrl-C may come between any two lines; a run that has begun must end, others wait for it
            self._finish()
        self._seconds = monotonic() - began
        if self._epoch.value < 0:
            join_threads(self._threads)  # they may still be looking at what the caller owns
        self.check_open()

    def check_open(self) -> None:
        """Raises PocketlmError once the threads are ended."""
        if self._epoch.value < 0:
            raise PocketlmError("this model is closed; load it again")

    def _adapt(self) -> None:
        """Leave a thread out, or take one in again, before the next run."""
        now, before = monotonic(), self._share
        waiting = self._took.value * (self._active - 1)  # so many threads may have waited for one
        lost, self._lost.value = self._lost.value / waiting if waiting else 0.0, 0
        share = before + (lost - before) * self._seconds / (self._seconds + LATELY)
        self._share = share if share > 0.01 else 0.0
        if share * LOST > 1 and lost and self._active > 1:
            lasted = now - self._until  # since it was taken in again
            self._rest = min(2 * self._rest, REST[1]) if lasted < max(self._rest, LATELY) else REST[0]
            self._active, self._until, self._share = self._active - 1, now + self._rest, 0.0
        elif self._active < self.n_threads and now >= self._until and lost * LOST <= 1:
            self._active, self._until = self._active + 1, now
            self._share = 1 / LOST  # if it is late at once it goes again
        self._record["n_threads"] = self._active

    def _finish(self) -> None:
        """Wake the threads that a begun run needs and do this thread's share; nothing if no run has begun."""
        if self._begun.value:
            woken = np.flatnonzero(self._workers["wake"]).tolist()
            if woken:
                self._keep_apart(woken)
            for tid in woken:
                open_lock(self._locks[tid])
                self._workers["wake"][tid] = 0
            self._work(self._address, 0)
        if self._kept_apart:
            self._let_go()

    def _keep_apart(self, tids: Iterable[int]) -> None:
        """Keep threads that are woken now, or were late, off this thread's processor (Linux). The system wakes a thread on the
        processor of the one that wakes it, where the other processors have slept, and takes ten milliseconds to move it.
        """
        if self._processor is None:
            return
        here = self._processor()
        for thread in (self._threads[tid - 1].native_id for tid in tids):
            if thread is None:
                continue
            with suppress(OSError):  # it has ended, or this program may not say where its threads run
                allowed = os.sched_getaffinity(thread)
                if len(allowed) > 1 and here in allowed:
                    self._kept_apart.setdefault(thread, allowed)  # what an interrupted run has left there is the right one
                    os.sched_setaffinity(thread, allowed - {here})

    def _let_go(self) -> None:
        """Let the threads run everywhere again; they stay where they are."""
        for thread, allowed in list(self._kept_apart.items()):
            with suppress(OSError):
                os.sched_setaffinity(thread, allowed)
            del self._kept_apart[thread]

    def close(self) -> None:
        """End the threads, in the middle of a run too: that run raises PocketlmError. A second call does nothing."""
        self._finalizer()
        join_threads(self._threads)
        self._memory = ()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._workers = aligned(self.n_threads, WORKER)
        for name in ("epoch", "arrived", "lost", "took", "begun"):
            self._record[name] = 0
        self._record["n_threads"] = self.n_threads
        self._active, self._until, self._rest = self.n_threads, monotonic(), REST[0] / 2
        self._share = self._seconds = 0.0  # of the time lately that was lost; of the last run
        self._record["workers"] = self._workers.ctypes.data
        self._record["give_way"], self._library = _give_way()
        self._record["advise"] = _advise()
        self._processor = getattr(self._library, "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None
        self._kept_apart: dict[int, set[int]] = {}  # system's number of a thread -> the processors that it may run on
        self._locks = [closed_lock() for _ in range(self.n_threads)]
        # the threads own the memory they compute in, but not this object: it can be collected, and then they end
        wait = self._core.function("wait", ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
        memory = (self._record, self._workers, *self._memory)
        self._threads = [
            threading.Thread(target=_live, args=(wait, memory, tid, self._locks[tid]), daemon=True, name=f"pocketlm-{tid}")
            for tid in range(1, self.n_threads)
        ]
        self._finalizer = weakref.finalize(self, _send_home, self._record, self._locks)
        self._finalizer.atexit = False  # the program's end stops the threads where they are
        try:
            start_threads(self._threads)
        except BaseException:
            self.close()
            raise


def _live(wait: Any, memory: Sequence[np.ndarray], tid: int, lock: threading.Lock) -> None:
    address = memory[0].ctypes.data
    while wait(address, tid):
        lock.acquire()


def _send_home(record: np.ndarray, locks: Sequence[threading.Lock]) -> None:
    """Tell the threads to end. Does not wait for them: this may run in any thread, one of them included."""
    record["epoch"] = CLOSED
    for lock in locks:
        open_lock(lock)


def _give_way() -> tuple[int, Any]:
    """The address of the system's function that gives a time slice away, and the library that holds it."""
    library = ctypes.WinDLL("kernel32") if sys.platform == "win32" else ctypes.CDLL(None)  # type: ignore[attr-defined]
    function = library.SwitchToThread if sys.platform == "win32" else library.sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0, library


def _advise() -> int:
    """The address of `madvise`, which tells the system what part of a file will be read; 0 on systems without it."""
    try:
        return ctypes.cast(ctypes.CDLL(None).madvise, ctypes.c_void_p).value or 0
    except (AttributeError, TypeError, OSError):
        return 0
