"""A file mapped into memory, read-only, and let go of when that is asked for.

In: a path. Out: the file's bytes as a mapping that NumPy arrays look at; the model that a reader finds in them. Windows neither
deletes nor overwrites a file that is mapped, so `close` unmaps. While an array still looks at the mapping that is impossible:
unmapped, it would read other memory or end the process. Then the mapping ends with the last such array. Knows no formats.
"""

from __future__ import annotations

import errno
import gc
import mmap
import os
import stat
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pocketlm.errors import FileError, refused
from pocketlm.runtime.gguf_strings import Buffer
from pocketlm.runtime.tensor import Tensor

Model = TypeVar("Model", bound="MappedModel")


def map_file(path: Path, instead: str = "") -> mmap.mmap | bytes:
    """The file as a read-only mapping, b"" for an empty one. Raises FileError; `instead`: what to name in place of a folder."""
    with refused(path, "check the path and the permissions", kinds=(OSError, ValueError, OverflowError)):
        try:
            if not stat.S_ISREG(mode := path.stat().st_mode):
                raise FileError(path, f"is {'a folder' if stat.S_ISDIR(mode) else 'a pipe or a device'}, not a file", instead)
            with open(path, "rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
        except FileNotFoundError:
            raise FileError(path, "there is no such file", "check the path") from None
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            problem = "does not fit into the memory that this program may have"
            raise FileError(path, problem, "allow it more (ulimit -v), or choose a smaller model") from None


class MappedModel:
    """An opened, checked model: path, metadata and tensors (in the file's order), which look at the mapped `buffer`.

    `metadata` maps keys to str, int, float, bool, 1-D NumPy arrays (arrays of numbers) and lists of str. After `close` there
    are no tensors; an array that was taken out of one stays valid and keeps the file mapped.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: dict[str, Tensor], buffer: Buffer):
        self.path, self.metadata, self.tensors, self.buffer = path, metadata, tensors, buffer

    def close(self, error: BaseException | None = None) -> None:
        """Unmap the file, as `unmap` does. Whoever shares `tensors` loses them, too. A second call does nothing."""
        self.tensors.clear()
        buffer, self.buffer = self.buffer, b""
        unmap(buffer, error)

    def __enter__(self: Model) -> Model:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)


def unmap(buffer: Buffer, error: BaseException | None = None) -> None:
    """Unmap what was mapped, at once or with the last array that looks at it; for bytes that are no mapping, nothing.

    `error`: the exception that ends the mapping's use. Its traceback keeps local variables alive, arrays among them, while it
    is handled; they are cleared here.
    """
    for forget in (lambda: None, lambda: _forget_variables(error), gc.collect):
        forget()
        try:
            if isinstance(buffer, mmap.mmap):
                buffer.close()
            return
        except BufferError:
            continue


def _forget_variables(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
