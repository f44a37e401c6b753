"""Memory, swap, pages and the storage that a file lies on.

In: files under /proc and /sys, and a file to read. Out: numbers. Knows no models.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketlm.runtime import blas_threads, control_groups, memory
from pocketlm.runtime.small_files import number, text
from pocketlm.runtime.threads import ThreadPool

_READ = 32 << 20  # bytes of a file that are read to time its storage


@dataclass(frozen=True)
class Memory:
    """Bytes; None where the system does not say."""

    total: int | None
    free: int | None  # that a program can still take, limits included
    limit: int | None  # what is left of a container's or service's limit
    swap: int | None  # on a card or a disk
    swap_used: int | None
    zram: int | None  # swap that is compressed memory
    page: int


def memory_of(root: Path = Path("/")) -> Memory:
    """The memory of the machine whose files are below `root`; what is free is this machine's where that is "/"."""
    rows = dict(line.split(":", 1) for line in text(root / "proc/meminfo").splitlines() if ":" in line)
    kilobytes = {name: value.strip().partition(" ")[0] for name, value in rows.items()}
    sizes = {name: int(value) << 10 for name, value in kilobytes.items() if value.isdigit()}
    swaps = [line.split() for line in text(root / "proc/swaps").splitlines()[1:]]
    swaps = [row for row in swaps if len(row) >= 4 and row[2].isdigit() and row[3].isdigit()]

    def sum_of(column: int, compressed: bool) -> int | None:
        return sum(int(row[column]) << 10 for row in swaps if ("zram" in row[0]) == compressed) if rows else None

    own, limit = root == Path("/"), control_groups.memory_left(root)
    total = sizes.get("MemTotal") or (_total() if own else None)
    return Memory(
        total, memory.available_bytes() if own else sizes.get("MemAvailable"),
        None if limit is None or limit > (total or 1 << 50) else limit,
        sum_of(2, False), sum_of(3, False), sum_of(2, True), mmap.PAGESIZE,
    )  # fmt: skip


def _total() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def storage(path: Path, root: Path = Path("/"), device: int | None = None) -> str:
    """What kind of device a file lies on: "SD card", "eMMC", "NVMe", "disk that turns", "USB", "flash"; "" if unknown."""
    try:
        number_ = path.stat().st_dev if device is None else device
        where = (root / f"sys/dev/block/{os.major(number_)}:{os.minor(number_)}").resolve()
    except (OSError, AttributeError):
        return ""
    names = where.parts
    whole = next((folder for folder in (where, where.parent) if (folder / "queue").is_dir()), where)
    if any(part.startswith("mmcblk") for part in names):
        return "SD card" if text(whole / "device/type") == "SD" else "eMMC"
    if any(part.startswith("nvme") for part in names):
        return "NVMe"
    if number(whole / "queue/rotational") == 1 and any(part.startswith("sd") for part in names):
        return "disk that turns"
    if any(part.startswith("usb") for part in names):
        return "USB"
    return "flash" if any(part.startswith("sd") for part in names) else ""


def storage_speed(path: Path) -> float | None:
    """Bytes a second that a file is read with, what is in memory of it forgotten before (Linux); None where that cannot be."""
    if sys.platform != "linux":
        return None
    try:
        with path.open("rb", buffering=0) as file:
            length = min(_READ, os.fstat(file.fileno()).st_size)
            os.posix_fadvise(file.fileno(), 0, length, os.POSIX_FADV_DONTNEED)
            started, at, buffer = time.perf_counter(), 0, memoryview(bytearray(1 << 20))
            while at < length and (n := file.readinto(buffer)):
                at += n
            return at / (time.perf_counter() - started) if at else None
    except OSError:
        return None


def memory_speed(n_threads: int, free: int | None, seconds: float = 0.3) -> float:
    """Bytes a second that `n_threads` read from memory together: the best of NumPy's dot, sum and copy (which reads and writes)
    within so many seconds.
    """
    size = min(256 << 20, (free or 1 << 30) // 8) // n_threads // 64 * 64  # beyond any cache, if there is room
    parts = [np.ones(max(size, 1 << 20) // 4, np.float32) for _ in range(n_threads)]
    with ThreadPool(n_threads) as pool, blas_threads.one_thread(pool):
        return max(_rounds(pool, parts, seconds))


def _rounds(pool: ThreadPool, parts: list[np.ndarray], seconds: float) -> Iterator[float]:
    half, begun = len(parts[0]) // 2, time.perf_counter()
    jobs: tuple[Callable[[int, int], object], ...] = (
        lambda i, _: np.dot(parts[i], parts[i]),
        lambda i, _: np.add.reduce(parts[i].view(np.int64)),
        lambda i, _: np.copyto(parts[i][:half], parts[i][half:]),
    )
    while time.perf_counter() < begun + seconds:
        for job in jobs:
            started = time.perf_counter()
            pool.run(job)
            yield sum(part.nbytes for part in parts) / (time.perf_counter() - started)
