"""A list of texts and the way back from a text to its number, in a fifth of the memory that Python's own take.

In: the 50,000 to 260,000 words of a vocabulary. Out: a sequence and a mapping of them. A `str` is made each time that it is
asked for, which takes a microsecond: whoever asks for the same ones often keeps them. Knows nothing of tokens.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress

import numpy as np


class Texts(Sequence[str]):
    """An immutable sequence of texts, as UTF-8 side by side. Raises UnicodeEncodeError for one with lone surrogates."""

    def __init__(self, texts: Sequence[str]):
        self._data = "\0".join(texts).encode()  # with a NUL between two, so that one `split` makes all
        ends = np.flatnonzero(np.frombuffer(self._data, np.uint8) == 0)
        self._can_split = len(ends) == len(texts) - 1
        if not self._can_split:  # a text holds a NUL itself
            ends = np.cumsum([len(text.encode()) + 1 for text in texts])[:-1] - 1
        wide = len(self._data) >> 31
        self._starts = array("q" if wide else "i", np.append(0, ends + 1).astype("q" if wide else "i").tobytes())
        self._starts.append(len(self._data) + 1)
        self._n = len(texts)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, at: int) -> str:  # type: ignore[override]  # nobody asks for a slice
        if at < 0:
            at += self._n
        if not 0 <= at < self._n:
            raise IndexError(at)
        return self._data[self._starts[at] : self._starts[at + 1] - 1].decode()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Texts):
            return self._data == other._data and self._starts == other._starts
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def data(self) -> bytes | None:
        """All of them as UTF-8, a NUL between each two; None where a text holds a NUL itself."""
        return self._data if self._can_split else None

    def __iter__(self) -> Iterator[str]:
        if self._can_split:
            return iter(self._data.decode().split("\0"))
        return (self[i] for i in range(self._n))


class TextIndex(Mapping[str, int]):
    """Text → its number in `texts`, for those that are indexed, each of them once. Made by `index_of`.

    Holds sorted hash values and the number of the text of each: a look-up is a binary search and one comparison of texts.
    """

    def __init__(self, texts: Texts, hashes: np.ndarray, numbers: np.ndarray):
        """`hashes` (n,) int64, sorted; `numbers` (n,) int32: the text of each."""
        self._texts = texts
        self._hashes, self._numbers = array("q", hashes.tobytes()), array("i", numbers.tobytes())

    def __len__(self) -> int:
        return len(self._numbers)

    def get(self, text: object, default: int | None = None) -> int | None:  # type: ignore[override]
        wanted, hashes = hash(text), self._hashes
        at = bisect_left(hashes, wanted)
        while at < len(hashes) and hashes[at] == wanted:
            if self._texts[self._numbers[at]] == text:
                return self._numbers[at]
            at += 1
        return default

    def __getitem__(self, text: str) -> int:
        found = self.get(text)
        if found is None:
            raise KeyError(text)
        return found

    def __contains__(self, text: object) -> bool:
        return self.get(text) is not None

    def has_all(self, texts: Iterable[str]) -> bool:
        """Whether all of these are here, judged by their 64-bit hash values; in a tenth of the time of asking for each."""
        wanted, hashes = np.fromiter(map(hash, texts), np.int64), np.frombuffer(self._hashes, np.int64)
        at = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
        return not len(wanted) or (len(hashes) > 0 and bool((hashes[at] == wanted).all()))

    def __iter__(self) -> Iterator[str]:
        """The texts, in the order of their numbers."""
        return compress(self._texts, self._chosen())

    def pairs(self) -> Iterator[tuple[str, int]]:
        """Each text and its number, in the order of the numbers: `items` without a search for each."""
        return compress(zip(self._texts, range(len(self._texts)), strict=True), self._chosen())

    def _chosen(self) -> bytes:
        chosen = np.zeros(len(self._texts), np.uint8)
        chosen[np.frombuffer(self._numbers, np.int32)] = 1
        return chosen.tobytes()

    def without(self, numbers: Sequence[int]) -> "TextIndex":
        """The index of the other texts."""
        mine = np.frombuffer(self._numbers, np.int32)
        stay = ~np.isin(mine, np.asarray(numbers, np.int32))
        return TextIndex(self._texts, np.frombuffer(self._hashes, np.int64)[stay], mine[stay])


def index_of(texts: Sequence[str]) -> tuple[Texts, TextIndex]:
    """`texts` and the index of those that are not empty."""
    kept = Texts(texts)
    hashes = np.fromiter(map(hash, texts), np.int64, len(texts))
    order = np.argsort(hashes)
    index = TextIndex(kept, hashes[order], order.astype(np.int32))
    return kept, index.without([i for i, text in enumerate(texts) if not text]) if "" in texts else index
