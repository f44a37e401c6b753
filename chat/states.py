"""The keys and values that a model has computed for saved conversations, kept so that a resumed one goes on at once.

In: a conversation's file, and a model that saves and loads its own state. Out: files in the data folder, limited in number and
size. A state that is missing, damaged or another model's is no error: it is computed again. Knows no tokens and no terminal.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from pocketlm.chat.transcript import data_folder
from pocketlm.errors import PocketlmError

SHORTEST = 256  # tokens: less is computed again sooner than it is found
MOST, MOST_BYTES = 8, 1 << 29  # files, and what they may take together: the oldest go


def path_of(conversation: Path) -> Path | None:
    """Where the state of the conversation in this file is kept; None without a home folder."""
    folder = data_folder()
    place = hashlib.sha256(str(conversation.absolute()).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return folder / "states" / f"{conversation.stem}-{place}.state" if folder else None


def keep(model: Any, conversation: Path) -> None:
    """Write the state of the model's own session, which has just answered in this conversation."""
    path = path_of(conversation)
    if path is None or model.context_used < SHORTEST or model.state_bytes > MOST_BYTES:
        return
    with suppress(PocketlmError, OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        model.save_state(path)
        _prune(path.parent)


def restore(model: Any, conversation: Path) -> None:
    """Load the saved state of this conversation, if there is one that fits the model."""
    with suppress(PocketlmError, OSError):
        path = path_of(conversation)
        if path is not None and 0 < path.stat().st_size <= MOST_BYTES:
            model.load_state(path)


def forget(conversation: Path) -> None:
    """Delete the state of a conversation: it holds what was said."""
    with suppress(OSError):
        if path := path_of(conversation):
            path.unlink()


def _prune(folder: Path) -> None:
    known = [(file.stat().st_mtime_ns, file.stat().st_size, file) for file in folder.glob("*.state")]
    total = 0
    for number, (_, n_bytes, file) in enumerate(sorted(known, reverse=True)):
        total += n_bytes
        if number >= MOST or total > MOST_BYTES:
            with suppress(OSError):
                file.unlink()
