"""The machine that figures come from: its processor, memory, versions, what it reads from memory a second, its energy.

Also the reference loops: work that always takes the same time on a quiet machine, timed between the rounds.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm import __version__
from pocketlm.bench.settling import settle
from pocketlm.doctor.board import board
from pocketlm.doctor.resources import memory_speed
from pocketlm.runtime import blas_threads
from pocketlm.runtime.memory import available_bytes
from pocketlm.runtime.threads import ThreadPool, default_threads, share

PACKAGES = (
    "numpy", "llvmlite", "llama-cpp-python", "onnxruntime", "onnxruntime-genai", "openvino", "ctranslate2", "torch",
)  # fmt: skip
LONGEST_LOOP = 0.3  # seconds
POWERCAP = Path("/sys/class/powercap")  # Linux's RAPL counters, microjoules; since 2020 for root only by default


def describe() -> dict[str, Any]:
    """What a reader needs to know of the machine."""
    return {
        "cpu": _cpu(),
        "cores": default_threads(),
        "memory_free_bytes": available_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {"pocketlm": __version__, **{name: found for name in PACKAGES if (found := _version(name))}},
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else [],
        "energy": joules() is not None,
    }


def line(facts: dict[str, Any]) -> str:
    """The machine for a person."""
    load = ", ".join(f"{x:.1f}" for x in facts["load_average"]) if facts["load_average"] else "unknown"
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    where = f"{facts['cpu']}, {facts['cores']} cores, {facts['system']}"
    return f"{where}, Python {facts['python']}, {packages}; load average {load}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    found = board()
    return found.model if found.is_raspberry_pi else ", ".join(found.cores)


def bandwidth(n_threads: int) -> float:
    """Bytes a second that `n_threads` can read from memory, measured for a second."""
    return memory_speed(n_threads, available_bytes(), 1.0)


def joules(root: Path = POWERCAP) -> float | None:
    """What all processor packages have used since some moment; None where the machine does not tell, or not this user.

    The counters start again from zero every few minutes to hours: a difference below zero is to be thrown away.
    """
    packages = [path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1]  # AMD's have this name too
    try:
        return sum(int((path / "energy_uj").read_text()) for path in packages) / 1e6 if packages else None
    except (OSError, ValueError):
        return None


class Steady:
    """Loops that always do the same, between the rounds: they show what else the machine was doing.

    One computes, one reads memory, and one computes on as many threads as the backends: such threads wait for each other
    hundreds of times a token, so that a core which another program wants costs them ten times what it costs one thread.
    """

    def __init__(self, n_threads: int = 1) -> None:
        random = np.random.default_rng(0)
        self._small, self._smaller = (random.random((n, n), np.float32) for n in (384, 160))
        self._large = np.ones(16 << 20, np.float32)
        self._threads = n_threads
        self.alone = math.inf  # seconds of the threads' work on one of them: together they are not slower on a quiet machine
        self.times: dict[str, list[float]] = {"compute": [], "memory": []} | ({"threads": []} if n_threads > 1 else {})

    def check(self) -> None:
        with blas_threads.one_thread(self):  # BLAS's own threads would spin on while the next backend is measured
            self.times["compute"].append(_seconds(lambda: self._small @ self._small, 20))
            self.times["memory"].append(_seconds(lambda: np.add.reduce(self._large.view(np.int64)), 3))
            if self._threads > 1:
                self.alone = min(self.alone, _seconds(lambda: self._smaller @ self._smaller, 200))
                with ThreadPool(self._threads) as pool:
                    self.times["threads"].append(_seconds(lambda: pool.run(self._rows), 200))
                settle()

    def _rows(self, part: int, parts: int) -> None:
        np.matmul(self._smaller[share(len(self._smaller), part, parts)], self._smaller)

    @property
    def drift(self) -> float:
        """How much longer the slowest tenth of the loops took than the fastest, of all loops the worst: 1.0 is steady."""
        return max(_drift(times, self.alone if name == "threads" else math.inf) for name, times in self.times.items())

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in self.times.items() if times}


def _seconds(work: Callable[[], object], times: int) -> float:
    """Seconds of doing it so many times; by extrapolation where that takes longer than LONGEST_LOOP."""
    started, done, elapsed = time.perf_counter(), 0, 0.0
    while done < times and elapsed < LONGEST_LOOP:
        work()
        done, elapsed = done + 1, time.perf_counter() - started
    return elapsed * times / done


def _drift(times: list[float], best: float) -> float:
    return float(np.percentile(times, 90)) / min(*times, best) if times else 1.0
