"""Ctrl-C at every place of a piece of code: one KeyboardInterrupt an instruction, and storms of real signals."""

from __future__ import annotations

import itertools
import random
import signal
import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

import pytest

needs_timer = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer")


def interrupt_everywhere(action: Callable[[], object], check: Callable[[], object], *modules: ModuleType) -> int:
    """Run `action` again and again, interrupted at the first, second, third, … instruction that it runs in one of the
    modules; `check` after each. How many places there were.
    """
    files = {module.__file__ for module in modules}
    for at in itertools.count(1):
        if not _interrupted(action, at, files):
            return at - 1
        check()
    raise AssertionError


def _interrupted(action: Callable[[], object], at: int, files: set[str | None]) -> bool:
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        seen += event in ("line", "opcode")
        if seen == at:
            seen += 1
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    assert seen < at, "the interrupt was swallowed"
    return False


def signal_storm(
    action: Callable[[], object], check: Callable[[], object], storms: int, seed: int, *modules: ModuleType
) -> int:
    """`action` under a rain of signals, then `check` in the dry, `storms` times. How many interrupts there were."""
    files, drops, left, looking = {module.__file__ for module in modules}, 0, 0, False

    def handler(_: int, frame: FrameType | None) -> None:
        nonlocal drops, left, looking
        if looking:  # on a busy machine the next signals come while this one's place is looked for
            return
        looking = True
        try:
            while frame is not None:
                if frame.f_code.co_filename in files and left:
                    drops, left = drops + 1, left - 1
                    raise KeyboardInterrupt
                frame = frame.f_back
        finally:
            looking = False

    before, rain = signal.signal(signal.SIGALRM, handler), random.Random(seed)
    hook, sys.unraisablehook = sys.unraisablehook, sys.__unraisablehook__  # pytest's could be interrupted, which fails the test
    try:
        for _ in range(storms):
            left = rain.choice((1, 1, 2, 5))  # someone who presses Ctrl-C several times, too
            signal.setitimer(signal.ITIMER_REAL, rain.uniform(1e-4, 4e-3), rain.choice((1e-4, 1e-3)))
            while left:
                try:
                    action()
                except KeyboardInterrupt:
                    continue
            signal.setitimer(signal.ITIMER_REAL, 0)
            check()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.unraisablehook = hook
    return drops
