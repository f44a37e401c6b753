"""`pocketlm chats`: the saved conversations, listed, deleted or exported. Knows no model."""

from __future__ import annotations

import argparse
from pathlib import Path

from pocketlm.chat import saved, transcript
from pocketlm.errors import FileError, refused
from pocketlm.terminal_text import count, print


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "NAME: a conversation's name, how that begins, or its number in the list. "
        "In a chat, /load NAME goes on with the conversation."
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--delete", metavar="NAME", help="delete a conversation")
    group.add_argument("--export", nargs=2, metavar=("FILE.md", "NAME"), help="write a conversation to a Markdown file")


def run(arguments: argparse.Namespace) -> int:
    """List, delete or export; the exit status."""
    if arguments.delete is not None:
        print(_delete(_one_of_ours(arguments.delete)))
    elif arguments.export is not None:
        target, name = arguments.export
        print(_export(Path(target), saved.find(name, saved.IN_A_SHELL)))
    else:
        print("\n".join(saved.listed(saved.paths())) or "there are no saved conversations yet")
    return 0


def _one_of_ours(name: str) -> Path:
    """The file of a saved conversation. Raises FileError for a file of another kind: that must not be deleted."""
    path = saved.find(name, saved.IN_A_SHELL)
    if path.parent != transcript.chats_folder():
        transcript.load(path)
    return path


def _delete(path: Path) -> str:
    (line,) = saved.listed([path])
    with refused(path, problem="cannot be deleted"):
        saved.delete(path)
    return "deleted: " + line.split(maxsplit=1)[1]


def _export(target: Path, source: Path) -> str:
    conversation = transcript.load(source)
    try:
        transcript.write(target, saved.markdown(conversation).encode())
    except FileExistsError:
        raise FileError(target, "is there already", "choose another name for the page") from None
    except OSError as error:
        raise FileError(target, f"cannot be written ({error.strerror or error})") from None
    return f"{target}: {count(conversation.n_turns, 'turn')}"
