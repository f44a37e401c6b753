"""Checkpoints of a run: `last.pt` to go on from, `best.pt` to use. Written whole or not at all; read without running code."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pocketlm.errors import FileError, UsageError
from pocketlm.runtime.atomic import replacing_file
from pocketlm.train.decoder import Decoder
from pocketlm.train.presets import Shape

LAST, BEST = "last.pt", "best.pt"


def save(path: Path, model: Decoder, **more: Any) -> None:
    """The weights, their shape, and what else is given (optimiser, step, …)."""
    with replacing_file(path) as part:
        torch.save({"model": model.state_dict(), "model_config": asdict(model.shape), **more}, part)


def read(path: Path) -> dict[str, Any]:
    """What `save` wrote. Raises FileError for anything else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {**content, "shape": Shape(**content["model_config"])}
    except OSError as error:
        raise FileError(path, f"cannot be read ({error.strerror or error})", "check the path") from None
    except Exception:  # whatever a damaged or foreign file makes torch raise
        raise FileError(path, "is no checkpoint of this trainer", "name the last.pt or best.pt of a run") from None


def add_rows(content: dict[str, Any], first: int, n_vocab: int) -> dict[str, Any]:
    """The checkpoint for `n_vocab` tokens, of which those from `first` on are new: their rows of the token table, and of an
    output matrix of its own, are drawn near the mean of the others, a tenth as far apart.
    """
    dice, weights = torch.Generator().manual_seed(first), dict(content["model"])
    for name in ("tok_emb.weight", "head.weight"):
        if name in weights:
            old = weights[name][:first].float()
            drawn = torch.randn((n_vocab - first, old.shape[1]), generator=dice) * old.std(0) / 10 + old.mean(0)
            weights[name] = torch.cat([weights[name][:first], drawn.to(weights[name].dtype)])
    return {**content, "model": weights, "shape": replace(content["shape"], n_vocab=n_vocab)}


def build(content: dict[str, Any], context: int, dropout: float, rope_theta: float = 0.0) -> Decoder:
    """The model of a checkpoint, for at least `context` positions. Raises UsageError where it has a table of fewer."""
    old: Shape = content["shape"]
    if old.position == "learned" and context > old.n_ctx:
        raise UsageError(f"--context {context}: the model has learned positions, for {old.n_ctx} tokens; give at most that")
    model = Decoder(replace(old, n_ctx=max(context, old.n_ctx), rope_theta=rope_theta or old.rope_theta), dropout)
    model.load_state_dict(content["model"])
    return model
