"""Waiting until the threads of a library have gone to sleep: some spin for a while after a call. Knows no backend."""

from __future__ import annotations

import time

STEP, QUIET, LONGEST = 0.01, 0.1, 0.3  # seconds between looks, share of a core that counts as asleep, longest wait


def settle() -> None:
    """Wait until this process uses hardly any processor time."""
    until = time.perf_counter() + LONGEST
    before, busy = time.process_time(), True
    while busy and time.perf_counter() < until:
        time.sleep(STEP)
        now = time.process_time()
        busy, before = now - before > QUIET * STEP, now
