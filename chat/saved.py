"""All conversations that were saved: which there are, which one a user means, how they are listed and exported.

In: the data folder, a name, a number or the beginning of a name. Out: paths, lines for a person, Markdown. Knows no model
and no terminal.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from pocketlm.chat import states
from pocketlm.chat.thinking import split
from pocketlm.chat.transcript import Conversation, chats_folder, load
from pocketlm.errors import FileError, PocketlmError
from pocketlm.terminal_text import count, without_controls

IN_A_CHAT, IN_A_SHELL = "/load lists them", "pocketlm chats lists them"
MOST_DIGITS = 4  # a longer number is the beginning of a name, which starts with a year


def paths() -> list[Path]:
    """The files of all saved conversations, the one that changed last first. Raises PocketlmError without a home."""
    dated = []
    for path in chats_folder().glob("*.json"):
        try:
            dated.append((path.stat().st_mtime_ns, path.name, path))
        except OSError:  # deleted meanwhile
            continue
    return [path for *_, path in sorted(dated, reverse=True)]


def latest(model_id: str, interactive: bool = True) -> Path | None:
    """The last conversation with the model `model_id` that a person held, or (not `interactive`) a program.

    Raises PocketlmError without a home.
    """
    for path in paths():
        try:
            conversation = load(path)
        except FileError:
            continue
        if conversation.interactive == interactive and conversation.model_id == model_id:
            return path
    return None


def as_path(name: str) -> Path:
    """The path that a user writes; `~` is the home folder."""
    try:
        return Path(os.path.expanduser(name))
    except ValueError:  # a zero byte, with which there is no file
        return Path(name)


def find(name: str, advice: str = IN_A_CHAT) -> Path:
    """The file that a user means by a path, by a saved conversation's name or its beginning, or by its number in the list.

    Raises FileError, with this `advice`, if there is none, PocketlmError if there are several.
    """
    path = as_path(name)
    if path.name != name or os.path.lexists(path):
        return path
    try:
        known = paths()
    except PocketlmError:
        known = []
    stem = name.removesuffix(".json")
    if stem.isdecimal() and len(stem) <= MOST_DIGITS and 1 <= int(stem) <= len(known):
        return known[int(stem) - 1]
    found = [path for path in known if path.stem == stem] or [path for path in known if stem and path.stem.startswith(stem)]
    if len(found) > 1:
        names = ", ".join(path.stem for path in found[:3]) + ", …" * (len(found) > 3)
        raise PocketlmError(f"{len(found)} conversations begin with {stem[:40]!r}: {names}")
    if not found:
        raise FileError(name[:100], "there is no such conversation", advice)
    return found[0]


def listed(known: Sequence[Path]) -> list[str]:
    """A line for each file: its number, its name, the model, when it changed last, how many turns, the first words."""
    rows = [(str(number), path.stem, *_facts(path)) for number, path in enumerate(known, 1)]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    return [without_controls(f"{row[0]:>{widths[0]}}  {row[1]:{widths[1]}}  {' · '.join(row[2:])}") for row in rows]


def _facts(path: Path) -> tuple[str, ...]:
    try:
        conversation = load(path)
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    except FileError as error:
        return (f"({error.problem})",)
    except OSError:
        return ("(deleted)",)
    turns = count(conversation.n_turns, "turn")
    words = " ".join(conversation.messages[0]["content"].split()) if conversation.messages else ""
    return (conversation.model or "(no model)", changed, turns, words if len(words) <= 40 else words[:39] + "…")


def delete(path: Path) -> None:
    """Delete a conversation and its saved state. Raises OSError."""
    path.unlink()
    states.forget(path)


def markdown(conversation: Conversation) -> str:
    """The conversation as Markdown."""
    name = conversation.model or "a model"
    parts = [f"# A conversation with {name}"]
    if conversation.system:
        parts.append("\n".join(f"> {line}".rstrip() for line in conversation.system.splitlines()))
    for message in conversation.messages:
        speaker = "You" if message["role"] == "user" else name
        thought, content = split(message["content"]) if message["role"] == "assistant" else ("", message["content"])
        if thought:
            parts.append(f"**{speaker}** *(thinking)*:\n\n" + "\n".join(f"> {line}".rstrip() for line in thought.splitlines()))
        parts.append(f"**{speaker}:** {content.strip()}" + " *(cut off)*" * bool(message.get("cut")))
    return without_controls("\n\n".join(parts)) + "\n"
