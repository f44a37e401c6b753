"""Locks for `with` that are released whenever Ctrl-C interrupts the block: the next answer needs the same locks. One kind
of lock is new in a forked process.

Python's own locks do that, because `with` acquires one and arranges its release in a single step. Two exceptions: Python 3.14
also checks for interrupts between `__enter__` and the block (python/cpython#148874, fixed in 3.15), where an interrupt leaves
the lock held for ever. And from 3.12 on, an interrupt in a `while` loop with a condition can leave a `with` without its
`__exit__` (python/cpython#130279); such loops are kept in functions of their own, and a test looks for others.
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
    """A lock for `with`, acquired without a moment at which an interrupt would lose it, in every Python from 3.10 on.

    Python checks for interrupts when a built-in function returns and when a Python function begins, but neither after a step
    of an iterator nor when a Python function returns. So `__enter__` acquires the lock by a step of an iterator.
    """

    __slots__ = ("__exit__", "_having", "acquire", "locked", "release")

    def __init__(self, lock: Any):
        self.acquire, self.release, self.locked = lock.acquire, lock.release, getattr(lock, "locked", None)
        self.__exit__, self._having = lock.__exit__, iter(lock.acquire, None)  # acquire never gives None: it does not end

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
        self._locks = {os.getpid(): reentrant_lock()}

    @property
    def here(self) -> AbstractContextManager[object]:
        pid = os.getpid()
        return self._locks.get(pid) or self._locks.setdefault(pid, reentrant_lock())  # the same for threads that ask at once

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
