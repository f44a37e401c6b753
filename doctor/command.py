"""`pocketlm doctor`: what this machine is, which models fit on it and how fast they can be, and what to change."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from pocketlm.doctor import models
from pocketlm.doctor.advice import Facts, advice
from pocketlm.doctor.board import board
from pocketlm.doctor.health import health
from pocketlm.doctor.portrait import size_text
from pocketlm.doctor.resources import memory_of, memory_speed, storage, storage_speed
from pocketlm.errors import PocketlmError
from pocketlm.model import find_model
from pocketlm.runtime.memory import MB
from pocketlm.runtime.native import levels
from pocketlm.runtime.native.executable_memory import NativeUnavailable
from pocketlm.runtime.threads import check_threads
from pocketlm.terminal_text import count, print


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `pocketlm doctor`."""
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="default: the installed ones and the GGUF files of this folder"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: the number of physical cores")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Find out, and print. Exit status 0: also where there is something to change; 1: a model that was named is none."""
    facts = examine([find_model(name) for name in arguments.models], check_threads(arguments.threads))
    print(json.dumps(_plain(facts), indent=1) if arguments.json else describe(facts))
    return int(any(fit.problem for fit in facts.fits if arguments.models))


def examine(paths: list[Path], n_threads: int) -> Facts:
    """All about this machine; half a second."""
    paths = paths or models.at_hand(Path())
    level, problem = "", ""
    try:
        level = levels.detect().name
    except (NativeUnavailable, PocketlmError) as error:
        problem = str(error)
    memory = memory_of()
    speed = memory_speed(n_threads, memory.free)
    fits = tuple(models.fit(path, memory.free, speed, n_threads) for path in paths)
    first = next((fit.path for fit in fits if not fit.problem), Path(sys.executable))
    file = max((path for path in paths if path.is_file()), key=lambda path: path.stat().st_size, default=first)
    return Facts(board(), health(), memory, storage(file), storage_speed(file), level, problem, n_threads, speed, fits)


def describe(facts: Facts) -> str:
    """The facts and the advice for a person."""
    what = facts.board
    cores = ", ".join(f"{count} × {name}" if count else name for name, count in what.cores.items())
    code = f"code for {facts.level}" if facts.level else "no compiled code"
    rows = [
        ("machine", f"{what.model or 'unknown'}; {what.machine}, {what.bits} bits; {sys.platform}"),
        ("processor", f"{cores}; {count(facts.threads, 'thread')}, {code}"),
        ("speed", _speed(facts)),
        ("memory", _memory(facts)),
        ("heat, power", _health(facts)),
        ("storage", _storage(facts)),
    ]
    lines = [f"{name:<12} {value}" for name, value in rows if value]
    if facts.fits:
        lines += ["", f"{'model':<40} {'reads/token':>11} {'needs':>8} {'context':>8}  predicted"]
        lines += map(_fit, facts.fits)
    found = advice(facts)
    lines += ["", *(f"- {text}" for text in found)] if found else ["", "Nothing to change."]
    return "\n".join(lines)


def _speed(facts: Facts) -> str:
    parts = [f"memory is read at {facts.memory_speed / 1e9:.1f} GB/s" if facts.memory_speed else ""]
    if facts.health.megahertz:
        parts.append("{} MHz now, {} at most".format(*facts.health.megahertz))
    parts.append(f"governor {facts.health.governor}" if facts.health.governor else "")
    return ", ".join(filter(None, parts))


def _memory(facts: Facts) -> str:
    memory = facts.memory
    sizes = (("in all", memory.total), ("free", memory.free), ("left of a limit", memory.limit), ("swap", memory.swap),
             ("compressed swap (zram)", memory.zram))  # fmt: skip
    parts = [f"{size // MB} MB {name}" for name, size in sizes if size is not None]
    return ", ".join([*parts, f"pages of {memory.page // 1024} KB"])


def _health(facts: Facts) -> str:
    state = facts.health
    heat = f"{state.celsius:.0f} °C" if state.celsius is not None else ""
    if state.now is None:
        return heat
    now = f"now: {', '.join(state.now)}" if state.now else "nothing holds the processor back"
    return "; ".join(filter(None, (heat, now, f"since the start: {', '.join(state.before)}" if state.before else "")))


def _storage(facts: Facts) -> str:
    speed = f"{facts.storage_speed / 1e6:.0f} MB/s" if facts.storage_speed else ""
    return ", ".join(filter(None, (facts.storage, speed)))


def _fit(fit: models.Fit) -> str:
    if fit.problem:
        return f"{fit.path.name:<40} {fit.problem}"
    speed = f"{fit.tokens_per_second:.0f} tokens/s" if fit.tokens_per_second else ""
    context = str(fit.n_ctx) if fit.n_ctx else "no room"
    sizes = f"{size_text(fit.read):>11} {size_text(fit.needs):>8}"
    return f"{fit.path.name:<40} {sizes} {context:>8}  {speed if fit.n_ctx else ''}".rstrip()


def _plain(facts: Facts) -> dict[str, Any]:
    return {**dataclasses.asdict(facts, dict_factory=_values), "advice": advice(facts)}


def _values(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else sorted(value) if isinstance(value, frozenset) else value
            for name, value in pairs}  # fmt: skip
