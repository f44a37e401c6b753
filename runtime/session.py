"""A session: which tokens an executor's KV cache holds, and how to get from them to others with little work.

In: token ids. Out: the logits after the last of them. Knows nothing about text, sampling or turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from pocketlm.errors import PocketlmError, UsageError

if TYPE_CHECKING:
    from pocketlm.runtime.executors import Executor

BLOCK = 512  # tokens fed at once: a prompt can be cancelled between two blocks
TAKEN = "this answer ends here: the model has begun another one; finish one before the next, or load the model twice"
MIN_SHIFT = 32  # fewer tokens than this are computed again rather than moved, which is exact


class Session:
    """The ids behind the positions of an executor's cache.

    `ids` is always a prefix of what the cache holds: after an error or a Ctrl-C in the middle of a step, positions that
    were filled but not yet recorded are given up.

    One user at a time, from any thread: who wants the cache calls `claim`, which ends the claim before it, and computes
    inside `held`, where nobody else computes. A user whose claim has ended gets a PocketlmError at his next step, never
    another's logits.
    """

    def __init__(self, executor: Executor):
        self.executor = executor
        self.ids: list[int] = []
        self.note = ""  # what the last `advance` had to do that costs time unexpectedly
        self._one = np.empty(1, np.int32)
        self._lock = threading.RLock()
        self._claim: object | None = None  # the present user's; None before the first and after `end`
        self._ended = ""  # why nobody can use this session any more
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._truncate(0)

    def claim(self) -> object:
        """From now on the cache is the caller's; what is returned is for `held`. Raises PocketlmError after `end`."""
        claim = self._claim = object()  # without the lock: a user between two steps shall not have to be waited for
        if self._ended:
            raise PocketlmError(self._ended)
        return claim

    @contextmanager
    def held(self, claim: object) -> Iterator[None]:
        """Nobody else computes inside. Raises PocketlmError where the claim has ended."""
        with self._lock:
            self.check(claim)
            yield

    def check(self, claim: object) -> None:
        """Raises PocketlmError where the claim has ended."""
        if self._ended or self._claim is not claim:
            raise PocketlmError(self._ended or TAKEN)

    def end(self, reason: str) -> None:
        """Nobody can use this session any more, `reason` says why; returns when who is computing has stopped."""
        self._ended = reason
        with self._lock:
            self._claim = None

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits of every position, float32 (len(ids), n_vocab), computed from an empty cache. Raises PocketlmError."""
        with self.held(self.claim()):
            self.clear()
            try:
                logits = self.executor.forward(ids, rows="all")
                self.ids = ids.tolist()
            except BaseException:
                self._settle()
                raise
            return logits

    def append(self, id: int) -> np.ndarray:
        """Logits, float32 (n_vocab,), after one more token. Raises PocketlmError if the context is full."""
        self._one[0] = id
        return self._forward(self._one, [id])

    def advance(
        self,
        ids: Sequence[int],
        *,
        reuse_cache: bool = True,
        shift: bool = False,
        cancelled: Callable[[], bool] | None = None,
    ) -> tuple[np.ndarray | None, int]:
        """Make the cache hold exactly `ids`; the logits after the last of them, float32 (n_vocab,), and how many were there.

        What both have in common at the start is not computed again, except that the last token always is: its logits are
        not kept. With `shift`, text that was taken out of the middle leaves the cache by moving what follows. That is the
        usual approximation: the moved keys and values were computed with the dropped text still in view. It is no
        approximation where the positions are learned, because there all that follows is computed again (see `note`).
        `cancelled` is asked between blocks of 512 tokens; if it says so, the logits are None and the work done stays.

        Raises UsageError for no ids or one outside the vocabulary, PocketlmError for more than the context holds.
        """
        ids = list(map(int, ids))
        self._check(ids)
        self.note = ""
        self._settle()
        if not reuse_cache:
            self.clear()
        same = _common(self.ids, ids)
        if shift and same < len(self.ids):
            start, n = _longest_match(ids[same:], self.ids[same:])
            if n >= MIN_SHIFT:
                self._truncate(same + start + n)
                if self._remove(same, same + start):
                    same += n
                else:
                    self.note = f"this model's positions are learned, so {len(ids) - same} tokens were computed again"
        same = min(same, len(ids) - 1)
        self._truncate(same)
        logits = None
        for i in range(same, len(ids), BLOCK):
            if cancelled is not None and cancelled():
                return None, same
            block = ids[i : i + BLOCK]
            logits = self._forward(np.array(block, np.int32), block)
        return logits, same

    def _check(self, ids: list[int]) -> None:
        n_vocab, n_ctx = self.executor.hyper.n_vocab, self.executor.n_ctx
        if not ids:
            raise UsageError("the prompt is empty; give the model at least one token to go on from")
        if min(ids) < 0 or max(ids) >= n_vocab:
            bad = next(id for id in ids if not 0 <= id < n_vocab)
            raise UsageError(f"token {bad} is not in the vocabulary; the ids of this model are 0 to {n_vocab - 1}")
        if len(ids) > n_ctx:
            advice = f"{self.how_to_grow}shorten it"
            raise PocketlmError(f"the prompt has {len(ids)} tokens but the context holds {n_ctx}; {advice}")

    @property
    def how_to_grow(self) -> str:
        """Advice on a context that is too small, for the front of other advice; "" where the model cannot use a larger one."""
        executor = self.executor
        return "raise --ctx or " if executor.hyper.reaches(executor.n_ctx + 1) else ""

    def _forward(self, block: np.ndarray, ids: list[int]) -> np.ndarray:
        try:
            logits = self.executor.forward(block)[0]
            self.ids += ids
        except BaseException:
            self._settle()
            raise
        return logits

    def _settle(self) -> None:
        """Bring `ids` and the cache to what they have in common, should an interrupt have come between the two."""
        cache = self.executor.cache
        cache.truncate(len(self.ids))
        del self.ids[cache.length :]

    def _truncate(self, length: int) -> None:
        del self.ids[length:]
        self._settle()

    def _remove(self, start: int, stop: int) -> bool:
        # the ids first: if an interrupt comes in the middle of the move, `_settle` gives up all from `start` on
        moved = self.ids[stop:]
        del self.ids[start:]
        if self.executor.cache.remove(start, stop):
            self.ids += moved
            return True
        return False


def _common(a: list[int], b: list[int]) -> int:
    """How many ids `a` and `b` have in common at the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _longest_match(pattern: list[int], text: list[int]) -> tuple[int, int]:
    """Where in `text` the longest beginning of `pattern` is, and its length (Knuth, Morris, Pratt 1977); (0, 0) for none."""
    border = [0] * (len(pattern) + 1)  # border[n]: the longest proper border of the first n ids
    n = 0
    for i in range(1, len(pattern)):
        while n and pattern[i] != pattern[n]:
            n = border[n]
        n += pattern[i] == pattern[n]
        border[i + 1] = n
    start = length = n = 0
    for i, id in enumerate(text):
        while n and (n == len(pattern) or pattern[n] != id):
            n = border[n]
        n += n < len(pattern) and pattern[n] == id
        if n > length:
            start, length = i + 1 - n, n
    return start, length
