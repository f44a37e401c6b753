"""Byte-pair merging: a sequence of symbols in; out, the same sequence after every possible merge.

In: symbol ids and a `MergeTable` that says which neighbours merge, in which order, into what. Knows no text,
no vocabulary file and no pre-tokenizer; byte-level BPE (ranks) and SentencePiece BPE (scores) both run on it.

The rule, for both (Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units"): the pair of
neighbours with the lowest rank merges first, the leftmost of equal ones, until no neighbours may merge.
"""

from array import array
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np

from pocketlm.errors import FileError
from pocketlm.tokenizer.texts import TextIndex, index_of

NO_MERGE = 1 << 62
_LOW = (1 << 32) - 1
_SHORT = 48  # symbols up to which scanning all pairs again beats a heap (measured on English words)
_LONG, _FEW = 4096, 64  # from so many symbols on, of which so many are different, `_Few` is worth its arrays
_ROUNDS = 32  # how often it may look at the whole text; so many looks take less time than the heap
_PART = 1 << 18
_PAIRS_KEPT = 1 << 19


class MergeTable(dict[int, int]):
    """Pair of symbols `left * stride + right` → `rank << 32 | merged symbol`, or `NO_MERGE`.

    It fills itself: a pair that is not there is asked of `resolve(left, right)` and remembered, so opening a
    vocabulary costs nothing here. `ties` says that different pairs may have the same rank.
    """

    def __init__(self, stride: int, resolve: Callable[[int, int], int], ties: bool = False):
        super().__init__()
        self.stride, self.ties = stride, ties
        self._resolve = resolve

    def __missing__(self, pair: int) -> int:
        value = self._resolve(*divmod(pair, self.stride))
        if len(self) < _PAIRS_KEPT:
            self[pair] = value
        return value


def rank_table(path: object, text_of: Callable[[int], str], index: TextIndex, merges: Sequence[str], stride: int) -> MergeTable:
    """The table of a list of merges "left right", the best first. FileError where they do not fit `index`."""
    _check_merges(path, index, merges)
    ranks = index_of(merges)[1]

    def resolve(left: int, right: int) -> int:
        first, second = text_of(left), text_of(right)
        rank = ranks.get(f"{first} {second}")
        return NO_MERGE if rank is None else rank << 32 | index[first + second]

    return MergeTable(stride, resolve)


def _check_merges(path: object, index: TextIndex, merges: Sequence[str]) -> None:
    """FileError unless each merge is two pieces, there once, and what it gives is in the vocabulary.

    In bulk first, because a vocabulary has 50,000 of them and the user waits. (A merge of a piece that is not in the
    vocabulary can never come up and does no harm.)
    """
    lines = "\n".join(merges)
    merged = lines.replace(" ", "").split("\n")
    if lines.count(" ") == len(merged) == len(set(merges)) == len(merges) and index.has_all(merged):
        return
    seen = set()
    for i, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise FileError(path, f"merge {i} is not two pieces: {merge[:40]!r}")
        if left + right not in index:
            raise FileError(path, f"merge {i} gives {(left + right)[:40]!r}, which is not in the vocabulary")
        if merge in seen:
            raise FileError(path, f"merge {i} is there twice: {merge[:40]!r}")
        seen.add(merge)


def concatenation_table(
    text_of: Callable[[int], str], index: TextIndex, ranks: Sequence[int], stride: int, ties: bool
) -> MergeTable:
    """The table of a vocabulary without merges: neighbours merge when their joined text is in `index`.

    `ranks[id]` is the order of the merged token. Used by SentencePiece and tiktoken vocabularies.
    """
    longest = max(map(len, index), default=0)

    def resolve(left: int, right: int) -> int:
        first, second = text_of(left), text_of(right)
        if len(first) + len(second) > longest:
            return NO_MERGE
        merged = index.get(first + second)
        return NO_MERGE if merged is None else ranks[merged] << 32 | merged

    return MergeTable(stride, resolve, ties)


def merge(symbols: list[int], table: MergeTable) -> list[int]:
    """All merges done; the list that is given may be changed. n symbols cost n log n."""
    if len(symbols) <= _SHORT and not table.ties:
        return _merge_short(symbols, table)
    if len(symbols) >= _LONG and len(set(symbols)) <= _FEW:
        few = _Few(symbols, table)
        is_done, symbols = few.merge(), few.symbols()
        if is_done:
            return symbols
    return _merge_heap(array("q", symbols), table)


def _merge_short(symbols: list[int], table: MergeTable) -> list[int]:
    stride = table.stride
    values = [table[left * stride + right] for left, right in pairwise(symbols)]
    while values:
        best = min(values)
        if best == NO_MERGE:
            break
        i = values.index(best)
        symbols[i] = best & _LOW
        del symbols[i + 1], values[i]
        if i:
            values[i - 1] = table[symbols[i - 1] * stride + symbols[i]]
        if i < len(values):
            values[i] = table[symbols[i] * stride + symbols[i + 1]]
    return symbols


def _merge_heap(symbols: "array[int]", table: MergeTable) -> list[int]:
    """A doubly linked list of symbols and a queue of `rank << 32 | position`; entries that went stale are skipped."""
    stride, n = table.stride, len(symbols)
    before, after = array("l", range(-1, n - 1)), array("l", range(1, n + 1))
    after[n - 1] = -1
    pairs = (table[symbols[i] * stride + symbols[i + 1]] for i in range(n - 1))
    # The pairs of the beginning are sorted once and stay in an array (8 bytes each); only new ones need the heap.
    first = iter(array("q", sorted((v >> 32 << 32) | i for i, v in enumerate(pairs) if v != NO_MERGE)))
    upcoming = next(first, NO_MERGE)
    heap: list[int] = []
    while heap or upcoming != NO_MERGE:
        if heap and heap[0] < upcoming:
            key = heappop(heap)
        else:
            key, upcoming = upcoming, next(first, NO_MERGE)
        i = key & _LOW
        j = after[i]
        if j < 0 or symbols[i] < 0:
            continue
        value = table[symbols[i] * stride + symbols[j]]
        if value >> 32 != key >> 32:
            continue
        merged = symbols[i] = value & _LOW
        symbols[j] = -1
        after[i] = k = after[j]
        if k >= 0:
            before[k] = i
            value = table[merged * stride + symbols[k]]
            if value != NO_MERGE:
                heappush(heap, (value >> 32 << 32) | i)
        h = before[i]
        if h >= 0:
            value = table[symbols[h] * stride + merged]
            if value != NO_MERGE:
                heappush(heap, (value >> 32 << 32) | h)
    return [symbol for symbol in symbols if symbol >= 0]


# ── long texts of few different symbols: a run of one character ──────────────────────────────────────────────────────


class _Few:
    """Symbols of which few are different, as `text`: bytes that number them. All pairs of the lowest rank merge in one go, so
    that a run of ten million equal characters is no burden.
    """

    def __init__(self, symbols: list[int], table: MergeTable):
        self._alphabet, self._table = list(dict.fromkeys(symbols)), table
        self._numbers = {symbol: number for number, symbol in enumerate(self._alphabet)}
        self.text = bytes(map(self._numbers.__getitem__, symbols))

    def symbols(self) -> list[int]:
        return list(map(self._alphabet.__getitem__, self.text))

    def _pairs(self) -> list[int]:
        """Each `left << 8 | right` that there is, once; a part of the text after the other, as NumPy counts in 64 bits."""
        text, counts = np.frombuffer(self.text, np.uint8), np.zeros(1 << 16, np.int64)
        for at in range(0, len(text), _PART):
            part = text[at : at + _PART + 1].astype(np.uint16)
            counts += np.bincount(part[:-1] << 8 | part[1:], minlength=1 << 16)
        return np.flatnonzero(counts).tolist()

    def _value(self, left: int, right: int) -> int:
        return self._table[self._alphabet[left] * self._table.stride + self._alphabet[right]]

    def _becomes(self, value: int, present: set[int]) -> tuple[int, int]:
        """The number of what a pair of this value becomes, which joins `present`, and the lowest rank of a pair it may be in;
        -1 where there are no more numbers.
        """
        symbol = value & _LOW
        if len(self._alphabet) == 256 and symbol not in self._numbers:
            return 0, -1
        new = self._numbers.setdefault(symbol, len(self._alphabet))
        self._alphabet += [symbol] * (new == len(self._alphabet))
        present.add(new)
        return new, min(min(self._value(new, other), self._value(other, new)) for other in present) >> 32

    def merge(self) -> bool:
        """Whether all merges are done; if not, what is left is a state that merging one by one would come to, too."""
        budget = _ROUNDS * len(self.text)
        while len(self.text) > 1:
            pairs = self._pairs()
            values = {pair: self._value(*divmod(pair, 256)) for pair in pairs}
            rank, present = min(values.values()) >> 32, {number for pair in pairs for number in divmod(pair, 256)}
            if rank == NO_MERGE >> 32:
                return True
            best, *ties = (pair for pair, value in values.items() if value >> 32 == rank)
            new, lowest = self._becomes(values[best], present)
            at_once = not ties and lowest > rank
            budget -= len(self.text) * (1 if at_once else _ROUNDS // 8)
            if budget < 0:
                return False
            if at_once:
                self.text = self.text.replace(bytes(divmod(best, 256)), bytes([new]))
            elif not self._left_to_right(rank, present):
                return False
        return True

    def _left_to_right(self, rank: int, present: set[int]) -> bool:
        """Do all merges of one rank, the leftmost first, in one pass; False if they could make a better pair."""
        becomes: dict[int, int] = {}
        done = bytearray()
        for at, number in enumerate(self.text):
            while done:
                pair = done[-1] << 8 | number
                new = becomes.get(pair)
                if new is None:
                    value = self._value(done[-1], number)
                    new, lowest = self._becomes(value, present) if value >> 32 == rank else (-1, rank)
                    if lowest < rank:
                        self.text = bytes(done) + bytes([number]) + self.text[at + 1 :]
                        return False
                    becomes[pair] = new
                if new < 0:
                    break
                done.pop()
                number = new
            done.append(number)
        self.text = bytes(done)
        return True
