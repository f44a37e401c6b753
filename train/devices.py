"""Where a run computes: its processes, its device, and what that device cannot do. Knows no data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Its functions have the process group of the moment as a default argument. Imported later, by PyTorch's optimisers, it would
# keep that group and its threads until the interpreter ends: now and then "terminate called without an active exception".
import torch.distributed.nn.functional

from pocketlm.errors import PocketlmError, UsageError
from pocketlm.terminal_text import count, print
from pocketlm.train.decoder import Decoder
from pocketlm.train.presets import Settings

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA and MPS, Linux, Windows


@dataclass(frozen=True)
class Ranks:
    """The processes of one run (torchrun's), and where this one computes."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value added up over all processes."""
        if self.size == 1:  # Apple's GPUs have no float64
            return [*values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def add_up(self, tensors: Iterable[torch.Tensor | None]) -> None:
        """Replace each tensor by its sum over all processes."""
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor)

    def say(self, text: str) -> None:
        if self.leads:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Joins the other processes where torchrun started this one. Raises UsageError for a device that is not there."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and size > 1:
        kind = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        place = torch.zeros(1, device=kind).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {kind}: {str(error).splitlines()[0][:120]}") from None
    if size > 1:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Ranks(int(os.environ.get("RANK", "0")), size, place)
    finally:
        if size > 1:
            dist.destroy_process_group()


def dtype_here(dtype: str, device: torch.device) -> str:
    """The precision of a preset, which was chosen for its author's GPU, on this device."""
    if device.type != "cuda":
        return "fp32"
    return "fp16" if dtype == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False) else dtype


def compiled(model: Decoder, settings: Settings, ranks: Ranks, must: bool) -> Any:
    """The model behind torch.compile, tried on one micro batch; itself, with one line said, where there is no compiler or the
    GPU is too old for it. `must`: that is an error, PocketlmError.
    """
    if not settings.compile:
        return model
    fast = torch.compile(model.train())
    try:
        with torch.autocast(ranks.device.type, AUTOCAST.get(settings.dtype), settings.dtype in AUTOCAST):
            fast(torch.zeros(settings.micro_batch, settings.context, dtype=torch.int64, device=ranks.device)).mean().backward()
        return fast
    except Exception as error:  # whatever the compilers under it raise
        if any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        inner = getattr(error, "inner_exception", error)
        problem = next((line for line in str(inner).splitlines() if line.strip()), type(inner).__name__)[:200]
        if must:
            raise PocketlmError(f"--compile: {problem}") from None
        ranks.say(f"training without torch.compile, which is slower: {problem}")
        return model
    finally:
        model.zero_grad(set_to_none=True)


@contextmanager
def memory_errors(settings: Settings, ranks: Ranks) -> Iterator[None]:
    """Turn errors of memory into a PocketlmError that says what would fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        smaller = [n for n in range(1, settings.micro_batch) if settings.batch % (n * ranks.size) == 0]
        others = [] if settings.checkpointing else ["--checkpointing"]
        others += [] if settings.optimizer == "adamw8bit" else ["--optimizer adamw8bit"]
        advice = f"--micro-batch {smaller[-1]}" if smaller else " or ".join(others) or "a smaller --context"
        where = f"{count(settings.micro_batch, 'sequence')} of {count(settings.context, 'token')} at once"
        raise PocketlmError(f"out of memory on {ranks.device} with {where}: try {advice}") from None
