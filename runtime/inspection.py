"""What is in a model file, as plain data and as text. Knows the container, not what the tensors mean."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.runtime.gguf import GGUF
from pocketlm.runtime.model_file import open_model, size_of

LONGEST = 100  # characters of a value that are shown


def inspect(path: Path, tensors: bool = False) -> dict[str, Any]:
    """Facts about a GGUF or an fp16 bin: kind, bytes, parameters, formats, metadata, tensors if asked.

    Long arrays are given as their length.
    """
    with open_model(path) as file:
        n_weights = sum(math.prod(t.shape) for t in file.tensors.values())
        n_bytes = sum(t.data.nbytes for t in file.tensors.values())
        facts: dict[str, Any] = {
            "file": str(path), "kind": f"GGUF v{file.version}" if isinstance(file, GGUF) else "fp16 bin",
            "bytes": size_of(path),
            "parameters": n_weights, "bits_per_weight": round(8 * n_bytes / n_weights, 3) if n_weights else None,
            "formats": dict(Counter(t.format.name for t in file.tensors.values()).most_common()),
            "metadata": {key: _plain(value) for key, value in file.metadata.items()},
        }  # fmt: skip
        if tensors:
            facts["tensors"] = [
                {"name": t.name, "shape": list(t.shape), "format": t.format.name, "offset": t.offset, "bytes": t.data.nbytes}
                for t in file.tensors.values()
            ]
    return facts


def describe(facts: Mapping[str, Any]) -> str:
    """The facts as lines for a person."""
    formats = ", ".join(f"{name} x{count}" for name, count in facts["formats"].items())
    weights = f"{facts['parameters']:,} parameters, {facts['bits_per_weight']} bits per weight ({formats})"
    lines = [
        f"{facts['file']}: {facts['kind']}, {facts['bytes'] / 1e6:.1f} MB",
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


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return f"[{len(value)} strings]"
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()] if value.size <= 16 else f"[{value.size} numbers]"
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN


def _line(value: Any) -> str:
    """One line without control characters: a file from a stranger must not write escape sequences to a terminal."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text)} characters)"
