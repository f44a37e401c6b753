"""Locks for `with` that an interrupt leaves free: Ctrl-C ends an answer, and the next one wants the same locks. And one that a
forked process has anew.

Python's own are such: to have one and to have to release it is one step of `with`. But Python 3.14 looks for interrupts after
the call of `__enter__` too (python/cpython#148874, mended in 3.15), and who is interrupted there leaves a lock closed for ever.
From 3.12 on a loop with a condition in it is a second such place (python/cpython#130279): there an interrupt leaves the `with`
without a release. Such loops are in functions of their own; a test looks for others.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, cast


class _OneStep:
    """A lock in a `with` that has it and has to release it in one step, in every Python from 3.10 on.

    Interrupts come where a call of a built-in function ends and where a function of Python's begins, but neither where an
    iterator's step ends nor where such a function returns.
    """

    __slots__ = ("__exit__", "_having", "acquire", "locked", "release")

    def __init__(self, lock: Any):
        self.acquire, self.release, self.locked = lock.acquire, lock.release, getattr(lock, "locked", None)
        self.__exit__, self._having = lock.__exit__, iter(lock.acquire, None)  # one for all: it never ends

    def __enter__(self) -> None:
        for _ in self._having:
            return


def lock() -> threading.Lock:
    return cast(threading.Lock, _for_this_python(threading.Lock()))


def reentrant_lock() -> threading.RLock:
    return cast(threading.RLock, _for_this_python(threading.RLock()))


def _for_this_python(lock: Any) -> Any:
    return _OneStep(lock) if sys.version_info[:2] == (3, 14) else lock


class ForkedLock:
    """A lock for the threads of one process. A forked child, where nobody is left to open it, gets a new one.

    Used as `with lock.here:`, for which acquiring it and having to release it are one step.
    """

    def __init__(self) -> None:
        self._pid, self._lock = os.getpid(), reentrant_lock()

    @property
    def here(self) -> AbstractContextManager[object]:
        if os.getpid() != self._pid:
            self._pid, self._lock = os.getpid(), reentrant_lock()
        return self._lock

    @contextmanager
    def within(self, seconds: float) -> Iterator[bool]:
        """Whether it could be had in that time; what was had is given back at the end."""
        lock: Any = self.here
        for got in iter(partial(lock.acquire, timeout=seconds), None):  # no interrupt comes between this step and `try`
            try:
                yield got
            finally:
                if got:
                    lock.release()
            return
