"""What is in a checkpoint, as the same plain facts that runtime/model_summary.py gives of a model. Nothing in it is run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.export.arrays import DTYPES
from pocketlm.export.checkpoint import open_checkpoint
from pocketlm.export.dialects import not_parameters
from pocketlm.runtime.model_summary import facts_of


def inspect_checkpoint(path: Path, tensors: bool = False) -> dict[str, Any]:
    """Facts about a checkpoint, its configuration as the metadata. Raises FileError for what cannot be read safely."""
    checkpoint = open_checkpoint(path)
    rows = [
        {"name": name, "shape": list(t.shape), "format": t.dtype,
         "bytes": math.prod(t.shape) * np.dtype(DTYPES[t.dtype][0]).itemsize}
        for name, t in checkpoint.tensors.items()
    ]  # fmt: skip
    n_bytes = sum(file.stat().st_size for file in checkpoint.files)
    others = not_parameters(checkpoint.tensors)
    return facts_of(path, "checkpoint", n_bytes, rows, others, checkpoint.config, tensors)
