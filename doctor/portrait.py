"""What a model is and where it runs, in sentences for a person: `pocketlm inspect` shows them.

In: a model file. Out: lines: what it is, the memory it takes at several contexts, how fast it can be, and
which Raspberry Pi it fits. Estimates from the header; nothing is run.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from pathlib import Path

from pocketlm.doctor.models import fit
from pocketlm.doctor.resources import memory_speed
from pocketlm.runtime.executors import memory_needed
from pocketlm.runtime.memory import MIB, available_bytes
from pocketlm.runtime.model_file import open_model
from pocketlm.runtime.plan import read_plan
from pocketlm.runtime.threads import check_threads
from pocketlm.terminal_text import count

CONTEXTS = (512, 4096)  # beside the longest that the model is made for
PIS = (1, 2, 4, 8)  # GB
PI_SHARE = 0.9  # of a board's memory, what its firmware and graphics leave
PI_SYSTEM = 150 * MIB  # what its system takes without a desktop
PI_SPEEDS = {"Pi 4": 3.8e9, "Pi 5": 9e9}  # bytes a second from memory
PI_THREADS = 4


def portrait(path: Path) -> list[str]:
    """The lines, with the speed of this machine's memory; one that says why, where pocketlm does not run the model."""
    n_threads = check_threads(None)
    return portrait_with(path, n_threads, memory_speed(n_threads, available_bytes()))


def portrait_with(path: Path, n_threads: int, bytes_per_second: float) -> list[str]:
    """The lines for a machine of these threads whose memory gives so many bytes a second."""
    here = fit(path, None, bytes_per_second, n_threads)
    if here.problem:
        return [f"pocketlm does not run it: {here.problem}"]
    with open_model(path) as file:
        plan = read_plan(file.metadata, file.tensors, path)
        hyper = plan.hyper

        def needs(n_ctx: int, threads: int = n_threads) -> int:
            return sum(memory_needed(plan, file.tensors, n_ctx, threads))

        contexts = sorted({min(n_ctx, hyper.n_ctx) for n_ctx in (*CONTEXTS, hyper.n_ctx)})
        sizes = ", ".join(f"{size_text(needs(n_ctx))} with {n_ctx:,} tokens of context" for n_ctx in contexts)
        boards = [f"{size} GB {_longest(size, hyper.n_ctx, lambda n_ctx: needs(n_ctx, PI_THREADS))}" for size in PIS]
        experts = sum(file.tensors[name].data.nbytes for name in plan.experts)
        does = "holds conversations" if "tokenizer.chat_template" in file.metadata else "continues texts"
    speeds = {"here": bytes_per_second, **{f"on a {name}": speed for name, speed in PI_SPEEDS.items()}}
    most = ", ".join(f"{speed / here.read:.0f} {where}" for where, speed in speeds.items())
    layers = count(hyper.n_layer, "layer")
    return [
        f"It {does}: {hyper.architecture}, {layers}, {hyper.n_embd} wide, made for {hyper.n_ctx:,} tokens.",
        f"Memory: {sizes}{_beside(experts)}.",
        f"Tokens a second, at most: {most} (each reads {size_text(here.read)} of weights).",
        f"Raspberry Pi without a desktop: {', '.join(boards)}.",
    ]


def _beside(experts: int) -> str:
    size = size_text(experts)
    return f"; {size} of experts beside that, which are read from the file where they do not fit" if experts else ""


def _longest(size: int, n_ctx: int, needs: Callable[[int], int]) -> str:
    """Up to which context a model fits a board of `size` GB."""
    free = int(PI_SHARE * size * 1024 * MIB) - PI_SYSTEM
    if needs(n_ctx) <= free:
        return "yes"
    longest = 64 * bisect.bisect_right(range(64, n_ctx, 64), free, key=needs)
    return f"up to {longest:,} tokens" if longest else "no"


def size_text(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.{1 if n_bytes < 1e7 else 0}f} MB"
