"""A LoRA (arXiv:2106.09685) added to the model it was trained on: W + scale · B A, tensor by tensor as they are read.

In: the folder of an adapter as PEFT writes it (`adapter_config.json`, `adapter_model.safetensors` or `.bin`) or MLX LM
(`adapters.safetensors`), or a checkpoint with the layers of textbooks (`NAME.lora.A` and `NAME.lora.B` beside
`NAME.linear.weight`, or alone) or of a model that PEFT has wrapped (`NAME.lora_A.default.weight`, …, `NAME.base_layer.weight`).
Out: a `Lora`, a function from a checkpoint to the merged one. Matrices are found by their names in the checkpoint. In a model
file they are found by their roles, on the assumption that the adapter was trained on Hugging Face's form of the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pocketlm.errors import FileError, quoted
from pocketlm.export.arrays import LazyTensor
from pocketlm.export.checkpoint import Checkpoint, open_checkpoint, read_json
from pocketlm.export.dialects import LORA, role_of

CONFIG, FILES, MLX_FILE = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin"), "adapters.safetensors"
UNSUPPORTED = (
    "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "arrow_config", "kasa_config", "use_bdlora",
)  # fmt: skip
# DoRA's length of each row of the sum (arXiv:2402.09353), as PEFT and MLX call it
MAGNITUDE = r"(.+)\.(?:lora_magnitude_vector(?:(?:\.\w+)?\.weight)?|m)"
# a tensor that was trained itself (`modules_to_save`, biases), or a token table with more rows; what stood there before it
OWN = (
    r"(?P<module>(?:(?!\.lora_).)+?)"
    r"(?:\.original_module|\.modules_to_save(?:\.(?!weight$|bias$)\w+)?|\.base_layer)?\.(?P<kind>weight|bias)"
)
WHOLE, BEFORE = ".modules_to_save.", ".original_module"
TABLE, HEAD = "token_embd.weight", "output.weight"
PLAIN_PATTERN = re.compile(r"([\w.^$-]|\\\.){1,200}")  # a regular expression without loops, and so without endless ones
# values of init_lora_weights with which PEFT leaves the base's weights alone; others subtract the initial product from them
BASE_AS_IT_IS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")


class Pair(NamedTuple):
    """The two factors of a change: A [rank, in], B [out, rank], and what B A is multiplied by. `magnitude`: see MAGNITUDE."""

    a: LazyTensor
    b: LazyTensor
    scale: float = 1.0
    magnitude: LazyTensor | None = None


@dataclass(frozen=True)
class Lora:
    """`pairs`: by the names of the matrices they change. `saved`: tensors that take the place of the base's, by their names."""

    path: Path
    pairs: dict[str, Pair]
    saved: dict[str, LazyTensor]

    @property
    def note(self) -> str:
        more = f", and {len(self.saved)} are its own" if self.saved else ""
        changed = "1 tensor was" if len(self.pairs) == 1 else f"{len(self.pairs)} tensors were"
        return f"{changed} changed by the LoRA {self.path.name}{more}"

    def __call__(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with the adapter merged. Raises FileError, naming the matrix, if they do not fit."""
        tensors = {}
        for name, tensor in checkpoint.tensors.items():
            stem, _, end = name.rpartition(".")
            own = stem.removesuffix(".linear").removesuffix(".base_layer")
            own = own if own in self.pairs else stem.removesuffix(BEFORE)
            if own != stem:
                tensors[f"{own}.{end}"] = replace(tensor, name=f"{own}.{end}")
            elif WHOLE not in name and not re.fullmatch(LORA, name) and _magnitude_of(name) not in self.pairs:
                tensors[name] = tensor
        tensors |= self._own(tensors)
        return replace(checkpoint, tensors={**tensors, **self._changed(tensors)})

    def _own(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """The tensors of `saved`, by their names in the base."""
        is_tied, own = not _has_head({**tensors, **self.saved}), {}
        for name, tensor in self.saved.items():
            base, role, is_role = _found(tensors, name), role_of(name), TABLE in tensors  # names are roles in a model file
            if is_role and role not in (TABLE, HEAD):
                raise FileError(
                    self.path, f"it replaces {quoted(name)}", "name the checkpoint it was trained on, no model file"
                )
            if base is None and role != HEAD:
                raise self._error(name, "which the checkpoint does not have")
            is_longer = not is_role and not is_tied and role in (TABLE, HEAD)  # of a vocabulary to which tokens were added
            if base and base.shape[is_longer:] != tensor.shape[is_longer:]:
                raise self._error(name, "with matrices that do not fit the checkpoint's")
            if base and role == TABLE and is_tied:  # it was trained apart from the output matrix
                at = HEAD if is_role else "lm_head.weight"
                own[at] = replace(base, name=at)
            at = base.name if base else HEAD if is_role else name
            own[at] = replace(tensor, name=at)
        return own

    def _changed(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """The merged tensors, by their names in the base."""
        changed = {}
        # Hugging Face's GPT-2 has its layers' matrices transposed; PEFT's fan_in_fan_out says so of the last one alone
        conv1d = any(name.endswith("attn.c_attn.weight") and t.shape[-1:] > t.shape[:1] for name, t in tensors.items())
        for name, pair in self.pairs.items():
            base = _found(tensors, f"{name}.weight")
            if base is None:
                raise self._error(name, "which the checkpoint does not have")
            role = role_of(f"{name}.weight")
            if role == TABLE and not _has_head(tensors):
                raise _not_merged(
                    self.path, "it changes the token table but not the output matrix, and the checkpoint has one for both"
                )
            turned = conv1d and role not in (TABLE, "position_embd.weight", HEAD)
            shape, sizes = base.shape[::-1] if turned else base.shape, (pair.a.shape, pair.b.shape)
            fits = all(len(size) == 2 for size in sizes) and shape == (pair.b.shape[0], pair.a.shape[1])
            if not fits or sizes[0][0] != sizes[1][1] or (pair.magnitude and pair.magnitude.shape != shape[:1]):
                raise self._error(name, "with matrices that do not fit the checkpoint's")
            changed[base.name] = replace(base, read=partial(_sum, base, pair, turned), source=(base.source, name))
        return changed

    def _error(self, name: str, problem: str) -> FileError:
        return FileError(self.path, f"it changes {quoted(name)}, {problem}", "name the checkpoint it was trained on")


def _found(tensors: Mapping[str, LazyTensor], name: str) -> LazyTensor | None:
    """The base's tensor that an adapter calls `name`."""
    names = (name, f"model.{name}", name.removeprefix("model."), role_of(name))
    return next((tensors[n] for n in names if n and n in tensors), None)


def _has_head(tensors: Mapping[str, LazyTensor]) -> bool:
    return HEAD in tensors or any(role_of(name) == HEAD for name in tensors)


def read_lora(path: Path, scale: float | None = None) -> Lora:
    """The adapter in a folder or a checkpoint. `scale`: what B A is multiplied by; None: what the adapter's configuration says.
    Raises FileError, also where neither says it.
    """
    if path.name in (*FILES, MLX_FILE) and (path.parent / CONFIG).is_file():
        path = path.parent
    if path.is_file() or (path.is_dir() and not (path / CONFIG).is_file()):
        return _without_config(path, path, scale)
    config = read_json(path / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise _not_merged(path, f"is no LoRA: {CONFIG} says otherwise")
    mlx = config.get("lora_parameters")
    names = (MLX_FILE,) if isinstance(mlx, dict) else FILES
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise FileError(path, f"holds no {names[0]}", "name the folder of the adapter")
    if isinstance(mlx, dict):
        if (kind := config.get("fine_tune_type", "lora")) not in ("lora", "dora"):
            raise FileError(
                path, f"is no LoRA: its fine_tune_type is {quoted(kind)}", "fuse it with mlx_lm.fuse and export that"
            )
        said = _number(mlx.get("scale"))
        return _without_config(path, file, said if scale is None else scale)
    if asked := next((name for name in UNSUPPORTED if config.get(name)), None):
        raise _not_merged(path, f"the adapter uses {asked}, which pocketlm does not merge")
    if (begun := config.get("init_lora_weights")) not in BASE_AS_IT_IS:
        raise _not_merged(path, f"its init_lora_weights is {quoted(begun)}, which changes the base, too")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(
        _number(alpha) and PLAIN_PATTERN.fullmatch(p) for p, alpha in patterns.items()
    ):
        raise _not_merged(path, "its alpha_pattern has other things than names of matrices with a number each")
    rank, alpha = config.get("r"), _number(config.get("lora_alpha"))
    if type(rank) is not int or not 0 < rank < 1e12 or alpha is None:
        raise FileError(path, f"{CONFIG} lacks r or lora_alpha", "export the adapter again")
    tensors = open_checkpoint(file).tensors
    if other := next((name for name in tensors if not re.fullmatch(f"{LORA}|{MAGNITUDE}|{OWN}", name)), None):
        raise _not_merged(path, f"its tensor {quoted(other)} is no part of a LoRA pocketlm merges")

    def scaled(name: str, pair: Pair) -> Pair:
        own, n = next((alpha for p, alpha in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), alpha), pair.a.shape[0]
        return pair._replace(scale=own / (math.sqrt(n) if config.get("use_rslora") else n) if scale is None else scale)

    pairs = {name: scaled(name, pair) for name, pair in _pairs(tensors, path).items()}
    if config.get("use_dora") and (lacking := next((name for name, pair in pairs.items() if pair.magnitude is None), None)):
        raise FileError(path, f"{CONFIG} says use_dora, but {quoted(lacking)} has no magnitudes", "save the adapter again")
    return Lora(path, pairs, _saved(tensors))


def _not_merged(path: Path, problem: str) -> FileError:
    return FileError(path, problem, "merge it with PEFT and export the result")


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e12
    return float(value) if is_number else None


def _without_config(path: Path, file: Path, scale: float | None) -> Lora:
    """The LoRA in a checkpoint."""
    tensors = open_checkpoint(file).tensors
    pairs = _textbook(tensors, path)
    if scale is None:
        advice = "give --lora-scale: alpha, or alpha / rank where its code divides by the rank"
        raise FileError(path, "does not say what its matrices are multiplied by", advice)
    pairs = {name: pair._replace(scale=scale) for name, pair in pairs.items()}
    return Lora(path, pairs, _saved({name: t for name, t in tensors.items() if WHOLE in name}))


def _saved(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors among `tensors` that take the place of the base's, by the base's names for them."""
    own = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(OWN, name)
        if found and not re.fullmatch(f"{LORA}|{MAGNITUDE}", name) and BEFORE not in name:
            own[f"{found['module']}.{found['kind']}"] = tensor
    return own


def _turned(tensor: LazyTensor) -> LazyTensor:
    return replace(tensor, shape=tensor.shape[::-1], read=lambda: tensor.read().T)


def _textbook(tensors: Mapping[str, LazyTensor], path: Path) -> dict[str, Pair]:
    """The pairs, with factors that are stored as A [in, rank] or B [rank, out] turned. The smaller dimension is the rank."""

    def upright(pair: Pair) -> Pair:
        a, b = pair.a, pair.b
        return pair._replace(a=a if a.shape[0] <= a.shape[1] else _turned(a), b=b if b.shape[1] <= b.shape[0] else _turned(b))

    return {name: upright(pair) for name, pair in _pairs(tensors, path).items()}


def _pairs(tensors: Mapping[str, LazyTensor], path: Path) -> dict[str, Pair]:
    """The two factors of every change among `tensors`, and its magnitudes where it has them."""
    halves: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(LORA, name):
            pair, half = halves.setdefault(found[1], {}), found[2].lower()
            if ".lora_embedding_" in name:  # of a lookup: the change is (B A) transposed
                half, tensor = "ab"[half == "a"], _turned(tensor)
            if half in pair:
                raise FileError(path, f"holds several LoRAs for {quoted(found[1])}", "merge one with PEFT and export that")
            pair[half] = tensor
    if not halves:
        raise FileError(path, "holds no LoRA", f"name a folder with {CONFIG}, or a checkpoint with .lora.A and .lora.B")
    for name, pair in halves.items():
        if sorted(len(half.shape) for half in pair.values() if all(half.shape)) != [2, 2]:
            raise FileError(path, f"the two matrices for {quoted(name)} are not both there", "save the adapter again")
    pairs = {name: Pair(pair["a"], pair["b"]) for name, pair in halves.items()}
    for name, tensor in tensors.items():
        if (matrix := _magnitude_of(name)) in pairs:
            pairs[matrix] = pairs[matrix]._replace(magnitude=tensor)
    return pairs


def _magnitude_of(name: str) -> str:
    """The matrix whose rows' lengths a tensor of this name holds; "" for other tensors."""
    found = re.fullmatch(MAGNITUDE, name)
    return found[1] if found else ""


def _sum(base: LazyTensor, pair: Pair, transposed: bool) -> np.ndarray:
    change = (pair.b.read() @ pair.a.read()) * np.float32(pair.scale)
    total = base.read() + (change.T if transposed else change)
    if pair.magnitude is None:
        return total
    factors = pair.magnitude.read() / np.linalg.norm(total, axis=0 if transposed else 1)
    return total * (factors if transposed else factors[:, None])
