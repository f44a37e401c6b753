"""The engine: what several threads want computed at the same time, merged into passes of one executor.

In: ids that continue a text, its cache, and what to do with the logits, or who draws from them. Out: how many ids were
computed, and what became of the logits. Knows no sessions, no text, and of sampling only who does it.

There is no thread of the engine's own, so a single caller pays nothing for it. Callers queue up; whoever finds nobody leading
leads: waits for a moment for those who took part in the last pass, computes a pass of what is queued then, hands out the
results and goes (flat combining: Hendler, Incze, Shavit and Tzafrir, SPAA 2010). Single tokens, with their drafts,
go first, then as much of the prompts as fits into a pass, so that a long prompt does not stop the others.
Where all in a pass have a token that is drawn in it, and nobody else waits, several passes follow one another.

An interrupt of the leader loses nothing: what is not handed out stays in the queue, and the next leader computes it again.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from threading import get_ident
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketlm import locks
from pocketlm.errors import PocketlmError
from pocketlm.runtime.drafts import MOST_ROWS
from pocketlm.runtime.ids import Ids
from pocketlm.runtime.pass_times import Company, PassTimes
from pocketlm.runtime.threads import closed_lock, open_lock

if TYPE_CHECKING:
    from pocketlm.runtime.executors import Executor

GATHER = 0.25  # of the last pass's time: so long a leader waits for those who were in it; they may be drawing their tokens
LONGEST = 0.005  # seconds of that at most
BURST_SECONDS = 0.05  # of passes in a row where nobody waits for one: their tokens are handed out together
BUSY = "this thread is in the middle of computing an answer; a signal handler sets `cancel`, and the rest waits for the end"
LOOK = 0.05  # seconds until a caller who waits looks for himself: only an interrupt at the one wrong moment needs that

Use = Callable[[np.ndarray], Any]


class _Request:
    """Ids to append to a cache. `done` is set last, when the results are complete."""

    def __init__(self, cache: Any, ids: Ids, rows: int, use: Use, sampler: Any = None, most: int = 1):
        self.cache, self.ids, self.rows, self.use, self.start = cache, ids, rows, use, cache.length
        self.sampler, self.most = sampler, most  # who draws inside the pass, and how many tokens at most
        self.taken = 0
        self.result: Any = None
        self.logits: np.ndarray | None = None  # to be used by the caller himself
        self.error: Exception | None = None
        self.done, self.gate = False, closed_lock()


class Engine:
    """Passes of an executor that several threads share. `close` ends everybody's waiting."""

    def __init__(self, executor: Executor):
        self.executor = executor
        self._ended, self.times, self._forked = "", PassTimes(), locks.ForkedLock()
        self._begin()

    def _begin(self) -> None:
        self._turn = locks.lock()  # whoever holds it leads
        self._leader = 0  # his thread
        self._queue: list[_Request] = []
        self._last: dict[int, int] = {}  # of the last pass: caches, and how many tokens of each; replaced, never changed
        self._missing: set[int] = set()  # those of them that the leader waits for, until he is woken:
        self._arrived = closed_lock()
        self._seconds, self._passes = 0.0, 1  # of the last pass, or of each of several in a row, and how many these were
        self._wanted = ctypes.c_int64()  # 1: somebody has come; passes in a row end
        self._single = False  # whether the next is no row
        self._spare: list[np.ndarray] = []  # for copies of one row of logits: from the system memory comes page by page
        self._pid = os.getpid()  # last: a thread of a forked process that finds it right goes on

    def run(self, cache: Any, ids: Ids, rows: int, use: Use) -> tuple[int, Any]:
        """Append as many of `ids` [n] to the cache as this pass has room for: how many, and what `use` returned for the logits.

        `use` gets the logits of those of the last `rows` ids that were computed, float32 [1 or more, n_vocab], which are valid
        only there; where there are none it is not called, and its result is None. Raises PocketlmError for ids outside the
        vocabulary, for more than the cache holds, and after `close`; nobody else's work suffers from it.
        """
        request = self._wait_for(_Request(cache, ids, rows, use))
        if request.logits is None:
            return request.taken, request.result
        result = use(request.logits)
        if len(request.logits) == 1:
            self._spare.append(request.logits)
        return request.taken, result

    def draw(self, cache: Any, id: int, sampler: Any, most: int) -> int:
        """Append a token, and where nobody waits those that follow, as the executor's `step` draws them: how many were drawn,
        at most `most`. All but the last are in the cache. Raises PocketlmError as `run` does.
        """
        return self._wait_for(_Request(cache, [id], 1, np.copy, sampler, most)).result

    def end_row(self) -> None:
        """Of passes in a row the one that is being made is the last, or where none is, the next."""
        self._single = True  # first: a leader who does not see it any more has begun to look at the other
        self._wanted.value = 1

    def _wait_for(self, request: _Request) -> _Request:
        """The request when it is done. Raises what was raised for it."""
        cache = request.cache
        self.check_thread()
        self.forget(cache)
        self._queue.append(request)
        self._wanted.value = 1
        if missing := self._missing:  # a leader waits, perhaps for this one
            missing.discard(id(cache))
            if not missing:
                open_lock(self._arrived)
        try:
            while not request.done:
                if self._ended:
                    raise PocketlmError(self._ended)
                if self._turn.locked():
                    request.gate.acquire(timeout=LOOK)
                    continue
                with self._turn:
                    if not request.done:
                        self._lead(request)
        except BaseException:
            self.forget(cache)
            raise
        finally:
            if not self._turn.locked():  # the first of those who still wait leads the next pass
                for waiting in self._queue[:1]:
                    open_lock(waiting.gate)
        if request.error is not None:
            raise request.error
        return request

    def company(self, cache: Any) -> Company:
        """Who shares the next pass of a cache, as far as the last pass tells."""
        return Company(self.times, sum(n for other, n in self._last.items() if other != id(cache)))

    def _copy(self, logits: np.ndarray) -> np.ndarray:
        """A copy that outlives the pass."""
        if len(logits) > 1 or not self._spare:
            return logits.copy()
        copy = self._spare.pop()  # nobody else takes one: there is one leader
        np.copyto(copy, logits)
        return copy

    def forget(self, cache: Any) -> None:
        """Take back what is queued for a cache; returns when no pass works on it any more."""
        if os.getpid() != self._pid:  # after a fork only the thread that forked is here, and those that it has started since
            with self._forked.here:
                if os.getpid() != self._pid:
                    self._begin()
        queue = list(self._queue)  # a copy: a leader takes others out meanwhile
        if queue and any(request.cache is cache for request in queue):
            self.check_thread()
            with self._turn:
                self._take_out(cache)

    def check_thread(self) -> None:
        """Raises PocketlmError in a signal handler of the thread that leads a pass: it cannot wait for the end of that."""
        if self._leader == get_ident() and self._turn.locked():  # an interrupt may have left his name there
            raise PocketlmError(BUSY)

    def _take_out(self, cache: Any) -> None:
        for request in [request for request in self._queue if request.cache is cache]:
            self._queue.remove(request)

    def close(self, reason: str) -> None:
        """From now on nothing is computed any more, `reason` says why; those who wait are told at once. Raises PocketlmError as
        `check_thread`.
        """
        self.check_thread()
        self._ended, self._wanted.value = reason, 1
        for request in list(self._queue):
            open_lock(request.gate)

    def _lead(self, own: _Request) -> None:
        """One pass, whose results are handed out. PocketlmError where the request was taken back: by a signal handler."""
        if own not in self._queue:
            raise PocketlmError("this answer ends here: its session was changed in the middle of it")
        try:
            self._leader = get_ident()
            self._pass(own)
        finally:
            self._leader = 0

    def _pass(self, own: _Request) -> None:
        self._gather(own)
        started = perf_counter()
        work, self._passes = self._choose(), 1
        self._compute(work, own)
        self._seconds = (perf_counter() - started) / self._passes
        self._last = {id(request.cache): n for request, n in work}
        if all(request.rows == n for request, n in work):  # a prompt's tokens have no logits, which are a part of the time
            self.times.measured(sum(self._last.values()), self._seconds)

    def _gather(self, own: _Request) -> None:
        """Wait for those who were in the last pass; not for long."""
        if not (missing := self._last.keys() - {id(own.cache)}):
            return
        self._missing = missing
        missing.difference_update([id(request.cache) for request in list(self._queue)])
        until = perf_counter() + min(GATHER * self._seconds * self._passes, LONGEST)
        while missing and (left := until - perf_counter()) > 0:
            self._arrived.acquire(timeout=left)
        self._missing = set()

    def _choose(self) -> list[tuple[_Request, int]]:
        """What is computed now: requests, and how many ids of each."""
        self._wanted.value = 0  # who comes from here on may not be among them
        for request in list(self._queue):
            if request.done:
                self._queue.remove(request)  # the leader who handed it out was interrupted before he did that
        queue, room, work = list(self._queue), self.executor.block, list[tuple[_Request, int]]()
        if len(queue) == 1:
            return [(queue[0], min(len(queue[0].ids), room))]
        # for who waits longest, should that be a prompt, though there be ever so many single tokens
        kept = room // 4 if len(queue[0].ids) > MOST_ROWS else 0
        for request in sorted(queue, key=lambda request: len(request.ids) > MOST_ROWS):  # in the order of arrival
            if request is queue[0]:
                kept = 0
            if free := room - kept:
                work.append((request, min(len(request.ids), free)))
                room -= work[-1][1]
        return work

    def _in_a_row(self, work: Sequence[tuple[_Request, int]]) -> int:
        """How many passes may be made of this one, in which each text has a token that is drawn: several where nobody waits."""
        single, self._single = self._single, False
        if single or len(self._queue) > len(work) or not self._seconds:
            return 1
        seconds = self._seconds * self.times.ratio(sum(self._last.values()), len(work))
        return max(1, min(int(BURST_SECONDS / seconds), *(request.most for request, _ in work)))

    def _compute(self, work: Sequence[tuple[_Request, int]], own: _Request) -> None:
        """The pass. The logits are the executor's memory: a single caller uses them there, several get copies."""
        step = []
        for request, n in work:
            if request.cache.length != request.start:  # a pass that was interrupted came this far
                request.cache.truncate(request.start)
            step.append((request.cache, request.ids[:n], max(0, request.rows - (len(request.ids) - n))))
        samplers = [request.sampler for request, _ in work]
        try:
            most = self._in_a_row(work) if all(samplers) else 1
            logits, self._passes = self.executor.step(step, samplers, most, self._wanted)
        except Exception as error:
            if len(work) > 1:  # one of them is to blame, the others are not
                for one in work:
                    self._compute([one], own)
                return
            work[0][0].error = error
            logits = [None]
        for (request, n), found in zip(work, logits, strict=True):
            request.taken = n
            if request.sampler:
                request.result = self._passes
            elif found is not None and len(found):
                if len(work) == 1 and request is own:
                    request.result = request.use(found)
                else:
                    request.logits = self._copy(found)
            request.done = True
            self._queue.remove(request)
            if request is not own:
                open_lock(request.gate)
