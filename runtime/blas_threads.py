"""How many threads NumPy's matrix products use: one while an executor computes, and what it was before at any other time.

The number belongs to the whole process, so executors that compute at the same time share the change, and the last one
takes it back. Without effect where NumPy was built with another BLAS than OpenBLAS.
"""

from __future__ import annotations

import ctypes
import importlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

from pocketlm.locks import ForkedLock


class _Blas(NamedTuple):
    get: Callable[[], int]
    set: Callable[[int], object]


@cache
def _library() -> _Blas | None:
    """The two functions of NumPy's own OpenBLAS; None with another BLAS."""
    try:
        core = importlib.import_module("numpy._core._multiarray_umath")
    except ImportError:  # NumPy 1
        core = importlib.import_module("numpy.core._multiarray_umath")
    try:
        library = ctypes.CDLL(str(core.__file__))
    except OSError:
        return None
    for name in ("scipy_openblas_{}_num_threads64_", "openblas_{}_num_threads64_", "openblas_{}_num_threads"):
        get, set = getattr(library, name.format("get"), None), getattr(library, name.format("set"), None)
        if get is not None and set is not None:
            return _Blas(get, set)
    return None


class _Shared:
    """Who wants one thread at the moment, and the number before the first of them came; None: it is back."""

    def __init__(self) -> None:
        self.lock, self.users = ForkedLock(), weakref.WeakSet[object]()
        self.before: int | None = None


_shared = _Shared()


@contextmanager
def one_thread(user: object) -> Iterator[None]:
    """Products use one thread meanwhile. `user` is one who computes at most once at a time: where an interrupt keeps it from
    leaving, its next visit sets that right.
    """
    blas = _library()
    if blas is None:
        yield
        return
    try:
        with _shared.lock.here:
            if _shared.before is None:
                _shared.before = blas.get()
            _shared.users.add(user)
            blas.set(1)
        yield
    finally:
        with _shared.lock.here:
            _shared.users.discard(user)
            if not _shared.users and _shared.before is not None:
                if blas.get() == 1:  # otherwise somebody has chosen another number meanwhile
                    blas.set(_shared.before)
                _shared.before = None
