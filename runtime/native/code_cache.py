"""Compiled code kept in the user's cache folder.

In: a text that says all that the code depends on, and a function that compiles it. Out: bytes, from the folder if they are
there and can be trusted, else freshly made. Whatever is wrong with the folder, code is made again: a cache is never an
error. Knows nothing about what the bytes are.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from pocketlm.errors import PocketlmError, refused

KEPT = 64  # files, a level has 12; the oldest beyond that are removed
_SUFFIX = ".code"
_DIGEST_BYTES = 32


def cached(key_text: str, make: Callable[[], bytes]) -> bytes:
    """What `make()` returned for this key once, or returns now. Raises only what `make` raises."""
    content = kept(key_text)
    if content is None:
        content = make()
        keep(key_text, content)
    return content


def kept(key_text: str) -> bytes | None:
    """What was kept for this key; None where that is nothing, or cannot be trusted."""
    key, path = _place(key_text, make=False)
    return _read(path, key) if path else None


def keep(key_text: str, content: bytes) -> None:
    """Keep it, where there is a folder for that."""
    key, path = _place(key_text)
    if path:
        _write(path, _digest(key, content) + content)


def _place(key_text: str, make: bool = True) -> tuple[bytes, Path | None]:
    key, folder = hashlib.sha256(key_text.encode(errors="surrogateescape")).digest(), _trusted_folder(make)
    return key, folder / (key.hex() + _SUFFIX) if folder else None


def cache_folder() -> Path | None:
    """Where the cache belongs on this system (POCKETLM_CACHE overrides); None if the user has no home."""
    override = os.environ.get("POCKETLM_CACHE")
    if override:
        return Path(override)
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local, "pocketlm", "Cache") if local else None
    xdg = os.environ.get("XDG_CACHE_HOME")
    if xdg and os.path.isabs(xdg):  # the XDG specification: ignore relative paths
        return Path(xdg, "pocketlm")
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        return None
    return Path(home, "Library/Caches/pocketlm") if sys.platform == "darwin" else Path(home, ".cache", "pocketlm")


def kept_folder(name: str) -> Path:
    """A folder in the cache folder for files that are made or fetched once, some of which will be run. Raises PocketlmError."""
    trusted = _trusted_folder()
    if trusted is None:
        where = cache_folder()
        problem = f"{where} cannot be written, or others may write to it" if where else "there is no cache folder"
        raise PocketlmError(f"{problem}: no place for {name}; set POCKETLM_CACHE to a folder of your own")
    folder = trusted / name
    with refused(folder, "set POCKETLM_CACHE to another folder", "cannot be made"):
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _trusted_folder(make: bool = True) -> Path | None:
    """The folder, with `make` made where there is none; None if it cannot be used, or if others could put code into it."""
    folder = cache_folder()
    try:
        if folder is None:
            return None
        if make:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _is_ours(folder.stat(), stat.S_ISDIR) else None
    except OSError:
        return None


def _is_ours(status: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    """Whether it is of this kind, this user's, and writable by nobody else, which on Windows the profile's rights see to."""
    if not is_kind(status.st_mode):
        return False
    return sys.platform == "win32" or (status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _digest(key: bytes, content: bytes) -> bytes:
    """Covers the key too: a file renamed to another key's name is not taken for that one."""
    return hashlib.sha256(key + content).digest()


def _read(path: Path, key: bytes) -> bytes | None:
    """The content of a cache file; None unless it is whole and can only be ours."""
    try:
        with path.open("rb") as file:
            if not _is_ours(os.fstat(file.fileno()), stat.S_ISREG):
                return None
            data = file.read()
        content = data[_DIGEST_BYTES:]
        if data[:_DIGEST_BYTES] != _digest(key, content):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the newest are kept: the ones in use, not the ones made last
        return content
    except OSError:
        return None


def _write(path: Path, data: bytes) -> None:
    """Put the file in place in one step, so that another process sees all of it or nothing; and remove old ones."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _prune(path.parent)


def _prune(folder: Path) -> None:
    """Remove all but the newest files, left-over temporary ones among them. Where another process does, too, it may do it."""
    files = []
    with contextlib.suppress(OSError):
        files = [path for path in folder.iterdir() if path.suffix in (_SUFFIX, ".tmp")]
    for path in sorted(files, key=_changed, reverse=True)[KEPT:]:
        with contextlib.suppress(OSError):  # one that cannot be removed keeps no other
            path.unlink()


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it is gone
        return 0.0
