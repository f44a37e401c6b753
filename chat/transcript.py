"""One conversation on disk: a JSON file that is never half written, and never written over unread.

In: a conversation. Out: its file, and the conversation again. A file may have been edited or damaged, or be in use by
another program: what is read is checked, and what has changed since is left alone. Knows no model and no terminal.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pocketlm.errors import FileError, PocketlmError
from pocketlm.runtime.atomic import STALE_SECONDS, lock_file, rename_to_free

FORMAT = "pocketlm conversation 1"
MAX_BYTES = 64 << 20  # no conversation comes near; a file that large is something else
ROLES = ("user", "assistant")
LOCK_SECONDS = 5.0  # a save takes milliseconds: who has to wait longer waits for a program that was suspended


@dataclass
class Conversation:
    """What was said. `messages` alternate between user and assistant; `system` is the system prompt.

    An answer that was cut off has `"cut": True`. `model`: the model's name; `model_id`: its identity ("" in files of earlier
    versions). `interactive`: a person held it, not a program. `branches`: other continuations, which the page shows, each
    {"at": how many of `messages` come before, "messages": what follows}.
    """

    system: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    model: str = ""
    model_id: str = ""
    interactive: bool = False
    branches: list[dict[str, Any]] = field(default_factory=list)

    def for_model(self) -> list[dict[str, str]]:
        """The messages a model is given: the system prompt, if there is one, in front."""
        messages = [{"role": message["role"], "content": message["content"]} for message in self.messages]
        return [{"role": "system", "content": self.system}] * bool(self.system) + messages

    @property
    def n_turns(self) -> int:
        """How many questions were asked."""
        return sum(message["role"] == "user" for message in self.messages)


def data_folder() -> Path | None:
    """The user's data folder for this program, which may not exist yet; None without a home folder."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
    else:
        base = os.environ.get("XDG_DATA_HOME")
        if not base or not os.path.isabs(base):
            home = os.path.expanduser("~")
            parts = ("Library", "Application Support") if sys.platform == "darwin" else (".local", "share")
            base = os.path.join(home, *parts) if os.path.isabs(home) and home != "/" else None
    return Path(base) / "pocketlm" if base else None


def chats_folder() -> Path:
    """The folder of saved conversations. Raises PocketlmError without a home folder."""
    folder = data_folder()
    if folder is None:
        raise PocketlmError("there is no home folder to keep conversations in; set XDG_DATA_HOME, or use --no-save")
    return folder / "chats"


def shown(path: Path | None) -> str:
    """What a user calls the file: a saved conversation by its name, another by its path."""
    folder = data_folder()
    return path.stem if path is not None and folder is not None and path.parent == folder / "chats" else str(path)


def load(path: Path) -> Conversation:
    """Read a conversation. Raises FileError for anything but a whole conversation of ours."""
    return _parse(path, _read(path))


class Record:
    """The file of one conversation, and what this program knows to be in it.

    `path` is None until something is saved; then it is a new file in `chats_folder()`.
    """

    def __init__(self, path: Path | None = None):
        """`path`: a file to be written, which does not exist yet."""
        self.path = path
        self._known: Set[bytes | None] = {None}  # digests of what this program may find there; None: no file

    @classmethod
    def at(cls, path: Path, revision: str) -> Record:
        """The record of a file whose content had this `revision` when it was last read or written."""
        record = cls(path)
        record._known = {bytes.fromhex(revision)}
        return record

    @property
    def revision(self) -> str:
        """The SHA-256 of the content that was read or written last, in hexadecimal; "" before that."""
        return next((digest.hex() for digest in self._known if digest), "")

    def load(self, path: Path) -> Conversation:
        """Read a conversation, and continue it in this record. Raises FileError."""
        data = _read(path)
        conversation = _parse(path, data)
        self.path, self._known = path, {hashlib.sha256(data).digest()}
        return conversation

    def save(self, conversation: Conversation) -> bool:
        """Write the whole conversation, readable for its owner only; readers see the old file or the new one.

        A file that another program has changed, moved or deleted since is left alone: a new file is begun, and False is
        returned. Raises FileError, and PocketlmError without a home folder.
        """
        data = _written(conversation).encode()
        digest, kept = hashlib.sha256(data).digest(), self.path
        try:
            with _alone(kept) as alone:
                found = _digest(kept) if kept is not None else None
                same = kept is not None and alone and found in self._known
                path = kept if kept is not None and same else new_path()
                if path != kept:
                    _sweep(path.parent)
                    self.path, found = path, None
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._known = {found, digest}  # either, should this be interrupted
                write(path, data, found is not None)
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            raise FileError(self.path, f"the conversation cannot be saved ({_reason(error)})") from None
        self._known = {digest}
        return same or kept is None

    def discard(self) -> None:
        """Delete the file, unless another program has written it since."""
        if self.path is not None:
            with suppress(OSError), _alone(self.path):
                if _digest(self.path) in self._known:
                    self.path.unlink()
        self.path, self._known = None, {None}


def new_path() -> Path:
    """The path of a new file for a conversation that starts now; names sort by time. Raises PocketlmError without a home
    folder.
    """
    stem = chats_folder() / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    path, n = stem.with_name(f"{stem.name}.json"), 1
    while os.path.lexists(path):
        n += 1
        path = stem.with_name(f"{stem.name}-{n}.json")
    return path


def _read(path: Path) -> bytes:
    try:
        if stat.S_ISFIFO((status := path.stat()).st_mode) or stat.S_ISCHR(status.st_mode):  # they may never end
            raise FileError(path, "is not a file")
        if status.st_size > MAX_BYTES:
            raise FileError(path, "is too large to be a conversation")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise FileError(path, f"the conversation cannot be read ({_reason(error)})") from None


def _parse(path: Path, data: bytes) -> Conversation:
    try:
        content = json.loads(data.decode("utf-8-sig"))  # editors put a mark in front
    except (ValueError, RecursionError):  # also covers UnicodeDecodeError
        raise FileError(path, "is not a saved conversation", "it is no JSON") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FileError(path, "is not a saved conversation", f"its format is not {FORMAT!r}")
    found = checked(content)
    if found is None:
        raise FileError(path, "is a damaged conversation", "its messages are not texts of a user and an assistant")
    return found


def checked(content: dict[str, Any]) -> Conversation | None:
    """The conversation in a file's JSON object; None if it is none."""
    messages, texts = content.get("messages"), [content.get(name, "") for name in ("system", "model", "model_id")]
    if not (isinstance(messages, list) and _are_messages(messages) and all(map(_is_text, texts))):
        return None
    others = content.get("branches", [])
    whole = isinstance(others, list) and all(isinstance(other, dict) for other in others)
    if not (whole and all(_are_messages(other.get("messages")) for other in others)):
        return None
    branches = [
        {"at": other["at"], "messages": _kept(other["messages"])}
        for other in others  # those but whose beginning was taken back since
        if type(other.get("at")) is int and 0 <= other["at"] <= len(messages)
    ]
    return Conversation(texts[0], _kept(messages), texts[1], texts[2], content.get("interactive") is True, branches)


def _kept(messages: list[Any]) -> list[dict[str, Any]]:
    return [{"role": m["role"], "content": m["content"], **({"cut": True} if m.get("cut") is True else {})} for m in messages]


def _written(conversation: Conversation) -> str:
    """The file's JSON, with one message a line, for people who look into it."""
    facts = {"format": FORMAT, **asdict(replace(conversation, messages=[]))}
    del facts["messages"]
    if not conversation.branches:
        del facts["branches"]
    head, *lines = map(json.JSONEncoder(ensure_ascii=False).encode, (facts, *conversation.messages))
    return f'{head[:-1]}, "messages": [\n' + ",\n".join(lines) + "\n]}\n"


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and message.get("role") in ROLES and _is_text(message.get("content")) for message in value
    )


def _is_text(value: object) -> bool:
    """A string without lone surrogates, which JSON can spell and no tokenizer can take."""
    return isinstance(value, str) and value.isascii() | (value == value.encode("utf-8", "ignore").decode())


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _digest(path: Path) -> bytes | None:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except FileNotFoundError:
        return None


def write(path: Path, data: bytes, replace: bool = False) -> None:
    """Write a whole file, readable for its owner only. With `replace` it replaces a file; else the path must be free.

    Raises OSError; FileExistsError if the path is not free.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)  # without this, a power cut after the rename could leave an empty file
        _patiently(os.replace if replace else rename_to_free, Path(temporary), path)
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def _patiently(rename: Callable[[Path, Path], None], source: Path, target: Path) -> None:
    """Rename; on Windows, try again for a second: a file that somebody is reading cannot be replaced there."""
    for attempt in range(50 if os.name == "nt" else 1):
        try:
            return rename(source, target)
        except FileExistsError:
            raise
        except PermissionError:
            if attempt == 49 or os.name != "nt":
                raise
            time.sleep(0.02)


@contextmanager
def _alone(path: Path | None) -> Iterator[bool]:
    """Hold the lock that keeps the user's other programs from saving; False if it was not free within LOCK_SECONDS.

    It is the system's lock on a file in the data folder, released with the process that holds it. Without a folder, or on a
    file system without locks, nothing is locked, and a change at the very same moment may go unseen.
    """
    try:
        folder = chats_folder()
        if path is None or path.parent == folder:  # for a file elsewhere alone, nothing is left in the data folder
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except (OSError, PocketlmError):
        yield True
        return
    try:
        yield lock_file(handle, LOCK_SECONDS)
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Delete what saves that were killed have left."""
    with suppress(OSError):
        for path in folder.glob(".*.json.*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
