"""The check every executor makes before it computes: are these token ids, and is there room for them? And what two texts have
in common at the start.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np

from pocketlm.errors import PocketlmError, UsageError

Ids = np.ndarray | Sequence[int]


def check_ids(ids: Ids, n_vocab: int, length: int, n_ctx: int) -> np.ndarray:
    """`ids` as int64 [n]. Raises PocketlmError for none, for one outside the vocabulary, for more than the context holds."""
    try:
        ids = np.asarray(ids)
    except ValueError:  # lists of several lengths
        ids = np.empty(0)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu" or not _are_below(n_vocab, ids):
        raise PocketlmError(f"token ids must be a list of one or more whole numbers from 0 to {n_vocab - 1}")
    if length + len(ids) > n_ctx:
        raise PocketlmError(f"{length + len(ids)} tokens do not fit into a context of {n_ctx}; use a larger --ctx")
    return ids.astype(np.int64)


def given_ids(ids: Sequence[int]) -> list[int]:
    """The whole numbers of a sequence. Raises UsageError for anything else: nothing is rounded, and bytes are no ids."""
    try:
        if isinstance(ids, (bytes, bytearray)):
            raise TypeError
        return list(map(operator.index, ids))
    except TypeError:
        raise UsageError(f"the prompt is {ids!r:.60}; it must be a text or a list of token ids") from None


def _are_below(n_vocab: int, ids: np.ndarray) -> bool:
    if len(ids) == 1:  # every token of an answer comes by: NumPy's reductions cost more than all the rest here
        return 0 <= ids[0] < n_vocab
    return bool(ids.min() >= 0 and ids.max() < n_vocab)


def in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two lists have in common at the start."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # pieces are compared, not ids: a text of thousands is looked at for every slot of a server
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
