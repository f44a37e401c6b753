"""A LoRA (arXiv:2106.09685) added to the model it was trained on: W + scale · B A, tensor by tensor as they are read.

In: the folder of an adapter as PEFT writes it (`adapter_config.json`, `adapter_model.safetensors` or `.bin`), or a checkpoint
with the layers of textbooks (`NAME.lora.A` and `NAME.lora.B` beside `NAME.linear.weight`, or alone) or of a model that PEFT has
wrapped (`NAME.lora_A.default.weight`, …, `NAME.base_layer.weight`). Out: a `Lora`, a function from a checkpoint to the merged
one. Matrices are found by their names in the checkpoint. In a model file they are found by their roles, on the assumption that
the adapter was trained on Hugging Face's form of the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pocketlm.errors import FileError, quoted
from pocketlm.export.arrays import LazyTensor
from pocketlm.export.checkpoint import Checkpoint, open_checkpoint, read_json
from pocketlm.export.dialects import LORA, role_of

CONFIG, FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
UNSUPPORTED = (
    "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "use_bdlora",
)  # fmt: skip
# values of init_lora_weights with which PEFT leaves the base's weights alone; others subtract the initial product from them
BASE_AS_IT_IS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")


class Pair(NamedTuple):
    """The two factors of a change: A [rank, in], B [out, rank]."""

    a: LazyTensor
    b: LazyTensor


@dataclass(frozen=True)
class Lora:
    """`pairs`: by the names of the matrices they change. `transposed`: the base's matrices are (in, out)."""

    path: Path
    scale: float
    transposed: bool
    pairs: dict[str, Pair]

    @property
    def note(self) -> str:
        return f"{len(self.pairs)} tensors were changed by the LoRA {self.path.name}"

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with the adapter merged. Raises FileError, naming the matrix, if they do not fit."""
        tensors = {}
        for name, tensor in checkpoint.tensors.items():
            stem, _, end = name.rpartition(".")
            own = stem.removesuffix(".linear").removesuffix(".base_layer")
            if own != stem and own in self.pairs:
                tensors[f"{own}.{end}"] = replace(tensor, name=f"{own}.{end}")
            elif not re.fullmatch(LORA, name):
                tensors[name] = tensor
        return replace(checkpoint, tensors={**tensors, **self._changed(tensors)})

    def _changed(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """The merged tensors, by their names in the base."""
        changed = {}
        for name, (a, b) in self.pairs.items():
            own = [f"{name}.weight", f"model.{name}.weight", f"{name.removeprefix('model.')}.weight"]
            base = next((tensors[n] for n in (*own, role_of(own[0]) or "") if n in tensors), None)
            if base is None:
                problem = f"it changes {quoted(name)}, which the checkpoint does not have"
                raise FileError(self.path, problem, "name the checkpoint it was trained on")
            turned = self.transposed and base.name in own  # a model file's are not
            shape = base.shape[::-1] if turned else base.shape
            if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or shape != (b.shape[0], a.shape[1]):
                problem = f"its matrices for {quoted(name)} do not fit the checkpoint's"
                raise FileError(self.path, problem, "name the checkpoint it was trained on")
            read = partial(_sum, base, a, b, self.scale, turned)
            changed[base.name] = replace(base, read=read, source=(base.source, name))
        return changed


def read_lora(path: Path, scale: float | None = None) -> Lora:
    """The adapter in a folder or a checkpoint. `scale`: what B A is multiplied by; None: what the adapter's configuration says.
    Raises FileError, also where neither says it.
    """
    if path.is_file() or (path.is_dir() and not (path / CONFIG).is_file()):
        tensors = open_checkpoint(path).tensors
        pairs = _textbook(tensors, path)
        if scale is None:
            advice = "give --lora-scale: alpha, or alpha / rank where its code divides by the rank"
            raise FileError(path, "does not say what its matrices are multiplied by", advice)
        transposed = any(
            re.search(r"attn\.c_attn(\.base_layer)?\.weight$", name) and t.shape[-1] > t.shape[0] for name, t in tensors.items()
        )
        return Lora(path, scale, transposed, pairs)
    config = read_json(path / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise FileError(path, f"is no LoRA: {CONFIG} says otherwise", "merge it with PEFT and export the result")
    asked = [name for name in UNSUPPORTED if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none")
    if asked:
        problem = f"the adapter uses {asked[0]}, which pocketlm does not merge"
        raise FileError(path, problem, "merge it with PEFT and export the result")
    if (begun := config.get("init_lora_weights")) not in BASE_AS_IT_IS:
        problem = f"its init_lora_weights is {quoted(begun)}, which changes the base, too"
        raise FileError(path, problem, "merge it with PEFT and export the result")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if (
        type(rank) is not int or not 0 < rank < 1e12
        or isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e12
    ):  # fmt: skip
        raise FileError(path, f"{CONFIG} lacks r or lora_alpha", "export the adapter again")
    file = next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        raise FileError(path, f"holds no {FILES[0]}", "name the folder of the adapter")
    tensors = open_checkpoint(file).tensors
    if other := next((name for name in tensors if not re.fullmatch(LORA, name)), None):
        problem = f"its tensor {quoted(other)} is no part of a LoRA pocketlm merges"
        raise FileError(path, problem, "merge it with PEFT and export the result")
    said = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Lora(path, said if scale is None else scale, bool(config.get("fan_in_fan_out")), _pairs(tensors, path))


def _textbook(tensors: Mapping[str, LazyTensor], path: Path) -> dict[str, Pair]:
    """The pairs, with factors that are stored as A [in, rank] or B [rank, out] turned. The smaller dimension is the rank."""

    def turned(tensor: LazyTensor, is_right: bool) -> LazyTensor:
        return tensor if is_right else replace(tensor, shape=tensor.shape[::-1], read=lambda: tensor.read().T)

    return {
        name: Pair(turned(a, a.shape[0] <= a.shape[1]), turned(b, b.shape[1] <= b.shape[0]))
        for name, (a, b) in _pairs(tensors, path).items()
    }


def _pairs(tensors: Mapping[str, LazyTensor], path: Path) -> dict[str, Pair]:
    """The two factors of every change among `tensors`."""
    halves: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(LORA, name):
            pair, half = halves.setdefault(found[1], {}), found[2].lower()
            if half in pair:
                raise FileError(path, f"holds several LoRAs for {quoted(found[1])}", "merge one with PEFT and export that")
            pair[half] = tensor
    if not halves:
        raise FileError(path, "holds no LoRA", f"name a folder with {CONFIG}, or a checkpoint with .lora.A and .lora.B")
    if lonely := [name for name, pair in halves.items() if sorted(len(half.shape) for half in pair.values()) != [2, 2]]:
        raise FileError(path, f"the two matrices for {quoted(lonely[0])} are not both there", "save the adapter again")
    return {name: Pair(**pair) for name, pair in halves.items()}


def _sum(base: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float, transposed: bool) -> np.ndarray:
    change = (b.read() @ a.read()) * np.float32(scale)
    return base.read() + (change.T if transposed else change)
