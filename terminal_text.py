"""Text on its way out: a terminal gets no control characters from a model, a file or a conversation.

In: text of any origin. Out: the same text, as it may be shown. Escape sequences could retitle, repaint or reprogram a
terminal, or type for its user. Commands print with the `print` of this module; the chat, which has colours of its own,
filters what it is given with `without_controls`. Knows no models.
"""

from __future__ import annotations

import builtins
import re
import sys
from typing import TextIO, TypeVar

Line = TypeVar("Line", bound="StatusLine")

# All of C0 and C1 but tab and newline
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def without_controls(text: str) -> str:
    """The text without control characters, newlines and tabs kept."""
    return _CONTROLS.sub("", text)


def print(*values: object, sep: str = " ", end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """Python's `print` without the control characters in `values`, for standard error and for terminals.

    Pipes and files on standard output get every character. `sep` and `end` are never filtered.
    """
    out = sys.stdout if file is None else file
    texts = map(str, values)
    if out is not None and (out is sys.stderr or out.isatty()):
        texts = map(without_controls, texts)
    builtins.print(*texts, sep=sep, end=end, file=out, flush=flush)


class StatusLine:
    """A line on standard error that each `show` overwrites, if that is a terminal. The end of a `with` block clears it."""

    def __init__(self) -> None:
        self.is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._shown = ""

    def show(self, text: str, instead: bool = False) -> None:
        """Show `text`. `instead`: without a terminal, print it as a line of its own; else nothing is printed there."""
        if self.is_terminal and text != self._shown:
            print("", text.ljust(len(self._shown)), sep="\r", end="", file=sys.stderr, flush=True)
            self._shown = text
        elif instead and not self.is_terminal:
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Keep the line as it is, and go to the next."""
        if self._shown:
            print(file=sys.stderr)
            self._shown = ""

    def __enter__(self: Line) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("", " " * len(self._shown), "", sep="\r", end="", file=sys.stderr, flush=True)


def count(n: int, thing: str) -> str:
    """ "1 turn", "2 turns"."""
    return f"{n:,} {thing}{'s' * (n != 1)}"


def clock(seconds: float) -> str:
    """A time as minutes and seconds, with hours where there are some."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
