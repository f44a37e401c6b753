"""How many threads compute a single token: memory limits that, and often fewer threads than a prompt gains from are faster.

In: how long passes of one token took. Out: on how many threads to compute the next one. The first tokens that a model makes on
a machine are computed by several numbers of threads in turn, so nobody waits for a measurement; what is found is remembered in
the cache folder, unless other programs ran meanwhile. Results do not depend on the number of threads. Knows no kernels.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pocketlm.runtime.native.code_cache import keep, kept

WARM = 4  # passes that are not looked at: the first ones read the weights from the disk
ROUNDS = 8  # passes of each number at least; the first half and the second must agree
SECONDS = 0.2  # that all of them take at least: the system counts processor time in hundredths
DISTURBED = 0.15  # of a processor that other programs may take meanwhile
GAIN = 0.97  # fewer threads must take at most this much of the time


class DecodeThreads:
    """`next` before a pass of one token, `took` after it. `found` is called once, with a number that may be remembered.
    `others` tells how many seconds of processor time other programs have taken so far.
    """

    def __init__(
        self, n_threads: int, known: int | None = None, found: Callable[[int], object] = lambda n: None,
        others: Callable[[], float] = lambda: 0.0,
    ):  # fmt: skip
        self._most, self._found, self._others = n_threads, found, others
        self.n_threads = known if known and 1 <= known <= n_threads else n_threads
        self._candidates = [] if known or n_threads == 1 else sorted({n_threads, -(-3 * n_threads // 4), -(-n_threads // 2)})
        self._times: dict[int, list[float]] = {n: [] for n in self._candidates}
        self._passes = 0
        self._began = 0.0, 0.0  # the clock, the time of others

    @property
    def is_trying(self) -> bool:
        """Whether the times of passes are still wanted."""
        return bool(self._candidates)

    def next(self) -> int:
        """On how many threads the next token is to be computed."""
        if not self._candidates or self._passes < WARM:
            return self.n_threads
        return self._candidates[(self._passes - WARM) % len(self._candidates)]

    def took(self, seconds: float) -> None:
        """The time of the pass for which `next` was asked."""
        if not self._candidates:
            return
        if self._passes >= WARM:
            self._times[self.next()].append(seconds)
        self._passes += 1
        if self._passes == WARM:
            self._began = time.monotonic(), self._others()
        rounds, rest = divmod(self._passes - WARM, len(self._candidates))
        if rest == 0 and rounds >= ROUNDS and sum(map(sum, self._times.values())) >= SECONDS:
            self._candidates = []
            first, second = (self._best(half) for half in (slice(None, rounds // 2), slice(rounds // 2, None)))
            disturbed = self._others() - self._began[1] > DISTURBED * (time.monotonic() - self._began[0]) + 0.02
            if first == second and not disturbed:
                self.n_threads = first
                self._found(first)

    def _best(self, rounds: slice) -> int:
        """The number that takes the shortest time; all threads, unless fewer are faster beyond doubt."""
        times = {n: sorted(times[rounds])[len(times[rounds]) // 2] for n, times in self._times.items()}
        best = min(times, key=lambda n: times[n])
        return best if times[best] <= GAIN * times[self._most] else self._most


def others() -> float:
    """Seconds of processor time that other programs have taken since the machine was switched on (Linux, Windows)."""
    if sys.platform == "win32":
        idle, kernel, user = (ctypes.c_uint64() for _ in range(3))  # in tenths of a microsecond
        ctypes.windll.kernel32.GetSystemTimes(*map(ctypes.byref, (idle, kernel, user)))
        return (kernel.value - idle.value + user.value) / 1e7 - time.process_time()
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, irq, softirq, steal, *_ = map(int, file.readline().split()[1:])
    except (OSError, ValueError):
        return time.monotonic()  # as if one processor were always taken: nothing is found then
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def for_model(path: Path, n_bytes: int, level: str, n_threads: int) -> DecodeThreads | None:
    """What is remembered of a model on this machine, or will be; None where the system does not tell what others do."""
    if sys.platform not in ("linux", "win32") or n_threads == 1:
        return None
    key = f"decode threads 1: {platform.node()} {level} {n_threads} {path.name} {n_bytes}"
    known = kept(key)
    return DecodeThreads(n_threads, known[0] if known else None, lambda n: keep(key, bytes([n])), others)
