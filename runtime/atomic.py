"""Outputs that appear whole or not at all: written under another name beside the target, then renamed.

Knows paths only. Whatever happens before the last line, a full disk, Ctrl-C, a signal, a killed process, leaves what was there.
"""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from pocketlm.errors import FileError, UsageError, refused
from pocketlm.signals import handled

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux's renameat2
STALE_SECONDS = 3600  # a part that nobody has written to for so long was left by a process that was killed


@contextmanager
def replacing_file(target: Path, n_bytes: int = 0, rename: Callable[[Path, Path], None] = os.replace) -> Iterator[Path]:
    """The path to write to; becomes `target` when the block ends well, and disappears when it does not.

    `n_bytes`: about how much will be written; refused at once where the disk has less. Raises FileError for anything
    that the operating system refuses, and what `rename` raises.
    """
    target = _real(target)
    check_file(target)
    with _part_of(target, n_bytes) as part:
        yield part
        _sync(part)
        rename(part, target)
        _sync(target.parent)


def rename_to_free(source: Path, target: Path) -> None:
    """Rename, but never over a file: FileExistsError."""
    if os.name == "nt":
        return os.rename(source, target)  # which refuses there to replace a file
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(target, os.O_CREAT | os.O_EXCL, 0o600))
        os.replace(source, target)
    with suppress(OSError):
        os.unlink(source)


def write_file(target: Path, content: str | bytes) -> None:
    """Write bytes, or a text in UTF-8, whole or not at all. Raises FileError."""
    with replacing_file(target) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing_folder(target: Path, files: Sequence[str], n_bytes: int = 0) -> Iterator[Path]:
    """`replacing_file` for a folder, which the block makes. An old one may hold nothing but `files`: others are the user's."""
    target = _real(target)
    with _refused(target):
        if target.exists() and not target.is_dir():
            raise FileError(target, "is there already and is not a folder", "choose another name for the output")
        if target.exists() and (others := sorted({entry.name for entry in target.iterdir()} - set(files))):
            raise FileError(target, f"is there already and holds {others[0]}", "choose a new folder for the output")
    with _part_of(target, n_bytes) as part:
        yield part
        for path in part.iterdir():
            _sync(path)
        _sync(part)
        if target.exists():
            _exchange(part, target)
            shutil.rmtree(part)
        else:
            part.rename(target)
        _sync(target.parent)


def lock_file(handle: int, seconds: float) -> bool:
    """Waits for the system's lock on an open file, which goes with the process; False when it takes longer than `seconds`.
    True as well where the file's system knows no locks.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            if sys.platform == "win32":
                import msvcrt

                os.lseek(handle, 1 << 40, os.SEEK_SET)  # a byte that nobody reads: Windows lets no one else read a locked one
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):  # somebody has it: how POSIX and Windows say so
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        except OSError:
            return True


def _real(target: Path) -> Path:
    try:
        with suppress(OSError):
            os.lstat(target)  # Windows' realpath takes any name
        return Path(os.path.realpath(target))
    except ValueError as error:  # a name with a zero byte
        raise FileError(target, f"cannot be written ({error})") from None


def _refused(target: Path) -> AbstractContextManager[None]:
    """A name that is too long, or in a folder that this user may not enter, as a FileError."""
    return refused(target, "choose another name for the output", "cannot be written")


def _look_at(path: Path) -> None:
    """Raises PermissionError where this user may not: exists() and is_dir() of Python 3.14 would say that there is nothing."""
    try:
        path.stat()
    except PermissionError:
        raise
    except (OSError, ValueError):
        pass


def check_file(target: Path) -> None:
    """Raises FileError if there is something else than a file at `target`."""
    with _refused(target):
        _look_at(target)
        if target.exists() and not stat.S_ISREG(target.stat().st_mode):
            raise FileError(target, "is there already and is not a file", "choose another name for the output")


def check_plain(paths: Iterable[Path], advice: str) -> None:
    """Raises FileError for a link among the files that will be written: of a folder from a stranger it may lead to a file of
    this user's. So for what is neither a file nor a folder.
    """
    for path in paths:
        if path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir()):
            raise FileError(path, "is a link, or no file, and would be written to", advice)


def check_room(target: Path, n_bytes: int) -> None:
    """Raises FileError where there is no folder for `target`, or its disk has less than `n_bytes`."""
    with _refused(target):
        _look_at(target.parent)
        if not target.parent.is_dir():
            raise FileError(target, "its folder does not exist", "make the folder first")
        free = shutil.disk_usage(target.parent).free
    if n_bytes > free:
        raise FileError(target, f"needs {n_bytes / 1e6:.1f} MB where {free / 1e6:.1f} MB are free", "make room")


def check_other(target: Path, sources: Iterable[Path]) -> None:
    """Raises UsageError if `target` is one of the files it is made from, or the folder of one: it would be lost."""
    for path in (place for source in sources for place in (source, source.parent)):
        if target.exists() and path.exists() and target.samefile(path):
            raise UsageError(f"-o {target} is where the input is; name another output")


@contextmanager
def _part_of(target: Path, n_bytes: int) -> Iterator[Path]:
    """What is written first. Where the block fails, it is taken away, and the system's errors become one line."""
    check_room(target, n_bytes)
    _sweep(target)
    # a name of this call's own: another thread may be writing to the same target, or another container's process 1
    part = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        with handled(_ends(), lambda number, _: sys.exit(128 + number)):  # else the part, of gigabytes maybe, stays
            yield part
    except OSError as error:
        advice = "the old one is unchanged" if os.path.lexists(target) else "make room, or choose another folder"
        raise FileError(target, f"cannot be written ({error.strerror or error})", advice) from None
    finally:
        _remove(part)  # gone already where all went well


def _ends() -> list[int]:
    """The signals that end a process, where nobody has said otherwise."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]


def _sweep(target: Path) -> None:
    """Take away the parts of processes that were killed while they wrote to `target`."""
    for part in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        with suppress(OSError):
            entries = [part, *part.iterdir()] if part.is_dir() else [part]
            if time.time() - max(entry.stat().st_mtime for entry in entries) > STALE_SECONDS:
                _remove(part)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until the disk holds it; without this, a power cut after the rename could leave an empty file."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    # Windows syncs only what is open for writing, and takes a Ctrl-Z from the end of what is not opened as binary
    number = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _exchange(new: Path, old: Path) -> None:
    """Let the two folders change names: in one step on Linux, else in three, of which the first can be undone."""
    if sys.platform == "linux":
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if rename and rename(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0:
            return
    aside = old.with_name(f"{new.name}.old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)
