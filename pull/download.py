"""A file from a server onto the disk: resumed, checked, and in place only when it is whole.

In: a `Remote`, a path, who wants to know how far it is. Out: the file. Knows what HTTP promises and that servers lie.

What has come lies in `NAME.<beginning of its SHA-256>.part` beside the target until the last byte is there and the SHA-256 is
right. It outlives a lost connection, Ctrl-C and a power cut; the next call goes on where it ends.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pocketlm.errors import FileError, PocketlmError
from pocketlm.pull.hub import BROKEN, Remote, reason, request
from pocketlm.runtime.atomic import lock_file

PAUSES = (1, 2, 4, 8)  # seconds before the next try, as long as no byte comes
CHUNK = 1 << 18

Progress = Callable[[int], object]  # is told how many bytes are there


def download(remote: Remote, target: Path, sha256: str, progress: Progress = lambda n: None) -> None:
    """Fetch the file to `target`, unless it is there. Raises PocketlmError, one line, also for another SHA-256."""
    part, ours = target.with_name(f"{target.name}.{sha256[:12]}.part"), False
    try:
        if target.is_file() and target.stat().st_size == remote.n_bytes:
            with open(target, "rb") as file:
                if _fill(file, remote, remote.n_bytes, progress) == sha256:
                    return
        with open(part, "a+b", opener=_opened) as file:
            if not lock_file(file.fileno(), 0.0):
                raise PocketlmError(f"{target.name} is being fetched by another program")
            ours = True
            have = file.seek(0, os.SEEK_END)
            if have > remote.n_bytes:
                have = _restart(file)
            if remote.n_bytes - have > (free := shutil.disk_usage(target.parent).free):
                problem = f"needs {(remote.n_bytes - have) / 1e6:.0f} MB where {free / 1e6:.0f} MB are free"
                raise FileError(target, problem, "make room, or name another place with -o")
            digest = _fill(file, remote, have, progress)
            if digest != sha256:
                _restart(file)
                raise FileError(target.name, "what came is not this file (its SHA-256 differs)", "nothing was kept; try again")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        raise FileError(target, f"cannot be written ({error.strerror or error})", "what has come is kept") from None
    finally:
        with suppress(OSError):
            if ours and part.stat().st_size == 0:
                part.unlink()


def sweep(target: Path) -> None:
    """Take away what came of other files that were to be `target`: of another quantisation, or of an older one."""
    for part in target.parent.glob(f"{target.name}.*.part"):
        with suppress(OSError):
            with open(part, "rb") as file:
                is_free = lock_file(file.fileno(), 0.0)  # nobody fetches it
            if is_free:
                part.unlink()


def _opened(part: str, flags: int) -> int:
    """The part's file, if it is this user's alone: in a folder of all, a link or a file under its name may be a trap.

    On a drive without owners (FAT) all files are those of one user, as the folder is; who owns that can do as he likes anyway.
    """
    advice = "delete it, or name another place with -o"
    if os.path.islink(part):
        raise FileError(part, "is a link in the place of a part of the file", advice)
    owner = os.stat(os.path.dirname(part) or ".").st_uid
    handle = os.open(part, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    found = os.fstat(handle)
    is_ours = found.st_uid == owner or found.st_uid == os.geteuid()  # Windows says 0 of all
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or not is_ours:
        os.close(handle)
        raise FileError(part, "is no part of the file that this user has fetched", advice)
    return handle


def _fill(file: Any, remote: Remote, have: int, progress: Progress) -> str:
    """Write what is missing; returns the SHA-256 of it all."""
    digest, tries = hashlib.sha256(), 0
    file.seek(0)
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    while have < remote.n_bytes:
        before, why = have, "the server ended it"
        try:
            with request(remote.url, have) as response:
                start = _start(response, have, remote)
                if start != have:
                    digest, have = hashlib.sha256(), _restart(file)
                while chunk := response.read(min(CHUNK, remote.n_bytes - have + 1)):
                    have += len(chunk)
                    if have > remote.n_bytes:
                        _restart(file)
                        raise PocketlmError(f"the server sends more than the {remote.n_bytes:,} bytes that it announced")
                    _write(file, chunk)
                    digest.update(chunk)
                    progress(have)
        except _Full as full:
            raise full.error from None
        except BROKEN as error:
            why = reason(error)
        tries = 0 if have > before else tries + 1
        if have < remote.n_bytes:
            if tries > len(PAUSES):
                done = f"{have / 1e6:.1f} of {remote.n_bytes / 1e6:.1f} MB"
                raise PocketlmError(f"the connection is lost at {done} ({why}); the same command goes on from there")
            time.sleep(PAUSES[max(tries, 1) - 1])
    return digest.hexdigest()


class _Full(Exception):
    """The disk refused; unlike what a connection ends with, it is not tried again."""

    def __init__(self, error: OSError):
        self.error = error


def _write(file: Any, chunk: bytes) -> None:
    try:
        file.write(chunk)
    except OSError as error:
        raise _Full(error) from None


def _start(response: Any, have: int, remote: Remote) -> int:
    """Where the body that comes begins in the file. Raises PocketlmError for one that cannot be this file's."""
    start = 0
    if response.status == 206:
        said = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not said or int(said[1]) != have:
            raise PocketlmError("the server sends another part of the file than it was asked for")
        start = have
    length = response.headers.get("Content-Length", "")
    if length.isdigit() and int(length) != remote.n_bytes - start:
        announced = f"{int(length) + start:,} bytes where {remote.n_bytes:,} were announced"
        raise PocketlmError(f"the server means to send {announced}; try again later")
    return start


def _restart(file: Any) -> int:
    file.truncate(0)
    file.seek(0)
    return 0
