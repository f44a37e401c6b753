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
LONG = 4096  # symbols from which `merge_long` is worth its arrays
_FEW = 64  # up to so many different symbols it takes all occurrences of a pair at once
_ROUNDS = 32  # how often it may look at the whole text; so many looks take less time than the heap
_PAIRS_KEPT = 1 << 19
_STAYS, _BETTER, _NEW = -1, -2, -3  # what a pair becomes, beside the number of a symbol


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


def merge_long(codes: np.ndarray, symbol_of: Callable[[int], int], table: MergeTable) -> list[int]:
    """`merge` of `symbol_of(code)` for an array of at least `LONG` unsigned codes.

    Codes are numbered anew in 8 bits and all occurrences of a pair are merged at once, so a run of ten million equal
    characters is no burden; a text of many different characters goes the usual way.
    """
    used = np.zeros(int(codes.max()) + 1, dtype=bool)
    for block in _blocks(codes):
        used[block] = True
    different = np.flatnonzero(used)
    alphabet = [symbol_of(code) for code in different.tolist()]
    number = np.zeros(len(used), dtype=np.int32)
    number[different] = np.arange(len(different)) if len(different) <= _FEW else alphabet
    local = np.concatenate([number[block].astype(np.uint8 if len(different) <= _FEW else "q") for block in _blocks(codes)])
    if len(different) > _FEW:
        return _merge_heap(array("q", local.tobytes()), table)
    run = _Run(local, alphabet, table)
    finished = run.merge()
    symbols = map(run.alphabet.__getitem__, run.local.tobytes())
    return list(symbols) if finished else _merge_heap(array("q", symbols), table)


class _Run:
    """A long sequence of few different symbols, numbered by `alphabet`, being merged."""

    def __init__(self, local: np.ndarray, alphabet: list[int], table: MergeTable):
        self.local, self.alphabet, self._table = local, [], table
        self._values = np.full(65536, NO_MERGE, dtype=np.int64)  # of the pair `left << 8 | right` of numbers
        for symbol in alphabet:
            self._number(symbol)

    def _number(self, symbol: int) -> int:
        """The number of a symbol, which may be new; the caller has seen to it that there are fewer than 256."""
        if symbol in self.alphabet:
            return self.alphabet.index(symbol)
        self.alphabet.append(symbol)
        new, stride = len(self.alphabet) - 1, self._table.stride
        for other, other_symbol in enumerate(self.alphabet):
            self._values[new << 8 | other] = self._table[symbol * stride + other_symbol]
            self._values[other << 8 | new] = self._table[other_symbol * stride + symbol]
        return new

    def merge(self) -> bool:
        """Whether all merges are done; if not, what is left is a state that merging one by one would come to, too."""
        budget = _ROUNDS * len(self.local)
        while len(self.local) > 1:
            pairs = (self.local[:-1].astype(np.uint16) << 8) | self.local[1:]
            present = np.flatnonzero(sum(np.bincount(block, minlength=65536) for block in _blocks(pairs)))
            best = int(present[np.argmin(self._values[present])])
            rank, merged = int(self._values[best]) >> 32, int(self._values[best]) & _LOW
            if rank == NO_MERGE >> 32:
                return True
            if len(self.alphabet) == 256:
                return False
            new = self._number(merged)
            symbols = sorted({new, *(present >> 8).tolist(), *(present & 255).tolist()})
            ties = np.count_nonzero(self._values[present] >> 32 == rank)
            at_once = ties == 1 and self._best_rank_of(new, symbols) > rank
            budget -= len(self.local) * (1 if at_once else _ROUNDS // 8)
            if budget < 0:
                return False
            if at_once:
                self._all_at_once(pairs, best, new)
            elif not self._left_to_right(rank, symbols):
                return False
        return True

    def _best_rank_of(self, new: int, symbols: list[int]) -> int:
        """The best rank of the pairs that a new symbol can make with these."""
        values = self._values
        return min(int(min(values[new << 8 | other], values[other << 8 | new])) for other in symbols) >> 32

    def _all_at_once(self, pairs: np.ndarray, best: int, new: int) -> None:
        """Merge every occurrence of one pair, which must not make a pair that should have gone before."""
        hit = pairs == best
        if best >> 8 == best & 255:
            hit &= _every_other(hit)
        self.local[:-1][hit] = new
        keep = np.ones(len(self.local), dtype=bool)
        np.logical_not(hit, out=keep[1:])
        self.local = self.local[keep]

    def _left_to_right(self, rank: int, symbols: list[int]) -> bool:
        """Do all merges of one rank, the leftmost first, in one pass; False if they could make a better pair."""
        becomes: dict[int, int] = {}
        new = _STAYS
        done = bytearray()
        rest = self.local.tobytes()
        for at, number in enumerate(rest):
            while done:
                pair = done[-1] << 8 | number
                new = becomes.get(pair, _NEW)
                if new == _NEW:
                    new = becomes[pair] = self._becomes(pair, rank, symbols)
                if new < 0:
                    break
                done.pop()
                number = new
            done.append(number)
            if new == _BETTER:
                self.local = np.frombuffer(done + rest[at + 1 :], dtype=np.uint8)
                return False
        self.local = np.frombuffer(done, dtype=np.uint8)
        return True

    def _becomes(self, pair: int, rank: int, symbols: list[int]) -> int:
        """The number of what a pair merges to at this rank; _STAYS if it does not, _BETTER if better pairs would come."""
        value = int(self._values[pair])
        if value >> 32 != rank:
            return _STAYS
        if len(self.alphabet) == 256:
            return _BETTER
        new = self._number(value & _LOW)
        symbols.append(new)
        return _BETTER if self._best_rank_of(new, symbols) < rank else new


def _every_other(hit: np.ndarray) -> np.ndarray:
    """True at the first, third, fifth … place of each run of True: of aaaa, the pairs that can be merged at once."""
    first = hit.copy()
    first[1:] &= ~hit[:-1]
    starts = np.flatnonzero(first)
    odd = np.zeros(len(hit), dtype=np.uint8)
    odd[starts] = np.diff(starts & 1, prepend=0) & 1
    np.bitwise_xor.accumulate(odd, out=odd)  # whether the run begins at an odd place
    odd[1::2] ^= 1
    return odd == 0


def _blocks(values: np.ndarray) -> list[np.ndarray]:
    """The array in parts: NumPy copies indices in 64 bits, which should be no longer than the cache."""
    return [values[start : start + (1 << 18)] for start in range(0, len(values), 1 << 18)]
