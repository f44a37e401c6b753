"""Whether a file is whole, and which part of it is not: a packed executable, or a model file.

In: a path. Out: a line for every part, with a verdict. It reads executables that do not start any more, too. Knows no command
line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pocketlm.build.archive_reader import damaged_entries
from pocketlm.errors import FileError, PocketlmError
from pocketlm.runtime import container
from pocketlm.runtime.container import TITLES, Packed
from pocketlm.runtime.gguf_reader import GGUF
from pocketlm.runtime.memory import release_pages
from pocketlm.runtime.model_file import open_model, size_of
from pocketlm.runtime.tensor import check_finite

WHOLE = "whole"


class Part(NamedTuple):
    """A part of a file: its name, how long it should be, and WHOLE or what is wrong with it."""

    name: str
    n_bytes: int
    verdict: str

    @property
    def is_whole(self) -> bool:
        return self.verdict == WHOLE

    def line(self) -> str:
        return f"{self.name:<24} {self.n_bytes:>15,} bytes  {self.verdict}"


def parts_of(path: Path) -> list[Part]:
    """The parts of an executable or a model file. Raises FileError for a file that is neither."""
    return list(_of_executable(path) if container.is_program(path) else _of_model(path))


def _of_executable(path: Path) -> Iterator[Part]:
    try:
        packed = container.find(path)
    except FileError:
        packed = None
    packed = packed or container.search(path)
    if packed is None:
        advice = "if it is an executable that pocketlm packed, more than a part of it is damaged: get it again"
        raise FileError(path, "holds no list of its parts", advice)
    size, wrong = path.stat().st_size, packed.damaged()
    for name, section in sorted(packed.sections.items(), key=lambda row: row[1].offset):
        if name not in TITLES:
            continue
        verdict = WHOLE
        if section.end > size:
            verdict = f"cut short: {max(size - section.offset, 0):,} bytes of it are there"
        elif name == "header":
            verdict = WHOLE if _is_readable(packed, name) else "damaged"
        elif name in wrong:
            verdict = "damaged" + (_in_archive(path) if name == "program" else "")
        yield Part(TITLES[name], section.length, verdict)


def _is_readable(packed: Packed, name: str) -> bool:
    try:
        packed.read(name)
    except FileError:
        return False
    return True


def _in_archive(path: Path) -> str:
    try:
        names = damaged_entries(path)
    except FileError:
        return ": its table"
    return f": {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else ""


def _of_model(path: Path) -> Iterator[Part]:
    """A model file has no checksums: its vocabulary must be readable, its weights finite. FileError: another kind of file."""
    from pocketlm.tokenizer import from_metadata

    with open_model(path) as opened:
        wrong = None
        for tensor in opened.tensors.values():
            try:
                check_finite(tensor)
            except PocketlmError as error:
                wrong = wrong or _problem(error)
            release_pages(tensor.data)
        vocabulary = WHOLE
        try:
            if "tokenizer.ggml.model" in opened.metadata:  # some are run with ids alone
                from_metadata(opened.metadata, path)
        except PocketlmError as error:
            vocabulary = _problem(error)
        n_bytes = sum(tensor.data.nbytes for tensor in opened.tensors.values())
        kind = "GGUF" if isinstance(opened, GGUF) else "fp16 bin"
        yield Part(f"keys of the {kind}", size_of(path) - n_bytes, vocabulary)
        yield Part(f"{len(opened.tensors)} tensors", n_bytes, wrong or WHOLE)


def _problem(error: PocketlmError) -> str:
    return error.problem if isinstance(error, FileError) else str(error)
