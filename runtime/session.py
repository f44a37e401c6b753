"""A session: which tokens a KV cache holds, and how to get from them to others with little work.

In: token ids. Out: what becomes of the logits after the last of them. Knows nothing about text, sampling or turns.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketlm.errors import PocketlmError, UsageError
from pocketlm.locks import ForkedLock
from pocketlm.runtime.drafts import Odds
from pocketlm.runtime.engine import Engine, Use
from pocketlm.runtime.ids import Ids, check_ids, in_common
from pocketlm.runtime.pass_times import Company

if TYPE_CHECKING:
    from pocketlm.runtime.executors import Executor
    from pocketlm.runtime.sampling import DrawingSampler

TAKEN = "this answer ends here: its session has begun another one; finish one before the next, or use a session() for each"
MIN_SHIFT = 32  # fewer tokens than this are computed again rather than moved, which is exact
BETWEEN = 0.1  # seconds in which a session that answers is free for a moment, between two tokens


class Session:
    """The ids behind the positions of a cache: an executor's own, or a further one. Sessions that have an executor in common
    have an engine in common.

    `ids` is always a prefix of what the cache holds: after an error or a Ctrl-C in the middle of a step, positions that
    were filled but not yet recorded are given up.

    Sessions compute at the same time; one has one user at a time, from any thread: who wants the cache calls `claim`, which
    ends the claim before it, and computes inside `held`, where nobody else computes. A user whose claim has ended gets a
    PocketlmError at his next step, never another's logits.
    """

    def __init__(self, executor: Executor, engine: Engine | None = None, cache: Any = None, ids: Sequence[int] = ()):
        """`ids`: what the cache holds already."""
        self.executor, self.engine, self.cache = executor, engine or Engine(executor), cache or executor.cache
        self.n_ctx = self.cache.n_ctx
        self.ids = list(ids)
        self._moved: int | None = None  # from which position on keys were moved here from elsewhere, or read
        self.odds = Odds()  # of drafts
        self.note = ""  # what the last `advance` had to do that costs time unexpectedly
        self.lock = ForkedLock()  # who computes holds it
        self._claim: object | None = None  # the present user's; None before the first and after `end`
        self._claiming = ForkedLock()
        self._ended = ""  # why nobody can use this session any more
        self._settle()

    def clear(self) -> None:
        """Forget everything."""
        self._truncate(0)

    def claim(self, cancelled: Callable[[], bool] = lambda: False) -> object | None:
        """From now on the cache is the caller's; what is returned is for `held`. Raises PocketlmError after `end`.

        None where the caller was cancelled: whoever cancelled him may have begun something else by now.
        """
        with self._claiming.here:  # not the other lock: a user between two steps shall not have to be waited for
            claim = None if cancelled() else object()
            self._claim = claim or self._claim
        self.check_open()
        return claim

    def check_open(self) -> None:
        """Raises PocketlmError after `end`."""
        if self._ended:
            raise PocketlmError(self._ended)

    @contextmanager
    def held(self, claim: object) -> Iterator[None]:
        """Nobody else computes inside. Raises PocketlmError where the claim has ended."""
        with self.lock.here:
            self.check(claim)
            yield

    def check(self, claim: object) -> None:
        """Raises PocketlmError where the claim has ended."""
        if self._ended or self._claim is not claim:
            raise PocketlmError(self._ended or TAKEN)

    def end(self, reason: str) -> None:
        """Nobody can use this session any more, `reason` says why; returns when who is computing has stopped."""
        self._ended = reason
        with self.lock.here:
            self._claim = None

    def close(self, reason: str) -> None:
        """`end`, and give the cache's memory back."""
        self.end(reason)
        with self.lock.here:
            self._truncate(0)
            self.cache.release()

    def fork(self) -> Session:
        """A session that goes on from here by itself: the filled part of the cache is copied. PocketlmError after `end`."""
        with self.settled() as (ids, cache):
            other = Session(self.executor, self.engine, cache.fork(len(ids)), ids)
            other._moved = self._moved
            return other

    def borrow(self, other: Session, ids: list[int]) -> None:
        """Copy the longest prefix of `ids` that another session, of the same executor and size, has cached, if it is longer
        than this one's. The copy has the bits that computing it again would give. Copies nothing while the other session
        computes a prompt, so that nobody waits. Raises PocketlmError after `end`.
        """
        claim = self.claim()
        with self.held(claim), other.lock.within(BETWEEN) as got:  # of two that copy from each other one may get nothing
            if not got:
                return
            other.check_open()
            other._settle()
            n = in_common(other.ids[: other.n_exact], ids)
            if n > in_common(self.ids, ids) and other.cache.goes_on_from(n):
                self.clear()
                self.cache.take(other.cache, n)
                self.ids = ids[:n]

    @contextmanager
    def settled(self) -> Iterator[tuple[list[int], Any]]:
        """The ids and the cache, which nobody changes inside. Raises PocketlmError after `end`."""
        with self.lock.here:
            self.check_open()
            self._settle()
            yield self.ids, self.cache

    def fill(self, read: Callable[[Any], Sequence[int]], exactly: bool = False) -> None:
        """Let `read` fill the empty cache; it returns the ids, whose bits may be another executor's unless `exactly`. Whatever
        it raises, the cache is empty then.
        """
        with self.held(self.claim()):
            self.clear()
            try:
                self.ids = list(read(self.cache))
                self._moved = None if exactly else 0
            finally:
                self._settle()

    def all_logits(self, ids: Ids) -> np.ndarray:
        """Logits of every position, float32 (len(ids), n_vocab), computed from an empty cache. Raises PocketlmError."""
        with self.held(self.claim()):
            self.clear()
            ids = check_ids(ids, self.executor.hyper.n_vocab, 0, self.n_ctx)
            logits = np.empty((len(ids), self.executor.hyper.n_vocab), np.float32)
            while (at := len(self.ids)) < len(ids):
                block = ids[at : at + self.executor.block]
                self._forward(block.tolist(), len(block), lambda rows, at=at: np.copyto(logits[at : at + len(rows)], rows))
            return logits

    def append(
        self, id: int, draft: Sequence[int] = (), use: Callable[[np.ndarray], Any] = np.copy, apart: bool = False
    ) -> Sequence[Any]:  # fmt: skip
        """What `use` makes of the logits after one more token and after those of a draft that follows it, in one pass.

        `use` gets float32 (rows, n_vocab), valid only there, one row or more and at most 1 + len(draft), and returns a
        sequence: as many of the tokens stay in the cache as it has elements. `apart`: it gets a copy once the pass is over, and
        may ask other sessions. Raises PocketlmError if the context is too short for all of them.
        """
        self._settle()
        before = len(self.ids)
        result = self._forward([id, *draft], 1 + len(draft), use, apart)[1]
        if len(self.ids) > before + len(result):
            self._truncate(before + len(result))
        return result

    def draw(
        self, id: int, sampler: DrawingSampler, text: array[int], most: int, ends: Set[int] = frozenset()
    ) -> list[tuple[int, float]]:  # fmt: skip
        """One more token, and what is drawn after it and after `text`, which ends with it: one token, or where nobody waits for
        the engine as many as it computes in a row, at most `most` and none after one of `ends`. All but the last of them are in
        the cache then. Raises PocketlmError if the context is too short.
        """
        self._settle()
        most = min(most, sampler.MOST)
        sampler.prepare(text, most, ends)
        try:
            drawn = sampler.take(self.engine.draw(self.cache, id, sampler, most))
            self.ids += [id, *(id for id, _ in drawn[:-1])]
        except BaseException:
            self._settle()
            raise
        return drawn

    def advance(
        self,
        ids: Sequence[int],
        *,
        reuse_cache: bool = True,
        shift: bool = False,
        cancelled: Callable[[], bool] | None = None,
        use: Use = np.copy,
        apart: bool = False,
    ) -> tuple[Any, int]:
        """Make the cache hold exactly `ids`; what `use` makes of the logits after the last of them, float32 (n_vocab,), valid
        only there, and how many were there. `apart`: as for `append`.

        What both have in common at the start is not computed again, except that the last token always is: its logits are
        not kept. With `shift`, text that was taken out of the middle leaves the cache by moving what follows. That is the
        usual approximation: the moved keys and values were computed with the dropped text still in view. It is no
        approximation where the positions are learned, because there all that follows is computed again (see `note`).
        `cancelled` is asked between passes; if it says so, the result is None and the work done stays.

        Raises UsageError for no ids or one outside the vocabulary, PocketlmError for more than the context holds.
        """
        ids = list(map(int, ids))
        self.check_ids(ids)
        self.note = ""
        self._settle()
        if not reuse_cache:
            self.clear()
        same, why = in_common(self.ids, ids), ""
        if shift and same < len(self.ids):
            start, n = _longest_match(ids[same:], self.ids[same:])
            if n >= MIN_SHIFT:
                self._truncate(same + start + n)
                if len(self.ids) == same + start + n and self._remove(same, same + start):
                    same += n
                else:
                    why = "positions are learned" if self.executor.hyper.position == "learned" else "windows slide"
        self._truncate(min(same, len(ids) - 1))
        same = len(self.ids)  # none, if a sliding window needs positions that are no longer cached
        if why:
            n = len(ids) - same
            self.note = f"this model's {why}, so {'1 token was' if n == 1 else f'{n} tokens were'} computed again"
        result = None
        while (at := len(self.ids)) < len(ids):
            if cancelled is not None and cancelled():
                return None, same
            block = ids[at : at + self.executor.block]
            result = self._forward(block, int(at + len(block) == len(ids)), lambda rows: use(rows[0]), apart)[1]
        return result, same

    def company(self) -> Company:
        """Who shares this session's next pass, as far as the last one tells."""
        return self.engine.company(self.cache)

    @property
    def n_exact(self) -> int:
        """How many tokens of the cache have the bits that they would have if they were computed again."""
        return len(self.ids) if self._moved is None else min(self._moved, len(self.ids))

    def check_ids(self, ids: list[int]) -> None:
        """Raises UsageError for no ids or one outside the vocabulary, PocketlmError for more than the context holds."""
        n_vocab, n_ctx = self.executor.hyper.n_vocab, self.n_ctx
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
        return "raise --ctx or " if self.executor.hyper.reaches(self.n_ctx + 1) else ""

    def _forward(self, ids: list[int], rows: int, use: Use, apart: bool = False) -> tuple[int, Any]:
        block = ids if len(ids) == 1 else np.array(ids, np.int32)
        try:
            taken, result = self.engine.run(self.cache, block, rows, np.copy if apart else use)
            self.ids += ids[:taken]
        except BaseException:
            self._settle()
            raise
        return taken, use(result) if apart and result is not None else result

    def _settle(self) -> None:
        """Bring `ids` and the cache to what they have in common, should an interrupt have come between the two."""
        self.engine.forget(self.cache)
        if self.cache.length != len(self.ids):
            self.cache.truncate(len(self.ids))
            del self.ids[self.cache.length :]
        if self._moved is not None and len(self.ids) <= self._moved:
            self._moved = None

    def _truncate(self, length: int) -> None:
        del self.ids[length:]
        self._settle()

    def _remove(self, start: int, stop: int) -> bool:
        # the ids first: if an interrupt comes in the middle of the move, `_settle` gives up all from `start` on
        moved = self.ids[stop:]
        del self.ids[start:]
        self._moved = start if self._moved is None else min(start, self._moved)
        if self.cache.remove(start, stop):
            self.ids += moved
            return True
        return False


def forgotten(n: int) -> str:
    """For a note: that so many tokens of a text are gone from the context."""
    return "the oldest token was forgotten" if n == 1 else f"the oldest {n} tokens were forgotten"


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
