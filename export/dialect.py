"""What a code base calls the parts of its models and what it means by them: one row of the table in dialects.py.

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
    """A model on its way to its architecture: tensors by role, keys without the architecture's name, options of hyper.py."""

    architecture: str  # "" while it is the one that describes the options best
    tensors: dict[str, CanonicalTensor]
    keys: dict[str, Any]
    options: dict[str, Any]
    config: ModelConfig

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key-value heads, their width."""
        return tuple(self.keys[f"attention.{name}"] for name in ("head_count", "head_count_kv", "key_length"))  # type: ignore[return-value]


@dataclass(frozen=True)
class Dialect:
    """`signs`: expressions that must each match a name (`N`: a number). `fixed`: settings its code never changes.

    `transposed`: its matrices are stored (in, out), as Conv1D's. `names`: a tensor's name, without what wraps the model and
    without .weight, → its role, where it means something else here than elsewhere; "*." before it, or ".*" behind it, is a
    layer, "#3" behind a role for one head, or expert, of several that are modules of their own; `N` in a name, with "#N" behind
    the role, for the number of each. `computes`: entries of a configuration that are refused elsewhere. `guess`: what shapes
    tell where there is no configuration. `finish` brings tensors and keys into the architecture's form. `template`: the chat
    template that its code has built in.
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
        """The role of a tensor that has a meaning of its own here."""
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
