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

    def find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(start, end, id) of every marker, in order, never overlapping."""
        if self._first is None:
            return
        position = 0
        for candidate in self._first.finditer(text):
            start = candidate.start()
            if start < position:
                continue
            for length in self._lengths[text[start]]:
                token_id = self._ids.get(text[start : start + length])
                if token_id is not None:
                    position = start + length
                    yield start, position, token_id
                    break
