"""What is in a model file, as plain data and as text. Knows the container, not what the tensors mean."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.runtime.gguf_reader import GGUF
from pocketlm.runtime.model_file import open_model, size_of
from pocketlm.runtime.tensor import Tensor

# tables that the positions are computed with
ROPE_FACTORS = {"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"}
LONGEST = 100  # characters of a value that are shown
DEEPEST = 32  # levels of nested values that are shown
MOST = 16  # values of an array that are shown


def inspect(path: Path, tensors: bool = False) -> dict[str, Any]:
    """Facts about a GGUF, an fp16 bin or the model in a packed executable. Raises FileError for what is none of them."""
    from pocketlm.runtime.container import is_program

    with open_model(path) as file:
        kind = f"GGUF v{file.version}" if isinstance(file, GGUF) else "fp16 bin"
        rows = [
            {"name": t.name, "shape": list(t.shape), "format": t.format.name, "offset": t.offset, "bytes": t.data.nbytes}
            for t in file.tensors.values()
        ]
        kind = f"packed executable of a {kind}" if is_program(path) else kind
        return facts_of(path, kind, size_of(path), rows, not_learnt(file.tensors), file.metadata, tensors)


def not_learnt(tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of tensors that are no parameters: biases of zeros, which the architecture gpt2 has to have, and rotary factors."""
    return frozenset(
        name
        for name, tensor in tensors.items()
        if name in ROPE_FACTORS or (name.endswith(".bias") and len(tensor.shape) == 1 and not tensor.data.any())
    )


def count_parameters(tensors: Mapping[str, Tensor]) -> int:
    """Parameters of a model as `export` counts those of a checkpoint."""
    others = not_learnt(tensors)
    return sum(math.prod(tensor.shape) for name, tensor in tensors.items() if name not in others)


def facts_of(
    path: Path, kind: str, n_bytes: int, rows: list[dict[str, Any]], others: Set[str], metadata: Mapping[str, Any],
    tensors: bool,
) -> dict[str, Any]:  # fmt: skip
    """Kind, bytes, parameters, formats and metadata as plain data, and the rows if asked for.

    `rows`: name, shape, format and bytes of every tensor; `others`: the names of those that are no parameters. Long arrays in
    the metadata are given as their length.
    """
    n_weights = sum(math.prod(row["shape"]) for row in rows if row["name"] not in others)
    n_bits = 8 * sum(row["bytes"] for row in rows)
    return {
        "file": str(path), "kind": kind, "bytes": n_bytes, "parameters": n_weights,
        "bits_per_weight": round(n_bits / n_weights, 3) if n_weights else None,
        "formats": dict(Counter(row["format"] for row in rows).most_common()),
        "metadata": {key: _plain(value) for key, value in metadata.items()},
        **({"tensors": rows} if tensors else {}),
    }  # fmt: skip


def describe(facts: Mapping[str, Any]) -> str:
    """The facts as lines for a person."""
    formats = ", ".join(f"{name} x{count}" for name, count in facts["formats"].items())
    weights = f"{facts['parameters']:,} parameters, {facts['bits_per_weight']} bits per weight ({formats})"
    lines = [
        f"{_line(facts['file'])}: {facts['kind']}, {facts['bytes'] / 1e6:.1f} MB",
        weights if formats else "no tensors",
        "",
    ]
    lines += [f"{_line(key):<44} {_line(value)}" for key, value in facts["metadata"].items()]
    if "tensors" in facts:
        lines.append("")
        lines += [
            f"{_line(t['name']):<32} {t['format']:<6} {'x'.join(map(str, t['shape'])):>14} {t['bytes']:>12,} bytes"
            for t in facts["tensors"]
        ]
    return "\n".join(lines)


def _plain(value: Any, depth: int = 0) -> Any:
    if depth > DEEPEST:
        return "…"
    if isinstance(value, dict):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, np.ndarray | list):
        if len(value) > MOST:
            return f"[{len(value)} {'strings' if isinstance(value[0], str) else 'numbers'}]"
        return [_plain(item, depth + 1) for item in (value.tolist() if isinstance(value, np.ndarray) else value)]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN


def _line(value: Any) -> str:
    """One line, of what can be seen."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text)} characters)"
