"""What is in a checkpoint, as the same plain facts that runtime/inspection.py gives of a model file. Nothing in it is run."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.export.arrays import DTYPES
from pocketlm.export.checkpoint import open_checkpoint


def inspect_checkpoint(path: Path, tensors: bool = False) -> dict[str, Any]:
    """Kind, bytes, parameters, dtypes, configuration, tensors if asked. Raises FileError for what cannot be read safely."""
    checkpoint = open_checkpoint(path)
    sizes = {name: math.prod(t.shape) * np.dtype(DTYPES[t.dtype][0]).itemsize for name, t in checkpoint.tensors.items()}
    n_weights = sum(math.prod(t.shape) for t in checkpoint.tensors.values())
    facts: dict[str, Any] = {
        "file": str(path), "kind": "checkpoint", "bytes": sum(file.stat().st_size for file in checkpoint.files),
        "parameters": n_weights, "bits_per_weight": round(8 * sum(sizes.values()) / n_weights, 3) if n_weights else None,
        "formats": dict(Counter(t.dtype for t in checkpoint.tensors.values()).most_common()),
        "metadata": {key: json.loads(json.dumps(value, default=str)) for key, value in checkpoint.config.items()},
    }  # fmt: skip
    if tensors:
        facts["tensors"] = [
            {"name": name, "shape": list(t.shape), "format": t.dtype, "bytes": sizes[name]}
            for name, t in checkpoint.tensors.items()
        ]
    return facts
