"""How much memory is free, and whether a model fits: asked before anything large is allocated.

Knows operating systems, not models: the executors say what they need. The figure is an estimate at one moment;
another program may take the memory a second later.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pocketlm.errors import FileError
from pocketlm.runtime import control_groups

MIB = 1 << 20
MB = 10**6  # as file managers count, and `pocketlm inspect`
NUMPY_ASKS = 4 * MIB  # of an array, from which on NumPy asks Linux for large pages
_FOR_THREADS = 224 * MIB  # addresses that glibc reserves for threads (64 MiB each, for moments 128): `ulimit -v` counts them


def available_bytes() -> int | None:
    """Bytes a program can still take without swapping, the container's limit included; None where it cannot be told."""
    readers: dict[str, Callable[[], int]] = {"linux": _linux, "win32": _windows, "darwin": _darwin}
    try:
        return readers[sys.platform]()
    except (KeyError, OSError, ValueError, AttributeError, StopIteration):
        return None


def require(path: object, needs: Callable[[int], tuple[int, int, int]], n_ctx: int) -> None:
    """Raise FileError, with the three figures and the context that would fit, if `needs(n_ctx)` exceeds the free memory.

    `needs`: context → bytes of (weights, cache, scratch), growing with it; scratch includes tables of positions and threads'
    buffers.
    """
    free = available_bytes()
    weights, cache, scratch = needs(n_ctx)
    if free is None or weights + cache + scratch <= free:
        return
    fits = 64 * bisect.bisect_right(range(64, n_ctx, 64), free, key=lambda shorter: sum(needs(shorter)))
    advice = f"--ctx {fits} would fit" if fits else "use a smaller or more quantised model, or close other programs"
    figures = f"{weights // MB} MB for weights, {cache // MB} MB for the cache of {n_ctx} tokens and {scratch // MB} MB scratch"
    raise FileError(path, f"needs {figures}, but only {free // MB} MB are free", advice)


def require_session(path: object, n_bytes: int, promised: int, n_ctx: int) -> None:
    """FileError if one more session's cache of `n_bytes` exceeds the free memory, less what other sessions were promised."""
    free = available_bytes()
    if free is not None and n_bytes + promised > free:
        needs = f"one more session needs {n_bytes // MB} MB for the cache of {n_ctx} tokens"
        left = f"but only {max(free - promised, 0) // MB} MB are free"
        raise FileError(path, f"{needs}, {left}", "close other sessions, or ask for a smaller one: session(ctx=…)")


def _linux() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("MemAvailable:"))
    free = int(line.split()[1]) * 1024
    limits = [control_groups.memory_left(), *(_within(*row) for row in (("RLIMIT_AS", 0), ("RLIMIT_DATA", 5)))]
    return max(min([free, *(left for left in limits if left is not None)]), 0)


def _within(name: str, column: int) -> int | None:
    """Bytes left of what `ulimit` allows; None where that is all. `column` of /proc/self/statm says how much is used."""
    import resource

    most = resource.getrlimit(getattr(resource, name))[0]
    if most == resource.RLIM_INFINITY:
        return None
    with open("/proc/self/statm", encoding="ascii") as file:
        return most - int(file.read().split()[column]) * mmap.PAGESIZE - _FOR_THREADS


def _darwin() -> int:
    libc = ctypes.CDLL(None)
    value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)

    def read(name: bytes) -> int:
        value.value, size.value = 0, 8
        if libc.sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, 0):
            raise OSError(name)
        return value.value

    # free and speculative pages are a lower bound: macOS also gives back file pages on demand
    return max(
        (read(b"vm.page_free_count") + read(b"vm.page_speculative_count")) * os.sysconf("SC_PAGE_SIZE"),
        read(b"hw.memsize") // 4,
    )


def _windows() -> int:
    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32)] + [
            (name, ctypes.c_uint64)
            for name in ("total", "free", "page_total", "page_free", "virtual", "virtual_free", "extended")
        ]

    status = Status(length=ctypes.sizeof(Status))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # type: ignore[attr-defined]
        raise OSError("GlobalMemoryStatusEx")
    return status.free


def release_pages(view: np.ndarray) -> None:
    """Give back the memory of the file pages that `view` looks at; they are read again if they are needed again.

    Does nothing for arrays that are not views of a mapping, nor where the system has no such request.
    """
    _advise(view, "MADV_DONTNEED")


def read_as_told(view: np.ndarray) -> None:
    """Let the system read of these file pages only what it is asked for, and not read_ahead_kb around it (Linux)."""
    _advise(view, "MADV_RANDOM")


def _advise(view: np.ndarray, advice: str) -> None:
    base = view
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    if isinstance(base, mmap.mmap) and hasattr(mmap, advice):
        first = view.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
        start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: the others hold a neighbour's bytes
        length = (first + view.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            base.madvise(getattr(mmap, advice), start, length)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not less than `n`."""
    return -(-n // multiple) * multiple


def release_code(library: str) -> None:
    """Give back the memory of a shared library's code, which is read again from its file if it is called again (Linux)."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as file:
            places = [line.split() for line in file if library in line and " r-xp " in line]
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return
    for place, *_ in places:
        start, end = (int(address, 16) for address in place.split("-"))
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 4)  # MADV_DONTNEED; code is never written to


def return_unused() -> None:
    """Give freed memory that the C library (glibc) has kept back to the system: megabytes after a vocabulary was read."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return


_sparing = False


def be_sparing() -> None:
    """From now on this process takes as little memory as it can: models have a small context unless asked for another."""
    global _sparing
    _sparing = True


def is_sparing() -> bool:
    return _sparing


def scattered(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """`aligned` for an array of which only pieces here and there may ever be used.

    Of Linux NumPy asks pages of 2 MB for these, so that one byte used takes 2 MB, and the time to zero them. Pages are small
    here; what is small itself stays in the C library's heap, whose pages are nobody's alone.
    """
    array = aligned(shape, dtype)
    if sys.platform == "linux" and array.nbytes >= NUMPY_ASKS:
        start, stop = round_up(array.ctypes.data, mmap.PAGESIZE), (array.ctypes.data + array.nbytes) & -mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), 15)  # MADV_NOHUGEPAGE
    return array


def aligned(shape: tuple[int, ...] | int, dtype: Any, alignment: int = 64) -> np.ndarray:
    """A zeroed array whose data begin at a multiple of `alignment` bytes. Pages are used as they are written."""
    n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.zeros(n_bytes + alignment, np.uint8)
    return raw[-raw.ctypes.data % alignment :][:n_bytes].view(dtype).reshape(shape)


def in_one_piece(sizes: Sequence[int]) -> list[np.ndarray]:
    """Zeroed arrays of bytes, one behind the other in one allocation; each begins at a multiple of 64 bytes.

    Of Linux NumPy asks large pages for allocations of NUMPY_ASKS bytes and more: the processor then looks up an address for 2
    MB instead of 4 kB, and fetches ahead over the ends of what lies there.
    """
    starts = [0, *itertools.accumulate(round_up(size, 64) for size in sizes)]
    whole = aligned(starts[-1], np.uint8)
    return [whole[start : start + size] for start, size in zip(starts, sizes, strict=False)]
