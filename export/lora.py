"""Merges a LoRA (arXiv:2106.09685) into the checkpoint it was trained on: W + scale · B A, tensor by tensor as they are read.

In: a model, and the folder of an adapter as PEFT writes it (`adapter_config.json`, `adapter_model.safetensors` or `.bin`).
Out: the model with the sums. Names in the adapter are the checkpoint's own; in a model file they are found by their roles,
and the adapter's base is taken for Hugging Face's form of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pocketlm.errors import FileError, quoted
from pocketlm.export.arrays import LazyTensor
from pocketlm.export.canonical import CanonicalModel
from pocketlm.export.checkpoint import Checkpoint, open_checkpoint, read_json
from pocketlm.export.dialects import role_of

FILES = ("adapter_model.safetensors", "adapter_model.bin")
UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "layer_replication")


class Pair(NamedTuple):
    """The two factors of a change: A [rank, in], B [out, rank]."""

    a: LazyTensor
    b: LazyTensor


def merge(model: CanonicalModel, folder: Path) -> CanonicalModel:
    """The model with the adapter added. Raises FileError where they do not fit, naming what does not."""
    assert model.remake, "every reader says how"
    scale, transposed, pairs = _read(folder)

    def change(checkpoint: Checkpoint) -> Checkpoint:
        return replace(
            checkpoint, tensors={**checkpoint.tensors, **_changed(checkpoint.tensors, pairs, scale, transposed, folder)}
        )

    merged = model.remake(change)
    return replace(merged, notes=[*merged.notes, f"{len(pairs)} tensors were changed by the LoRA {folder.name}"])


def _read(folder: Path) -> tuple[float, bool, dict[str, Pair]]:
    """The factor, whether the base's matrices are (in, out), and the pairs by the base's names."""
    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise FileError(folder, "is no LoRA: adapter_config.json says otherwise", "merge it with PEFT and export the result")
    if asked := [name for name in UNSUPPORTED if config.get(name)] or [
        name for name in ("bias",) if config.get(name, "none") != "none"
    ]:
        raise FileError(
            folder, f"the adapter uses {asked[0]}, which pocketlm does not merge", "merge it with PEFT and export the result"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise FileError(folder, "adapter_config.json lacks r or lora_alpha", "export the adapter again")
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise FileError(folder, f"holds no {FILES[0]}", "name the folder of the adapter")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scale, bool(config.get("fan_in_fan_out")), _pairs(open_checkpoint(file).tensors, folder)


def _pairs(tensors: Mapping[str, LazyTensor], folder: Path) -> dict[str, Pair]:
    halves: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        parts = name.replace(".default.", ".").split(".")  # PEFT's name for an adapter without one
        kind = {"lora_A": "a", "lora_B": "b"}.get(parts[-2] if len(parts) > 1 else "")
        if kind is None or parts[-1] != "weight":
            raise FileError(
                folder,
                f"its tensor {quoted(name)} is no part of a LoRA pocketlm merges",
                "merge it with PEFT and export the result",
            )
        halves.setdefault(".".join(parts[:-2]).removeprefix("base_model.model."), {})[kind] = tensor
    lonely = [name for name, pair in halves.items() if len(pair) != 2]
    if lonely:
        raise FileError(folder, f"one of the two matrices for {quoted(lonely[0])} is missing", "export the adapter again")
    return {name: Pair(**pair) for name, pair in halves.items()}


def _changed(
    tensors: Mapping[str, LazyTensor], pairs: Mapping[str, Pair], scale: float, transposed: bool, folder: Path
) -> dict[str, Any]:
    """The changed tensors by their names in the base."""
    changed = {}
    for name, (a, b) in pairs.items():
        own = [f"{name}.weight", f"model.{name}.weight", f"{name.removeprefix('model.')}.weight"]
        base = next((tensors[n] for n in (*own, role_of(own[0]) or "") if n in tensors), None)
        if base is None:
            raise FileError(
                folder,
                f"it changes {quoted(name)}, which the checkpoint does not have",
                "name the checkpoint it was trained on",
            )
        turned = transposed and base.name in own  # a model file's are not
        if (
            len(a.shape) != 2
            or len(b.shape) != 2
            or a.shape[0] != b.shape[1]
            or _shape(base, turned) != (b.shape[0], a.shape[1])
        ):
            raise FileError(
                folder, f"its matrices for {quoted(name)} do not fit the checkpoint's", "name the checkpoint it was trained on"
            )
        changed[base.name] = replace(
            base, read=lambda base=base, a=a, b=b, turned=turned: _sum(base, a, b, scale, turned), source=(base.source, name)
        )
    return changed


def _shape(base: LazyTensor, transposed: bool) -> tuple[int, ...]:
    return base.shape[::-1] if transposed else base.shape


def _sum(base: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float, transposed: bool) -> np.ndarray:
    change = (b.read() @ a.read()) * np.float32(scale)
    return base.read() + (change.T if transposed else change)
