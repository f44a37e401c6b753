"""The two files of a batch: prompts that are read, and answers that are kept whatever happens.

In: paths, lines. Out: the lines that are still to be answered; at the end, one file with the answers in order. Until then they
are kept, as they come, in a part file beside it. Its name has a hash of everything the answers depend on, so that the same
command continues there. Knows no model, and of a line only its number.
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from pocketlm.batch.lines import Line, Written
from pocketlm.errors import FileError, refused
from pocketlm.runtime.atomic import lock_file, rename_to_free, replacing_file
from pocketlm.serve.guard import MAX_BODY

BLOCK = 1 << 20
BOM = b"\xef\xbb\xbf"  # with which some editors begin a file
MOST_ANSWER = 1 << 30  # bytes of a line; longer ones are none of ours
_NUMBERED = re.compile(rb'\{"line": (\d{1,15}), .*\}\n', re.DOTALL)
# a link that somebody put in its place would lead to a file that is cut off
_KEPT = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
_ERROR = b', "error": {'  # cannot stand inside a JSON text, which writes \" for "


def _state(file: BinaryIO) -> tuple[int, ...]:
    """What tells whether a file was written to, or is another."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns, found.st_ino


class Prompts:
    """A file of prompts, with `n_lines` lines of which `n_blank` are blank. Raises FileError if it cannot be read."""

    def __init__(self, path: Path):
        if path.is_fifo():
            raise FileError(path, "is a pipe, and prompts are read more than once", "write them to a file, and name that")
        self._path, self._digest, self.n_lines, self.n_blank = path, hashlib.blake2b(digest_size=16), 0, 0
        ended, blank = True, False  # the line before, and what there is of this one
        with refused(path, "check the path"), path.open("rb") as file:
            self._state, self._size = _state(file), 0
            while data := file.readline(BLOCK):  # a line, or a piece of one
                self._size += len(data)
                self._digest.update(data)
                self.n_lines += ended
                blank = data.isspace() and (blank or ended)
                ended = data.endswith(b"\n")
                self.n_blank += blank and ended
        self.n_blank += blank and not ended
        self._may_grow = ended

    def key(self, *made_of: Any) -> str:
        """12 hexadecimal digits, a hash of the file's content and of `made_of`."""
        return hashlib.blake2b(repr((self._digest.hexdigest(), *made_of)).encode(), digest_size=6).hexdigest()

    def __iter__(self) -> Iterator[Line]:
        """All lines that are not blank. Raises FileError where they are others than were counted; more of them are left out."""
        with refused(self._path, "check the path"), self._path.open("rb") as file:
            for number in range(1, self.n_lines + 1):
                data = file.readline(MAX_BODY + 1)
                if _state(file) != self._state:
                    self._check(file)
                if len(data.removesuffix(b"\n")) > MAX_BODY:
                    while data and not data.endswith(b"\n"):
                        data = file.readline(BLOCK)
                    yield Line(number, None)
                elif data := data.removeprefix(BOM if number == 1 else b"").strip():
                    yield Line(number, data)

    def _check(self, file: BinaryIO) -> None:
        """FileError where the file does not begin with what was counted."""
        at, state, digest, left = file.tell(), _state(file), hashlib.blake2b(digest_size=16), self._size
        file.seek(0)
        while data := file.read(min(left, BLOCK)):
            digest.update(data)
            left -= len(data)
        if digest.digest() != self._digest.digest() or (state[0] > self._size and not self._may_grow):
            advice = "give the same command again; with the text that it had, that goes on where it was"
            raise FileError(self._path, "was changed while its lines were answered", advice)
        file.seek(at)
        self._state = state


def _is_there(target: Path) -> FileError:
    return FileError(target, "is there already", "take it away, or choose another name for the answers")


def _place(whole: Path, target: Path) -> None:
    """Never replace a file that was put there meanwhile, such as another run's answers. These then stay in the part file."""
    try:
        rename_to_free(whole, target)
    except FileExistsError:
        raise _is_there(target) from None


class Answers:
    """The answers to `n_lines` lines, for a `with` statement. Raises FileError.

    `add` appends one to `target`.KEY.part; `finish` writes `target` from that. The part file survives a kill, a full disk or a
    power cut; only a last line that is incomplete is lost.
    """

    def __init__(self, target: Path, key: str, n_lines: int):
        if target.exists():
            raise _is_there(target)
        self._target, self._part = target, target.with_name(f"{target.name}.{key}.part")
        self._starts = array("q", [-1]) * (n_lines + 1)  # where in the part the answer to a line starts
        self.n_done = self.n_errors = 0
        with self._kept():
            self._handle = os.open(self._part, _KEPT, 0o666)
        try:
            with self._kept():
                if not lock_file(self._handle, 0.0):
                    raise FileError(self._part, "another run is writing these answers", "wait until it ends")
                self._size = self._take_stock()
                os.ftruncate(self._handle, self._size)
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        empty = not os.fstat(self._handle).st_size  # not `_size`: Ctrl-C may have come between a write and its note
        os.close(self._handle)
        if empty:
            with suppress(OSError):
                self._part.unlink()

    def __contains__(self, number: int) -> bool:
        return self._starts[number] >= 0

    def add(self, written: Written) -> None:
        """Append the output for a line to the part file."""
        left = memoryview(written.data)
        with self._kept():
            while left:
                left = left[os.write(self._handle, left) :]
        self._note(written.number, written.data)

    def finish(self) -> None:
        """Write `target`, all answers in the order of the lines, and empty the part file."""
        with replacing_file(self._target, self._size, _place) as path, path.open("wb") as out, self._part.open("rb") as kept:
            for start in self._starts:
                if start >= 0:
                    kept.seek(start)
                    out.write(kept.readline())
        os.ftruncate(self._handle, 0)  # `__exit__` takes the part away

    def _kept(self) -> AbstractContextManager[None]:
        """Turn errors of the system into a FileError that says the answers so far are kept."""
        advice = "mend that and give the same command again: the answers so far are kept"
        return refused(self._part, advice, "cannot be written")

    def _take_stock(self) -> int:
        """Index the answers in the part file; the bytes they take. Anything behind them is the half line of a killed run."""
        size = self._size = 0
        with self._part.open("rb") as file:
            while (data := file.readline(MOST_ANSWER)) and (found := _NUMBERED.fullmatch(data)):
                if not 0 < (number := int(found[1])) < len(self._starts):
                    break
                self._note(number, data)
                size = self._size
        return size

    def _note(self, number: int, data: bytes) -> None:
        self.n_done += self._starts[number] < 0
        self.n_errors += self._starts[number] < 0 and _ERROR in data
        self._starts[number] = self._size
        self._size += len(data)
