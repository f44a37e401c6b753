"""Locks for `with` that are released whenever Ctrl-C interrupts the block: the next answer needs the same locks. One kind
of lock is new in a forked process.

Python's own locks do that, because `with` acquires one and arranges its release in a single step. Three exceptions: Python 3.14
also checks for interrupts between `__enter__` and the block (python/cpython#148874, fixed in 3.15), where an interrupt leaves
the lock held for ever. So does Python 3.10 between an exception in the block and `__exit__`: there a second Ctrl-C just after
the first does it. And from 3.12 on, an interrupt in a `while` loop with a condition can leave a `with` without its `__exit__`
(python/cpython#130279); such loops are kept in functions of their own, and a test looks for others.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import AbstractContextManager
from functools import partial
from operator import getitem
from typing import Any, cast
from weakref import ref


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


class _HeldByTheStack:
    """A lock for `with` that is released when `with` drops what it keeps for its end, called or not. Says whether it was had.

    `with` looks up `__exit__`, calls `__enter__` and begins the block in one step. So it is the looking up that acquires the
    lock, and what is found is an object whose end, by a weak reference's callback, releases it: no Python code that could be
    interrupted. The lock and the reference come by one step of an iterator, as in `_OneStep`.
    """

    __slots__ = ("__enter__", "_end", "_got", "_having", "acquire", "locked", "release")

    def __init__(self, lock: Any, **limit: float):
        self.acquire, self.release, self.locked = lock.acquire, lock.release, getattr(lock, "locked", None)
        self._end = lock._end if isinstance(lock, _HeldByTheStack) else lock.__exit__  # which takes any arguments
        self._got, self._having = [False], iter(partial(lock.acquire, **limit), False)
        self.__enter__ = partial(getitem, self._got, 0)

    @property
    def __exit__(self) -> Any:
        held: Any = partial("".format)  # does nothing with any arguments
        step = zip(self._having, map(ref, (held,), (self._end,)), strict=False)
        for self._got[0], held.end in step:
            return held
        return held  # not in that time


def lock() -> threading.Lock:
    return cast(threading.Lock, _for_this_python(threading.Lock()))


def reentrant_lock() -> threading.RLock:
    return cast(threading.RLock, _for_this_python(threading.RLock()))


def _for_this_python(lock: Any) -> Any:
    return {(3, 10): _HeldByTheStack, (3, 14): _OneStep}.get(sys.version_info[:2], lambda lock: lock)(lock)


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

    def within(self, seconds: float) -> AbstractContextManager[bool]:
        """For `with`: whether it could be had in that time; what was had is given back at the end."""
        return cast(AbstractContextManager[bool], _HeldByTheStack(self.here, timeout=seconds))
