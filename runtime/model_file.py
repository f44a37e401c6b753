"""Which kind of model file a path is, and how it is opened. Knows no contents."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from pocketlm.errors import FileError
from pocketlm.runtime.file_mapping import MappedModel
from pocketlm.runtime.fp16_bin_reader import is_fp16_bin, open_fp16_bin
from pocketlm.runtime.gguf_reader import GGUF, open_gguf

if TYPE_CHECKING:
    from pocketlm.runtime.container import Packed

MAX_PARTS = 1000
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})")  # what a part of several is called before its ending: NAME-00001-of-00003


def open_model(path: str | Path) -> MappedModel:
    """A GGUF file, an fp16 bin or a packed executable, opened and checked. Raises FileError, saying what else it may be."""
    path = Path(path)
    if not path.is_dir():
        from pocketlm.runtime import container

        packed = container.find(path) if container.is_program(path) else None
        return open_packed(packed) if packed else _open_parts(path)
    if not is_fp16_bin(path):
        if (path / "config.json").is_file():
            raise FileError(path, "is a folder with a config.json, perhaps Hugging Face's", "convert it with pocketlm export")
        advice = "name the GGUF file, or convert a checkpoint with pocketlm export"
        raise FileError(path, "is a folder without config.json and weights.bin", advice)
    return open_fp16_bin(path)


def begins_as_one(path: Path) -> bool:
    """Whether a file begins as GGUFs or programs do; what is in it `open_model` says."""
    from pocketlm.runtime import container

    return container.beginning(path) == b"GGUF" or container.is_program(path)


def parts_of(path: Path) -> list[Path]:
    """The files of a GGUF that lies in several, as llama.cpp names them, whichever is named; the path alone where it is no
    part.
    """
    named = PART.fullmatch(path.stem) if path.suffix == ".gguf" else None
    n = int(named[3]) if named else 0
    if not named or not 1 <= int(named[2]) <= n <= MAX_PARTS:
        return [path]
    return [path.with_name(f"{named[1]}-{i:05d}-of-{named[3]}.gguf") for i in range(1, n + 1)]


def _open_parts(path: Path) -> GGUF:
    """A GGUF file with the tensors of all its parts. FileError: a part is missing, or of another model."""
    paths = parts_of(path)
    if len(paths) == 1 or not path.exists():
        whole = open_gguf(path)
        if isinstance(n := whole.metadata.get("split.count"), int) and n > 1:  # what is put together again has 0
            whole.close()
            names = f"give all parts their names, which end in -00001-of-{n:05d}.gguf and so on"
            raise FileError(path, f"is one of {n} parts, under another name", names)
        return whole
    if missing := [part.name for part in paths if not part.exists()]:
        raise FileError(path, f"is one of {len(paths)} parts, and {missing[0]} is not beside it", "put all parts in one folder")
    first = open_gguf(paths[0])
    try:
        for number, part in enumerate(paths):
            if number:
                first.parts.append(open_gguf(part))
            keys = first.parts[-1].metadata if number else first.metadata
            if (keys.get("split.no"), keys.get("split.count")) != (number, len(paths)):
                raise FileError(part, f"is not part {number + 1} of {len(paths)}", "download all parts again")
        for opened in first.parts:
            if twice := first.tensors.keys() & opened.tensors.keys():
                raise FileError(opened.path, f"holds {min(twice)}, as another part does", "download all parts again")
            first.tensors.update(opened.tensors)
        if len(first.tensors) != first.metadata.get("split.tensors.count", len(first.tensors)):
            count = first.metadata["split.tensors.count"]
            raise FileError(paths[0], f"the parts hold {len(first.tensors)} of {count} tensors", "download all parts again")
    except BaseException as error:
        first.close(error)
        raise
    return first


def open_packed(packed: Packed) -> GGUF:
    """The model in a packed executable, checked up to its weights. Raises FileError."""
    packed.read("header")
    model = packed.sections["model"]
    return open_gguf(packed.path, offset=model.offset, length=model.length)


def size_of(path: str | Path) -> int:
    """Bytes of a model on disk, of a folder all its files."""
    path = Path(path)
    return sum(entry.stat().st_size for entry in (path.iterdir() if path.is_dir() else parts_of(path)))
