"""Checkpoints of a run: `last.pt` to go on from, `best.pt` to use, `step_000100.pt` to go back to.

Written whole or not at all; read without running code. What others wrote is starting_weights.py's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pocketlm.errors import FileError
from pocketlm.export.torch_reader import read_torch_zip
from pocketlm.export.zip_reader import STORED, read_zip
from pocketlm.runtime.atomic import replacing_file
from pocketlm.runtime.file_mapping import map_file, unmap
from pocketlm.train.decoder import Decoder
from pocketlm.train.presets import Cadence, Shape

LAST, BEST, NUMBERED = "last.pt", "best.pt", "step_{:06d}.pt"


def save(path: Path, model: Decoder, **more: Any) -> None:
    """The weights, their shape, and what else is given (optimiser, step, …)."""
    with replacing_file(path) as part, open(part, "wb") as file:
        try:
            torch.save({"model": model.state_dict(), "model_config": asdict(model.shape), **more}, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, of which PyTorch says what it did to its file
                raise error.__context__ from None
            raise


def read(path: Path) -> dict[str, Any]:
    """What `save` wrote. Raises FileError for anything else.

    It is looked at first: torch.load unpacks megabytes to gigabytes and, before 2.6, could be made to call something.
    """
    buffer = map_file(path)
    try:
        if any(entry.method != STORED for entry in read_zip(buffer, path).values()):
            raise ValueError
        read_torch_zip(buffer, path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {**content, "shape": Shape(**content["model_config"])}
    except Exception:  # whatever a damaged or foreign file makes torch raise
        raise FileError(path, "is no checkpoint of this trainer", "name the last.pt or best.pt of a run") from None
    finally:
        unmap(buffer)


def kept(step: int, cadence: Cadence) -> str:
    """Whether the checkpoint of a step has a name of its own: "for good", "for now" or ""."""
    if cadence.keep_every and step % cadence.keep_every == 0:
        return "for good"
    return "for now" if cadence.keep and step % cadence.eval_every == 0 else ""


@contextmanager
def keeping(run: Path, step: int, rolling: list[int], cadence: Cadence) -> Iterator[None]:
    """Around the saving of last.pt: give it a number too, where the step has one, and delete those that are too many.

    `rolling`: the steps of the checkpoints that may be deleted; brought up to date before the block, which saves it.
    """
    how, old = kept(step, cadence), []
    if how == "for now":
        rolling[:] = [*(n for n in rolling if n != step), step]
        rolling[:], old = rolling[-cadence.keep :], rolling[: -cadence.keep]
    yield
    if how:
        with replacing_file(run / NUMBERED.format(step)) as part:
            try:
                os.link(run / LAST, part)  # the next last.pt is another file
            except OSError:  # a file system without links
                shutil.copyfile(run / LAST, part)
    for n in old:
        (run / NUMBERED.format(n)).unlink(missing_ok=True)
