"""Which models are at hand, whether they fit, and how fast they can be at most.

In: paths of model files, the free memory and the speed of memory. Out: a `Fit` for each. Knows files and plans, no boards.

A token reads every matrix once (of a table of tokens only a row), so memory's speed divided by these bytes is the prediction.
Models that the processor's caches hold, whole or in part, are faster; processors that compute more slowly than they read are
slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pocketlm.errors import FileError, PocketlmError
from pocketlm.model import DEFAULT_CTX, INSTALLED, find_model
from pocketlm.pull.catalogue import CATALOGUE
from pocketlm.runtime.executors import memory_needed
from pocketlm.runtime.model_file import open_model
from pocketlm.runtime.plan import read_plan

_SHORTEST = 256  # tokens of context that are worth talking with


@dataclass(frozen=True)
class Fit:
    """A model on this machine. `n_ctx`: tokens of context that fit, at most `wanted`, the default; 0: it does not fit."""

    path: Path
    needs: int  # bytes with `n_ctx`, or with the shortest context where it does not fit
    n_ctx: int
    wanted: int
    read: int  # bytes of weights a token
    tokens_per_second: float | None  # predicted
    problem: str = ""  # why it cannot be opened


def at_hand(folder: Path) -> list[Path]:
    """The installed and the fetched models, and the GGUF files of a folder."""
    found = []
    for name in [*INSTALLED, *CATALOGUE]:
        try:
            found.append(find_model(name))
        except FileError:
            continue
    return found + sorted(folder.glob("*.gguf"))


def fit(path: Path, free: int | None, bytes_per_second: float | None, n_threads: int) -> Fit:
    """Whether the model runs in `free` bytes, without opening more than its header."""
    try:
        with open_model(path) as file:
            if not file.tensors:
                raise FileError(path, "it holds a vocabulary but no model")
            plan = read_plan(file.metadata, file.tensors, path)
            wanted = min(plan.hyper.n_ctx, DEFAULT_CTX)

            def needs(n_ctx: int) -> int:
                return sum(memory_needed(plan, file.tensors, n_ctx, n_threads))

            choices = [wanted, *(n for n in (2048, 1024, 512, _SHORTEST) if n < wanted)]
            n_ctx = next((n for n in choices if free is None or needs(n) <= free), 0)
            read = plan.bytes_per_token(file.tensors)
            return Fit(path, needs(n_ctx or choices[-1]), n_ctx, wanted, read, bytes_per_second and bytes_per_second / read)
    except PocketlmError as error:
        return Fit(path, 0, 0, 0, 0, None, str(error).removeprefix(f"{path}: "))
