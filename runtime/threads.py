"""How many cores there are, and a pool of Python threads that share a call's rows.

NumPy lets go of the interpreter's lock inside a matrix product, so threads that each take a slice of the rows run at
the same time. Knows nothing about models.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

from pocketlm.errors import UsageError

MAX_THREADS = 256


def default_threads() -> int:
    """Physical cores this process may use: two hyper-threads of a core share its arithmetic and gain nothing."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            siblings = str(cpu)
        cores.add(siblings.strip())
    return min(max(len(cores), 1), MAX_THREADS)


def check_threads(n_threads: int | None) -> int:
    """`n_threads`, or the default where it is None. Raises UsageError outside 1..MAX_THREADS."""
    if n_threads is None:
        return default_threads()
    if not 1 <= n_threads <= MAX_THREADS:
        raise UsageError(f"--threads {n_threads}: expected 1 to {MAX_THREADS}")
    return n_threads


def share(total: int, part: int, parts: int, lead: int = 0) -> slice:
    """The slice of range(total) that `part` of `parts` takes; the first part takes `lead` (at most total) more."""
    rest = total - lead
    return slice(lead + rest * part // parts if part else 0, lead + rest * (part + 1) // parts)


class ThreadPool:
    """The caller and n_threads - 1 sleeping threads. `run(job)` calls job(part, n_threads) once a part, then returns."""

    def __init__(self, n_threads: int):
        self.n_threads = n_threads
        self._job: Callable[[int, int], object] | None = None
        self._errors: list[BaseException] = []
        # a bare lock wakes a thread several times faster than a queue or a condition does
        self._go = [threading.Lock() for _ in range(n_threads - 1)]
        self._done = [threading.Lock() for _ in range(n_threads - 1)]
        for lock in self._go + self._done:
            lock.acquire()
        self._threads = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(1, n_threads)]
        for thread in self._threads:
            thread.start()

    def run(self, job: Callable[[int, int], object]) -> None:
        self._job = job
        for lock in self._go:
            lock.release()
        try:
            job(0, self.n_threads)
        finally:  # even when interrupted: nobody may write into a buffer that the caller believes is finished
            for lock in self._done:
                lock.acquire()
        if self._errors:
            raise self._errors.pop()

    def close(self) -> None:
        """End the threads; the pool cannot be used afterwards. A second call does nothing."""
        self._job = None
        for lock in self._go[: len(self._threads)]:
            lock.release()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _work(self, part: int) -> None:
        while True:
            self._go[part - 1].acquire()
            if self._job is None:
                return
            try:
                self._job(part, self.n_threads)
            except BaseException as error:
                self._errors.append(error)
            self._done[part - 1].release()


@cache
def _blas() -> Callable[[int], object] | None:
    """The function of NumPy's own OpenBLAS that sets its thread count; None with another BLAS."""
    try:
        core = importlib.import_module("numpy._core._multiarray_umath")
    except ImportError:  # NumPy 1
        core = importlib.import_module("numpy.core._multiarray_umath")
    try:
        library = ctypes.CDLL(str(core.__file__))
    except OSError:
        return None
    for name in ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_", "openblas_set_num_threads"):
        function = getattr(library, name, None)
        if function is not None:
            return function
    return None


def set_blas_threads(n_threads: int) -> None:
    """How many threads NumPy's matrix products use; without effect where NumPy was built with another BLAS."""
    function = _blas()
    if function is not None:
        function(n_threads)
