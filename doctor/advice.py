"""What to change on this machine: a table of what can be wrong and what helps.

In: what was found out. Out: sentences, the most important first. Reads nothing itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from pocketlm.doctor.board import Board
from pocketlm.doctor.health import Health
from pocketlm.doctor.models import Fit
from pocketlm.doctor.resources import Memory
from pocketlm.runtime.memory import MB

_SIXTY_FOUR = re.compile(r"Raspberry Pi (3|4|5|\d00|Zero 2|Compute Module [345]|2 Model B Rev 1\.2)")


@dataclass(frozen=True)
class Facts:
    """All that was found out. `level`: of the compiled code, "" where there is none; then `level_problem` says why."""

    board: Board
    health: Health
    memory: Memory
    storage: str
    storage_speed: float | None  # bytes a second
    level: str
    level_problem: str
    threads: int
    memory_speed: float | None  # bytes a second
    fits: tuple[Fit, ...]


def advice(facts: Facts) -> list[str]:
    """What to change; nothing where all is well."""
    return [text(facts) if callable(text) else text for applies, text in _ROWS if applies(facts)]


def _weak_now(facts: Facts) -> bool:
    return facts.health.now is not None and "power is too weak" in facts.health.now


def _was(facts: Facts, name: str) -> bool:
    return name in (facts.health.before or ()) and not facts.health.now


def _wide_machine(facts: Facts) -> bool:
    return facts.board.machine in ("aarch64", "arm64", "x86_64", "AMD64")


def _can_be_wide(facts: Facts) -> bool:
    return bool(_SIXTY_FOUR.match(facts.board.model))


def _does_not_fit(facts: Facts) -> list[Fit]:
    return [fit for fit in facts.fits if not fit.n_ctx and not fit.problem]


_ROWS: tuple[tuple[Callable[[Facts], object], str | Callable[[Facts], str]], ...] = (
    (lambda f: f.board.bits == 32 and _wide_machine(f),
     "this Python has 32 bits on a 64-bit kernel, so there is no compiled code: install the 64-bit system, for a Raspberry Pi"
     " \"Raspberry Pi OS (64-bit)\""),
    (lambda f: f.board.bits == 32 and not _wide_machine(f) and _can_be_wide(f),
     "the system has 32 bits, this board can run 64: install \"Raspberry Pi OS (64-bit)\""),
    (lambda f: f.board.bits == 32 and not _wide_machine(f) and not _can_be_wide(f),
     "the system has 32 bits, so there is no compiled code: models run on NumPy, if at all; take a board with 64 bits"),
    (_weak_now, "the power supply is too weak, and the processor slows down: use the board's own supply and a short cable"),
    (lambda f: f.health.now and not _weak_now(f),
     "the processor is slowed down by heat: give it a cooler, or a case with a fan"),
    (lambda f: _was(f, "power is too weak"),
     "the power was too weak since the board was switched on: use the board's own supply and a short cable"),
    (lambda f: _was(f, "it is throttled") and not _was(f, "power is too weak"),
     "the processor was slowed down by heat since it was switched on: a cooler helps"),
    (lambda f: f.health.celsius is not None and f.health.celsius >= 75 and not f.health.now,
     lambda f: f"the processor has {f.health.celsius:.0f} °C; Raspberry Pis slow down from 80 °C on: a cooler helps"),
    (lambda f: f.health.governor == "powersave",
     "the governor \"powersave\" keeps the processor at its lowest speed:"
     " echo ondemand | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_governor"),
    (lambda f: f.health.megahertz and f.health.megahertz[1] < f.health.megahertz[2],
     lambda f: "the processor may run at {1} MHz, of {2} possible: look for scaling_max_freq or arm_freq".format(
         *(f.health.megahertz or (0, 0, 0)))),
    (lambda f: (f.memory.swap_used or 0) > 64 * MB,
     lambda f: f"{(f.memory.swap_used or 0) // MB} MB are swapped out to storage, a hundred times slower than memory:"
     " close programs, or take a smaller model"),
    (lambda f: _does_not_fit(f) and f.memory.free is not None and f.board.is_raspberry_pi,
     lambda f: f"{_does_not_fit(f)[0].path.name} needs {_does_not_fit(f)[0].needs // MB} MB and {(f.memory.free or 0) // MB} MB"
     " are free: without a desktop (sudo raspi-config, System, Boot) 200 to 400 MB more are"),
    (lambda f: _does_not_fit(f) and f.memory.free is not None and not f.board.is_raspberry_pi,
     lambda f: f"{_does_not_fit(f)[0].path.name} needs {_does_not_fit(f)[0].needs // MB} MB and {(f.memory.free or 0) // MB} MB"
     " are free: close other programs, or take a smaller or more quantised model"),
    (lambda f: any(0 < fit.n_ctx < min(1024, fit.wanted) for fit in f.fits),
     "a short context is all that fits of a model: pocketlm chat MODEL --ctx N takes what is said above"),
    (lambda f: f.storage_speed is not None and f.storage_speed < 60e6,
     lambda f: f"models are read at {(f.storage_speed or 0) / 1e6:.0f} MB/s, once at every start: a faster card, USB 3 or NVMe"
     " storage starts sooner (answers are no faster)"),
    (lambda f: f.level_problem and f.board.bits == 64,
     lambda f: f"there is no compiled code here, models run on NumPy: {f.level_problem}"),
)  # fmt: skip
