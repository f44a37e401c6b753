"""What a packed executable says about itself: title, system prompt, greeting and how answers are sampled.

In: the command line, or the block of an executable. Out: the block's bytes, and what the chat needs. Knows no models.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from pocketlm.errors import FileError, UsageError

UIS = ("chat", "web")  # where it talks: in the terminal, in the browser
MAX_BYTES = 1 << 16  # a system prompt longer than this fills any small model's context


@dataclass(frozen=True)
class Persona:
    """An empty text means the model's own. `flags`: options of the chat, as given ("--temp": 0.7, "--kv": "q8")."""

    title: str = ""
    system: str = ""
    greeting: str = ""
    flags: dict[str, float | int | str] = field(default_factory=dict)
    ui: str = ""  # "web": it talks in the browser

    def to_bytes(self) -> bytes:
        """The block for the executable. Raises UsageError if it is too long."""
        data = json.dumps(asdict(self), ensure_ascii=False).encode("utf-8", "replace")
        if len(data) > MAX_BYTES:
            raise UsageError(f"title, system prompt and greeting have {len(data)} bytes together; {MAX_BYTES} are possible")
        return data

    def arguments(self) -> list[str]:
        """The flags as words of a command line."""
        return [f"{flag}={value}" for flag, value in self.flags.items()]

    def lines(self) -> list[str]:
        """The persona for a person to read."""
        shown = {"title": self.title, "system": self.system, "greeting": self.greeting}
        lines = [f"{name:<9} {text or '(the model’s own)'}" for name, text in shown.items()]
        return [*lines, *([f"{'ui':<9} {self.ui}"] * bool(self.ui)), *self.arguments()]


def from_bytes(data: bytes, path: object) -> Persona:
    """The persona in a block. Raises FileError for anything else."""
    try:
        values = json.loads(data)
        texts = {name: values[name] for name in ("title", "system", "greeting")}
        texts["ui"] = values.get("ui", "")
        flags = {str(flag): value for flag, value in values["flags"].items() if isinstance(value, int | float | str)}
        if all(isinstance(text, str) for text in texts.values()):
            return Persona(**texts, flags=flags)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise FileError(path, "its title and system prompt were damaged", "get the file again")
