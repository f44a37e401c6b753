"""How many threads a model gets, and a pool of Python threads that share a call's rows.

NumPy lets go of the interpreter's lock inside a matrix product, so threads that each take a slice of the rows run at
the same time. Knows nothing about models.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence

from pocketlm.errors import PocketlmError, whole_number
from pocketlm.runtime import processors

MAX_THREADS = 256


def default_threads() -> int:
    """One for every physical core that this process may use."""
    return min(processors.cores(), MAX_THREADS)


def check_threads(n_threads: int | None) -> int:
    """`n_threads`, or the default where it is None. Raises UsageError outside 1..MAX_THREADS."""
    if n_threads is None:
        return default_threads()
    return whole_number("--threads", n_threads, 1, MAX_THREADS)


def share(total: int, part: int, parts: int, lead: int = 0) -> slice:
    """The slice of range(total) that `part` of `parts` takes; the first part takes `lead` (at most total) more."""
    rest = total - lead
    return slice(lead + rest * part // parts if part else 0, lead + rest * (part + 1) // parts)


# ---- what every team of threads needs -------------------------------------------------------------------------------


def start_threads(threads: Sequence[threading.Thread]) -> None:
    """Start them all. PocketlmError where the system gives no more threads; some may be running then."""
    try:
        for thread in threads:
            thread.start()
    except RuntimeError as error:
        raise PocketlmError(f"cannot start {len(threads) + 1} threads ({error}); ask for fewer with --threads") from error


def join_threads(threads: Sequence[threading.Thread]) -> None:
    """Wait for the end of all that run, but for the thread that asks: it may be one of them."""
    for thread in threads:
        if thread.is_alive() and thread is not threading.current_thread():
            thread.join()


def closed_lock() -> threading.Lock:
    """A lock that the next thread to acquire it sleeps at, until `open_lock`: wakes several times faster than a condition."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def open_lock(lock: threading.Lock) -> None:
    """Let the thread go on that sleeps at the lock, or the next one that comes. An open lock stays open."""
    try:  # noqa: SIM105  contextlib.suppress takes ten times as long
        lock.release()
    except RuntimeError:
        pass


# ---- the pool -------------------------------------------------------------------------------------------------------


class _Run:
    """One call of ThreadPool.run: the job, and what the other threads' parts of it raised."""

    def __init__(self, job: Callable[[int, int], object]):
        self.job, self.errors = job, list[BaseException]()


class _Worker:
    """One thread's end of the pool. `run` is what it is to do; it empties that field when it has done it.

    The two locks only wake: whoever wakes looks at the fields, so a lock that is open too early or too often does no harm.
    """

    def __init__(self, part: int, parts: int):
        self.part, self.parts = part, parts
        self.run: _Run | None = None
        self.taken: _Run | None = None  # the same, once the thread has seen it
        self.closed = self.ended = False
        self.go, self.done = closed_lock(), closed_lock()

    def live(self) -> None:
        while not self.closed:
            self.go.acquire()
            run = self.taken = self.run
            if run is not None:
                try:
                    run.job(self.part, self.parts)
                except BaseException as error:
                    run.errors.append(error)
                self.run = self.taken = run = None
                open_lock(self.done)
        self.ended = True
        open_lock(self.done)

    def settle(self) -> None:
        """Wait until the thread has nothing to do, or has ended."""
        while self.run is not None and not self.ended:
            if self.taken is not self.run:  # whoever gave it the run may have been interrupted before waking the thread
                open_lock(self.go)
            self.done.acquire()


class ThreadPool:
    """The caller and n_threads - 1 sleeping threads. `run(job)` calls job(part, n_threads) once a part, then returns.

    One caller at a time. Usable in a `with` statement; the threads of a pool that is dropped without `close` end by themselves.
    """

    def __init__(self, n_threads: int):
        """Raises PocketlmError where the system gives no more threads."""
        self.n_threads = n_threads
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._workers = [_Worker(part, self.n_threads) for part in range(1, self.n_threads)]
        # a thread knows its worker and nothing of the pool: the pool can be collected, and then it ends
        self._finalizer = weakref.finalize(self, _send_home, self._workers)
        self._finalizer.atexit = False  # the program's end stops them where they are
        self._threads = [
            threading.Thread(target=worker.live, daemon=True, name=f"pocketlm-pool-{worker.part}") for worker in self._workers
        ]
        try:
            start_threads(self._threads)
        except BaseException:
            self.close()
            raise

    def run(self, job: Callable[[int, int], object]) -> None:
        """Raises what a part of this job raised; PocketlmError once the pool is closed, or when it is closed meanwhile."""
        if os.getpid() != self._pid:  # after a fork only the thread that forked is here
            self._begin()
        self._settle()  # a run that was interrupted, should an interrupt have come at the one wrong moment
        run = _Run(job)
        try:
            for worker in self._workers:
                worker.run = run
                open_lock(worker.go)
            job(0, self.n_threads)
        finally:  # even when interrupted: nobody may write into a buffer that the caller believes is finished
            self._settle()
        if not self._finalizer.alive:
            raise PocketlmError("this model is closed; load it again")
        if run.errors:
            raise run.errors[0]

    def _settle(self) -> None:
        """Wait until no thread has anything left to do. Interrupts wait, too."""
        held: BaseException | None = None
        for worker in self._workers:
            while worker.run is not None and not worker.ended:
                try:
                    worker.settle()
                except BaseException as error:
                    held = error
        if held is not None:
            raise held

    def close(self) -> None:
        """End the threads, once they have done what they are doing. A second call does nothing."""
        self._finalizer()
        join_threads(self._threads)

    def __enter__(self) -> ThreadPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _send_home(workers: Sequence[_Worker]) -> None:
    """Tell the threads to end. Does not wait for them: this may run in any thread, one of them included."""
    for worker in workers:
        worker.closed = True
        open_lock(worker.go)
