"""Ends lines between words, at a terminal that otherwise ends them anywhere.

In: an answer, part by part, or a whole text. Out: what to write to the terminal. In a stream nothing waits for the end of
its word: one that turns out too long for its line is taken back from the screen and written on the next. Knows the width
of characters as wcwidth tells it, but not how a terminal joins several into one picture; such a line is broken a little
early.
"""

import re
from collections.abc import Callable, Iterator

TAB = 8
LEAST = 8  # columns; narrower terminals are treated as this wide


class Wrapper:
    """Breaks lines in a stream of text; keeps track of the cursor's column. `width`: gives the terminal's columns."""

    def __init__(self, width: Callable[[], int]):
        self._width = width
        self._column = 0
        self._word, self._word_width = "", 0  # the part of a word at the end of the line

    def push(self, text: str) -> str:
        """`text` with line breaks added; it must hold no control characters but newline and tab."""
        from wcwidth import wcwidth  # slow the first time: by now the line editor has it

        limit = max(self._width(), LEAST) - 1  # where a cursor behind the last column goes is not the same everywhere
        out: list[str] = []
        for character in text:
            blank = character in " \t\n"
            size = TAB - self._column % TAB if character == "\t" else max(wcwidth(character), 0)
            wide = size > 1  # scripts of wide characters have no spaces: a line may end behind each
            if self._column + size > limit:
                if blank or wide or not 0 < self._word_width < self._column:
                    out.append("\n")
                    self._column, self._word, self._word_width = 0, "", 0
                    if blank:
                        continue
                else:
                    out.append(f"\x1b[{self._word_width}D\x1b[K\n{self._word}")
                    self._column = self._word_width
            out.append(character)
            self._column = 0 if character == "\n" else self._column + size
            if blank or wide:
                self._word, self._word_width = "", 0
            else:
                self._word, self._word_width = self._word + character, self._word_width + size
        return "".join(out)


def wrapped(text: str, width: int, indent: int = 0) -> str:
    """A whole text in lines of fewer than `width` columns. `indent`: columns in front of continued lines."""
    limit = max(width, LEAST) - 1
    indent = indent if indent <= limit // 2 else min(2, limit // 4)
    return "\n".join(row for line in text.split("\n") for row in _rows(line.expandtabs(TAB), limit, indent))


def _rows(line: str, limit: int, indent: int) -> Iterator[str]:
    if 2 * len(line) <= limit:  # it fits, however wide its characters
        yield line
        return
    from wcwidth import wcwidth

    row, column, gap = "", 0, ""
    for piece in re.findall(r" +|[^ ]+", line):
        if piece[0] == " ":
            gap = piece
            continue
        size = sum(max(wcwidth(character), 0) for character in piece)
        if column and column + len(gap) + size > limit:
            yield row
            row, column, gap = " " * indent, indent, ""
        row, column, gap = row + gap, column + len(gap), ""
        for character in piece:  # a word that is longer than a line, and scripts without spaces
            size = max(wcwidth(character), 0)
            if column + size > limit:
                yield row
                row, column = " " * indent, indent
            row, column = row + character, column + size
    yield row
