"""Fixed strings in a text, such as the markers of a vocabulary.

In: the strings with their ids, then texts. Out: where they stand. Knows no tokens.
"""

import re
from collections.abc import Iterator


class Markers:
    """Finds fixed strings in a text: the leftmost, of several at one place the longest."""

    def __init__(self, ids: dict[str, int]):
        self._ids = ids
        lengths: dict[str, set[int]] = {}
        for text in ids:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(sizes, reverse=True) for first, sizes in lengths.items()}
        self._first = re.compile("[" + re.escape("".join(self._lengths)) + "]") if lengths else None

    def find(self, text: str, position: int = 0) -> Iterator[tuple[int, int, int]]:
        """(start, end, id) of every marker from a position on, in order, never overlapping."""
        if self._first is None:
            return
        for candidate in self._first.finditer(text, position):
            start = candidate.start()
            if start < position:
                continue
            for length in self._lengths[text[start]]:
                token_id = self._ids.get(text[start : start + length])
                if token_id is not None:
                    position = start + length
                    yield start, position, token_id
                    break

    def cut(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text in pieces, and whether each is a marker."""
        done = 0
        for start, end, _ in self.find(text):
            yield text[done:start], False
            yield text[start:end], True
            done = end
        yield text[done:], False
