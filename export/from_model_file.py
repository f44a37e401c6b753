"""A model file as something to export again: requantisation of a GGUF, and the way from a GGUF to the other containers.

In: a GGUF or an fp16 bin. Out: a `CanonicalModel` that keeps every key of the file. Knows no checkpoints.
"""

from __future__ import annotations

from pathlib import Path

from pocketlm.errors import FileError
from pocketlm.export.canonical import CanonicalModel, CanonicalTensor
from pocketlm.runtime.fp16_bin import is_fp16_bin
from pocketlm.runtime.gguf import GGUF
from pocketlm.runtime.hyper import read_hyper
from pocketlm.runtime.model_file import open_model


def is_model_file(path: Path) -> bool:
    """Whether this is a GGUF or an fp16 bin, by its first bytes or the names in it."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return is_fp16_bin(path)


def read_model_file(path: Path) -> CanonicalModel:
    """The model in a GGUF or an fp16 bin. Raises FileError where there is none, or none that pocketlm runs."""
    opened = open_model(path)
    if "token_embd.weight" not in opened.tensors:
        raise FileError(path, "it holds a vocabulary but no model", "name a file with weights")
    hyper = read_hyper(opened.metadata, opened.tensors["token_embd.weight"].shape[0], path)
    tensors = {name: CanonicalTensor(tensor.shape, tensor.to_float32) for name, tensor in opened.tensors.items()}
    formats = sorted({tensor.format.name for tensor in opened.tensors.values()} - {"F32", "F16", "BF16"})
    notes = [f"{path.name} was quantised already ({', '.join(formats)}): what that lost stays lost"] if formats else []
    return CanonicalModel(hyper, tensors, dict(opened.metadata), "GGUF" if isinstance(opened, GGUF) else "fp16 bin", notes)
