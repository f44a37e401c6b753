"""What a model is called, and what it is recognised by.

In: an open model file's metadata and tensors. Out: a name for people, a fingerprint for programs. Reads a few kilobytes of
the weights, however large the file is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketlm.runtime.tensor import Tensor

SAMPLED = 48  # tensors of which bytes are read: half a second on a hard disk, which seeks for each

# What trainers write into names: marks of a run, two of which make a label ("8k Lc100K Mix1 Ep2"), and what makes one alone.
_MARK = re.compile(r"(?<![a-z])(?:ep|mix|lr|bs|lc|wd|seed|run|loss)[-_ =]?\d", re.IGNORECASE)
_LABEL = re.compile(
    r"(?<![a-z])(?:ckpt|checkpoint|global_?step|(?:steps?|iter|epochs?)[-_ =]?\d)|\b[0-9a-f]{12,}\b", re.IGNORECASE
)
_FORMAT = re.compile(r"[-._](?:I?Q\d\w*|B?F16|FP16|F32|FP32|INT8)$", re.IGNORECASE)


def readable_name(metadata: Mapping[str, Any], path: Path) -> str:
    """What the file calls its model; the file's own name, without its format, where that is nothing or a training label."""
    name = metadata.get("general.name")
    if isinstance(name, str) and name.strip() and not (_LABEL.search(name) or len(_MARK.findall(name)) > 1):
        return name
    return _FORMAT.sub("", path.stem) or path.stem


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """32 hexadecimal digits: the same for the same weights in the same formats, whatever the file and the model are called.

    Hashes names, shapes and formats of all tensors, and samples of the bytes of SAMPLED tensors. A packed executable, whose
    matrices are tiled, has the fingerprint of its GGUF.
    """
    total = hashlib.sha256()
    names = sorted(tensors)
    for name in names:
        tensor = tensors[name]
        total.update(f"{name} {tensor.shape} {tensor.format.name}\n".encode())
    for i in range(min(SAMPLED, len(names))):
        total.update(tensors[names[i * len(names) // min(SAMPLED, len(names))]].sample())
    return total.hexdigest()[:32]
