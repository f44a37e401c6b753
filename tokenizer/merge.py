"""Byte-pair merging: a sequence of symbols in, the same sequence with every possible merge done out.

Comes in: symbol ids and a `MergeTable` that says which neighbours merge, in which order, into what. Knows no text,
no vocabulary file and no pre-tokenizer; byte-level BPE (ranks) and SentencePiece BPE (scores) both run on it.

The rule, for both (Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units"): of all
neighbours that may merge, the pair of the lowest rank goes first, the leftmost of equal ones; until none is left.
"""

from array import array
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import pairwise
from typing import TYPE_CHECKING

from pocketlm.errors import FileError

if TYPE_CHECKING:
    import numpy as np

NO_MERGE = 1 << 62
_LOW = (1 << 32) - 1
_SHORT = 48  # symbols up to which scanning all pairs again beats a heap (measured on English words)
LONG = 4096  # symbols from which merging all occurrences of a pair at once in NumPy is tried
_FEW = 64  # different symbols up to which it is
_ROUNDS = 32  # times the length of the text that it may cost in all, which is less than what the heap takes
_PAIRS_KEPT = 1 << 20


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


def rank_table(
    path: object, text_of: Callable[[int], str], index: dict[str, int], merges: Sequence[str], stride: int
) -> MergeTable:
    """The table of a list of merges "left right", the best first. FileError where they do not fit `index`."""
    _check_merges(path, index, merges)
    ranks = dict(zip(merges, range(len(merges)), strict=True))

    def resolve(left: int, right: int) -> int:
        first, second = text_of(left), text_of(right)
        rank = ranks.get(f"{first} {second}")
        return NO_MERGE if rank is None else rank << 32 | index[first + second]

    return MergeTable(stride, resolve)


def _check_merges(path: object, index: dict[str, int], merges: Sequence[str]) -> None:
    """FileError unless each merge is two pieces, there once, and what it gives is in the vocabulary.

    In bulk first, because a vocabulary has 50,000 of them and the user waits. (A merge of a piece that is not in the
    vocabulary can never come up and does no harm.)
    """
    lines = "\n".join(merges)
    merged = lines.replace(" ", "").split("\n")
    if lines.count(" ") == len(merged) == len(set(merges)) == len(merges) and index.keys() >= set(merged):
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
    text_of: Callable[[int], str], index: dict[str, int], ranks: Sequence[int], stride: int, ties: bool
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


def merge(symbols: "Sequence[int] | np.ndarray", table: MergeTable) -> list[int]:
    """All merges done. n symbols cost n log n."""
    if len(symbols) <= _SHORT and not table.ties:
        return _merge_short(list(symbols), table)
    if len(symbols) >= LONG:
        symbols, finished = _merge_runs(symbols, table)
        if finished:
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


def _merge_runs(symbols: "Sequence[int] | np.ndarray", table: MergeTable) -> tuple[list[int], bool]:
    """Merge all occurrences of the best pair at once, for texts of few different symbols (a run of one character).

    The same result as one merge after the other as long as no merge makes a pair that should have gone before it,
    which is checked; the heap takes over from whatever state this leaves. Returns the symbols and whether all is done.
    Symbols are numbered locally in 8 bits, and nothing wider is as long as the text, so that ten million are no burden.
    """
    import numpy as np

    given = np.asarray(symbols, dtype=np.int32)
    used = np.zeros(int(given.max()) + 1, dtype=bool)
    for block in _blocks(given):
        used[block] = True
    alphabet: list[int] = np.flatnonzero(used).tolist()
    if len(alphabet) > _FEW:
        return given.tolist(), False
    number = np.zeros(len(used), dtype=np.uint8)
    number[alphabet] = np.arange(len(alphabet), dtype=np.uint8)
    local = look_up(number, given)
    del given, symbols
    values = np.full(65536, NO_MERGE, dtype=np.int64)  # of the pair `left << 8 | right` of local numbers
    stride = table.stride
    for a, left in enumerate(alphabet):
        for b, right in enumerate(alphabet):
            values[a << 8 | b] = table[left * stride + right]
    finished = False
    budget = _ROUNDS * len(local)  # each round looks at every symbol
    while len(local) > 1 and (budget := budget - len(local)) >= 0:
        pairs = (local[:-1].astype(np.uint16) << 8) | local[1:]
        present = np.flatnonzero(sum(np.bincount(block, minlength=65536) for block in _blocks(pairs)))
        best = int(present[np.argmin(values[present])])
        value = int(values[best])
        if value == NO_MERGE:
            finished = True
            break
        if np.count_nonzero(values[present] >> 32 == value >> 32) > 1:
            break
        merged = value & _LOW
        if merged not in alphabet:
            if len(alphabet) == 256:
                break
            alphabet.append(merged)
            new = len(alphabet) - 1
            for b, other in enumerate(alphabet):
                values[new << 8 | b] = table[merged * stride + other]
                values[b << 8 | new] = table[other * stride + merged]
        new = alphabet.index(merged)
        if min(values[new << 8 : (new + 1) << 8].min(), values[new::256].min()) >> 32 <= value >> 32:
            break
        hit = pairs == best
        if best >> 8 == best & 255:
            hit &= _every_other(hit)
        local[:-1][hit] = new
        keep = np.ones(len(local), dtype=bool)
        np.logical_not(hit, out=keep[1:])
        local = local[keep]
    return [*map(alphabet.__getitem__, local.tobytes())], finished or len(local) == 1


def _every_other(hit: "np.ndarray") -> "np.ndarray":
    """True at the first, third, fifth … place of each run of True: of aaaa, the pairs that can be merged at once."""
    import numpy as np

    first = hit.copy()
    first[1:] &= ~hit[:-1]
    starts = np.flatnonzero(first)
    odd = np.zeros(len(hit), dtype=np.uint8)
    odd[starts] = np.diff(starts & 1, prepend=0) & 1
    np.bitwise_xor.accumulate(odd, out=odd)  # whether the run begins at an odd place
    odd[1::2] ^= 1
    return odd == 0


def look_up(table: "np.ndarray", indices: "np.ndarray") -> "np.ndarray":
    """`table[indices]`, without NumPy's copy of all indices in 64 bits."""
    import numpy as np

    return np.concatenate([table[block] for block in _blocks(indices)])


def _blocks(values: "np.ndarray") -> "list[np.ndarray]":
    return [values[start : start + (1 << 18)] for start in range(0, len(values), 1 << 18)]
