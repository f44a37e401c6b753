"""A dialect: the names that a code base gives to the parts of its models, and what its code fixes; a row in dialects.py.

Knows no code base by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pocketlm.export.arrays import LazyTensor
from pocketlm.export.canonical import CanonicalTensor
from pocketlm.export.model_config import ModelConfig

Tensors = Mapping[str, LazyTensor]


@dataclass
class Draft:
    """A model being arranged: tensors by role, keys without the architecture's name in front, options of hyper.py."""

    architecture: str  # "": the one that describes the options is chosen at the end
    tensors: dict[str, CanonicalTensor]
    keys: dict[str, Any]
    options: dict[str, Any]
    config: ModelConfig

    @property
    def heads(self) -> tuple[int, int, int]:
        """n_head, n_kv_head, head_dim."""
        return tuple(self.keys[f"attention.{name}"] for name in ("head_count", "head_count_kv", "key_length"))  # type: ignore[return-value]


@dataclass(frozen=True)
class Dialect:
    """How a code base writes its checkpoints.

    `signs`: regular expressions, each of which must match the name of a tensor (`N`: any number). `test`: a further condition.
    `fixed`: settings that its code never changes. `transposed`: matrices are stored (in, out), as in Conv1D.
    `names`: a tensor's name → its role, where the general spellings of dialects.py would not do. Names are without wrappers and
    without ".weight"; "*." in front stands for "in every layer", ".*" behind for "a list with one per layer". "#3" behind a
    role means head or expert number 3, where each is a tensor of its own; `N` in the name and "#N" behind the role, each of
    them. `computes`: entries of a configuration that this dialect handles and others refuse. `guess`: settings that the shapes
    tell where there is no configuration. `finish` brings tensors and keys into the architecture's form. `template`: the chat
    template that is built into its code.
    """

    name: str
    signs: tuple[str, ...]
    fixed: dict[str, Any] = field(default_factory=dict)
    transposed: bool = False
    test: Callable[[Tensors], bool] = lambda tensors: True
    architecture: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    computes: tuple[str, ...] = ()
    guess: Callable[[Tensors], Mapping[str, Any]] = lambda tensors: {}
    finish: Callable[[Draft], None] = lambda draft: None
    template: str = ""

    def role_of(self, name: str) -> str | None:
        """The role that `names` gives to a tensor; None for names that it does not have."""
        stem, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, suffix = name, "weight"
        if match := re.fullmatch(r"(?:\w+\.)*?(?:layers|h|blocks)\.(\d+)\.(.+)", stem):
            role = self.names.get(f"*.{match[2]}")
            if role is None and (number := re.search(r"\.(\d+)\.", match[2])):
                role = self.names.get(f"*.{match[2].replace(number[0], '.N.', 1)}", "").replace("#N", f"#{int(number[1])}")
            role, mark, head = (role or "").partition("#")
            return f"blk.{int(match[1])}.{role}.{suffix}{mark}{head}" if role else None
        parent, _, last = stem.rpartition(".")
        if last.isdecimal() and (role := self.names.get(f"{parent.rpartition('.')[2]}.*")):  # a list of one for each layer
            return f"blk.{int(last)}.{role}.{suffix}"
        role = self.names.get(last)
        return f"{role}.{suffix}" if role else None
