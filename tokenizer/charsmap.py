"""SentencePiece's precompiled normaliser: a table of replacements in, a normalised text out. Knows no tokens.

The table (`precompiled_charsmap`) is a little-endian uint32 length, a double-array trie of that many bytes whose keys
are UTF-8, and the replacements, each ended by a zero byte. At each place of a text the longest key is replaced.
Format of the trie: Darts-clone, one uint32 a node (bit 8: a key ends here; the low byte: the label; bits 9 to 31:
the offset of the children). The usual table has 225,000 keys; they are looked up in the trie, never listed.
"""

import re
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from pocketlm.errors import FileError

if TYPE_CHECKING:
    from pocketlm.tokenizer.markers import Markers

_MAX_BRANCHES = 1 << 22  # the usual tables have 200,000
_MAX_KEY = 32  # characters
_MAX_REPLACEMENT = 256  # bytes; the usual tables have 33


class Rules:
    """The replacements of one precompiled table, `charsmap`. FileError for a table that is damaged."""

    def __init__(self, path: object, charsmap: bytes):
        self._path, self.charsmap = path, charsmap
        size = int.from_bytes(charsmap[:4], "little")
        if len(charsmap) < 8 or size % 4 or not 4 <= size <= len(charsmap) - 4:
            raise self._damaged(f"a trie of {size} bytes in a table of {len(charsmap)}")
        self._texts = charsmap[4 + size :]
        if (
            longest := max(map(len, self._texts.split(b"\0")))
        ) > _MAX_REPLACEMENT:  # a text would become that many times as long
            raise self._damaged(f"a replacement of {longest} bytes")
        units = np.frombuffer(charsmap, dtype="<u4", count=size // 4, offset=4).astype(np.int64)
        self._units: list[int] = units.tolist()
        self._found: dict[int, str] = {}
        self._start = self._starts(_Trie(units))

    def _damaged(self, what: str) -> FileError:
        return FileError(self._path, f"its normalisation table is damaged: {what}")

    def _starts(self, trie: "_Trie") -> re.Pattern[str]:
        """Finds all places where a key can begin, and few others: most of a text need not be looked at."""
        try:
            firsts, states, ends = trie.characters(trie.root)
            longer = trie.has_children(states)
            seconds, *_ = trie.characters(states[longer])
            alone, begin, second = (_one_of(some) for some in (firsts[ends], firsts[longer], seconds))
        except (UnicodeDecodeError, MemoryError):
            raise self._damaged("its keys are not UTF-8") from None
        return re.compile(f"{alone}|{begin}(?={second})")

    def longest(self, text: str, at: int) -> tuple[int, str] | None:
        """Where the longest key at `at` ends and what replaces it; None where there is no key."""
        units, found = self._units, None
        state = _offset(units[0])
        for end in range(at, min(at + _MAX_KEY, len(text))):
            for byte in text[end].encode():
                state ^= byte
                if state >= len(units) or units[state] & 0x800000FF != byte:
                    return found
                leaf = units[state] & 0x100
                state ^= _offset(units[state])
            if leaf:  # pyright: ignore[reportPossiblyUnboundVariable]  # a character has at least one byte
                found = end + 1, self._replacement(state)
        return found

    def _replacement(self, state: int) -> str:
        if state not in self._found:
            at = self._units[state] & 0x7FFFFFFF if state < len(self._units) else len(self._texts)
            end = self._texts.find(b"\0", at)
            if end < 0:
                raise self._damaged(f"a replacement at byte {at} of {len(self._texts)}")
            self._found[state] = self._texts[at:end].decode(errors="replace")
        return self._found[state]

    def apply(self, text: str, kept: "Markers") -> str:
        """`text` with the rules applied everywhere but in the markers of `kept`."""
        return "".join([piece for piece, _ in self.pieces(text, kept)])

    def pieces(self, text: str, kept: "Markers") -> Iterator[tuple[str, bool]]:
        """The same in pieces, and whether each is whole: a marker, or what stands in the place of something else."""
        done = 0  # what is before has been given
        markers = kept.find(text)
        marker = next(markers, None)
        for at in chain((candidate.start() for candidate in self._start.finditer(text)), (len(text),)):
            while marker and marker[1] <= at:
                yield text[done : marker[0]], False
                yield text[marker[0] : marker[1]], True
                done = marker[1]
                marker = next(markers, None)
            if at < done or (marker and marker[0] <= at):
                continue
            found = self.longest(text, at)
            if found:
                yield text[done:at], False
                yield found[1], True
                done = found[0]
                if marker and marker[0] < done:
                    markers = kept.find(text, done)
                    marker = next(markers, None)
        yield text[done:], False


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)


def _one_of(characters: np.ndarray) -> str:
    """A class of characters given as their UTF-8 bytes in an integer.

    Those above U+FFFF stand apart: `re` looks up a class in a bitmap only when it has none of them.
    """
    texts = [value.to_bytes(4, "big").lstrip(b"\0").decode() for value in set(characters.tolist())]
    low, high = ("".join(re.escape(c) for c in texts if (c > "\uffff") == above) for above in (False, True))
    classes = [f"[{low}]"] * bool(low) + [f"(?=[\U00010000-\U0010ffff])[{high}]"] * bool(high)
    return "(?:" + ("|".join(classes) or "(?!)") + ")"


class _Trie:
    """Walks all branches of the trie at once, in arrays."""

    def __init__(self, units: np.ndarray):
        self._ends, labels = units & 0x100 > 0, units & 0x800000FF
        places = np.arange(len(units))
        self._states = places ^ ((units >> 10) << ((units & 0x200) >> 6))
        # a state's child for a byte is at place state ^ byte, if the unit there has that byte as its label
        parents = np.where((labels > 0) & (labels < 256), places ^ labels, -1)
        self._order = np.argsort(parents, kind="stable")
        self._parents, self._labels = parents[self._order], labels
        self.root = self._states[:1]

    def has_children(self, states: np.ndarray) -> np.ndarray:
        """Whether longer keys go on from each of the states."""
        return self._parents.searchsorted(states) < self._parents.searchsorted(states, side="right")

    def characters(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The characters that go on from the states (UTF-8 in an integer), the state after each, whether a key ends there."""
        text = np.zeros(len(states), dtype=np.int64)
        first = text
        done: list[tuple[np.ndarray, ...]] = []
        for length in range(1, 5):
            begin, end = self._parents.searchsorted(states), self._parents.searchsorted(states, side="right")
            counts = end - begin
            if counts.sum() > _MAX_BRANCHES:
                raise MemoryError
            child = np.repeat(begin - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
            unit = self._order[child]
            text = np.repeat(text, counts) << 8 | self._labels[unit]
            first = np.repeat(first, counts) if length > 1 else text
            states = self._states[unit]
            size = 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)
            done.append((text[size == length], states[size == length], self._ends[unit][size == length]))
            text, first, states = text[size > length], first[size > length], states[size > length]
        texts, after, ends = (np.concatenate(parts) for parts in zip(*done, strict=True))
        return texts, after, ends
