"""Locks for `with` that are released whenever Ctrl-C interrupts the block: the next answer needs the same locks.

Python's own locks do that, because `with` acquires one and arranges its release in a single step. Two exceptions: Python 3.14
also checks for interrupts between `__enter__` and the block (python/cpython#148874, fixed in 3.15), where an interrupt leaves
the lock held for ever. And from 3.12 on, an interrupt in a `while` loop with a condition can leave a `with` without its
`__exit__` (python/cpython#130279); such loops are kept in functions of their own, and a test looks for others.
"""

from __future__ import annotations

import sys
import threading
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
