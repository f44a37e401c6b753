"""Which kind of model file a path is, and how it is opened. Knows no contents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pocketlm.errors import FileError
from pocketlm.runtime.fp16_bin_reader import Fp16Bin, is_fp16_bin, open_fp16_bin
from pocketlm.runtime.gguf_reader import GGUF, open_gguf

if TYPE_CHECKING:
    from pocketlm.runtime.container import Packed


def open_model(path: str | Path) -> GGUF | Fp16Bin:
    """A GGUF file, an fp16 bin or a packed executable, opened and checked. Raises FileError, saying what else it may be."""
    path = Path(path)
    if not path.is_dir():
        return _open_packed(path) or open_gguf(path)
    if not is_fp16_bin(path):
        advice = "name the GGUF file, or convert a checkpoint with pocketlm export"
        raise FileError(path, "is a folder without config.json and weights.bin", advice)
    return open_fp16_bin(path)


def _open_packed(path: Path) -> GGUF | None:
    """The model in a packed executable, checked up to its weights; None for other files."""
    from pocketlm.runtime import container

    packed = container.find(path) if container.is_program(path) else None
    return packed and open_packed(packed)


def open_packed(packed: Packed) -> GGUF:
    """The model in a packed executable, checked up to its weights. Raises FileError."""
    packed.read("header")
    model = packed.sections["model"]
    return open_gguf(packed.path, offset=model.offset, length=model.length)


def size_of(path: str | Path) -> int:
    """Bytes of a model on disk, of a folder all its files."""
    path = Path(path)
    return sum(entry.stat().st_size for entry in path.iterdir()) if path.is_dir() else path.stat().st_size
