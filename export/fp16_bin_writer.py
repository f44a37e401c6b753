"""Writes the fp16 bin: a folder that a small program in any language can read. README.md of this folder has the layout.

In: a `CanonicalModel` and its keys. Out: `config.json`, `vocab.json` and `weights.bin` in a folder that exists.
`runtime/fp16_bin_reader.py` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.export.canonical import CanonicalModel
from pocketlm.export.tensor_encoder import Encoded, Encoder
from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.fp16_bin_reader import CONFIG, FORMAT_NAME, VOCAB, VOCAB_KEYS, WEIGHTS


def write_fp16_bin(folder: Path, metadata: Mapping[str, Any], model: CanonicalModel, encoder: Encoder) -> list[Encoded]:
    """Write the three files; returns what was written for every tensor. FileError: a weight is too large for float16."""
    done, entries = [], []
    with open(folder / WEIGHTS, "wb") as file:
        for name, tensor in model.tensors.items():
            entries.append({"name": name, "shape": list(tensor.shape), "offset": file.tell()})
            done.append(encoder.write(file, name, tensor, FORMATS["F16"], "export a GGUF"))
    vocabulary = {key: _plain(metadata[name]) for name, key in VOCAB_KEYS.items() if name in metadata}
    config = {
        "format": FORMAT_NAME,
        "version": 1,
        "hyper": asdict(model.hyper),
        "metadata": {key: _plain(value) for key, value in metadata.items() if key not in VOCAB_KEYS},
        "tensors": entries,
    }
    for name, content in ((CONFIG, config), (VOCAB, vocabulary)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return done


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
