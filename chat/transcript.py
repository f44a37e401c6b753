"""Conversations on disk: one JSON file each, in the user's data folder.

In: a conversation. Out: a file that is never half written, and the conversation again. A file may have been edited or
damaged: what is read is checked. Knows no model and no terminal.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pocketlm.errors import FileError, PocketlmError

FORMAT = "pocketlm conversation 1"
MAX_BYTES = 64 << 20  # no conversation comes near; a file that large is something else
ROLES = ("user", "assistant")


@dataclass
class Conversation:
    """What was said. `messages` alternate between user and assistant; `system` is what the model was told before."""

    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    model: str = ""

    def for_model(self) -> list[dict[str, str]]:
        """The messages a model is given: the system prompt, if there is one, in front."""
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.messages

    @property
    def n_turns(self) -> int:
        """How many questions were asked."""
        return sum(message["role"] == "user" for message in self.messages)


def data_folder() -> Path | None:
    """The user's data folder for this program, which may not exist yet; None where there is no home."""
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
    """Where conversations are. Raises PocketlmError where there is no home."""
    folder = data_folder()
    if folder is None:
        raise PocketlmError("there is no home folder to keep conversations in; set XDG_DATA_HOME, or use --no-save")
    return folder / "chats"


def new_path() -> Path:
    """A file name for a conversation that starts now; names sort by time. Raises PocketlmError without a home."""
    return chats_folder() / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.json"


def latest() -> Path | None:
    """The conversation that was saved last. Raises PocketlmError without a home."""
    return max(chats_folder().glob("*.json"), key=os.path.getmtime, default=None)


def locate(name: str) -> Path:
    """The file that a user means by `name`: a path, or the name of a saved conversation."""
    path = Path(os.path.expanduser(name))
    folder = data_folder()
    if os.path.exists(path) or path.name != name or folder is None:
        return path
    saved = folder / "chats" / f"{name.removesuffix('.json')}.json"
    return saved if os.path.exists(saved) else path


def save(path: Path, conversation: Conversation) -> None:
    """Write the whole conversation, readable for its owner only; whoever reads sees the old file or the new one.

    Raises FileError.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump({"format": FORMAT, **asdict(conversation)}, file, ensure_ascii=False, indent=1)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise FileError(path, f"the conversation cannot be saved ({getattr(error, 'strerror', None) or error})") from None


def load(path: Path) -> Conversation:
    """Read a conversation. Raises FileError for anything but a whole conversation of ours."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FileError(path, "is too large to be a conversation")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(path, f"the conversation cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError):  # also covers UnicodeDecodeError
        raise FileError(path, "is not a saved conversation", "it is no JSON") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FileError(path, "is not a saved conversation", f"its format is not {FORMAT!r}")
    messages, system, model = content.get("messages"), content.get("system", ""), content.get("model", "")
    if not (isinstance(messages, list) and all(map(_is_message, messages)) and _is_text(system) and _is_text(model)):
        raise FileError(path, "is a damaged conversation", "its messages are not texts of a user and an assistant")
    return Conversation(system, [{"role": m["role"], "content": m["content"]} for m in messages], model)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and _is_text(value.get("content"))


def _is_text(value: object) -> bool:
    """A string without lone surrogates, which JSON can spell and no tokenizer can take."""
    return isinstance(value, str) and value.isascii() | (value == value.encode("utf-8", "ignore").decode())
