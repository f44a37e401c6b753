"""The engine: who computes with others gets what he gets alone; nobody waits for longer than a pass, or for ever."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from fake_executor import FakeExecutor, mixed
from interrupts import needs_timer, signal_storm

from pocketlm.errors import PocketlmError
from pocketlm.runtime import engine as engine_module
from pocketlm.runtime import session as session_module
from pocketlm.runtime.engine import Engine
from pocketlm.runtime.session import Session


class Crowd:
    """An executor whose passes take a moment, and sessions on it."""

    def __init__(self, n: int, seconds: float = 0.001, block: int = 128):
        self.executor = FakeExecutor(n_ctx=100_000)
        self.executor.block = block
        self.engine = Engine(self.executor)
        self.sessions = [self.session() for _ in range(n)]
        self.executor.before = lambda ids: time.sleep(seconds)

    def session(self) -> Session:
        return Session(self.executor, self.engine, self.executor.new_cache())

    def count_passes(self) -> Counter[object]:
        """For each cache, how many passes are composed from now on while its work is in the queue: a thread that the system
        does not let run has queued nothing, and is no matter of the engine's.
        """
        choose, counts = self.engine._choose, Counter[object]()

        def counting():
            counts.update([request.cache for request in list(self.engine._queue)])
            return choose()

        self.engine._choose = counting
        return counts


def greedy(session: Session, ids: list[int], n: int) -> list[int]:
    """The n ids after `ids`, in the session."""
    said = [session.advance(ids, use=lambda logits: int(logits.argmax()))[0]]
    while len(said) < n:
        said += session.append(said[-1], use=lambda rows: rows.argmax(-1).tolist())
    return said


def expected(ids: list[int], n: int) -> list[int]:
    ids, start = list(ids), len(ids)
    for _ in range(n):
        ids.append(mixed(ids) % 300)
    return ids[start:]


def goes_on(session: Session, stop: threading.Event) -> bool:
    """Whether what it says until it is told to stop is right."""
    said = greedy(session, [1, 2, 3], 1)
    while not stop.is_set():
        said += session.append(said[-1], use=lambda rows: rows.argmax(-1).tolist())
    return said == expected([1, 2, 3], len(said))


def together(*jobs: Callable[[], object]) -> list[object]:
    """What they return or raise, each in a thread of its own."""
    results: list[object] = [None] * len(jobs)

    def run(i: int) -> None:
        try:
            results[i] = jobs[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
    return results


def test_each_gets_what_he_gets_alone_and_passes_are_shared():
    crowd, rng = Crowd(8), random.Random(1)
    prompts = [[rng.randrange(300) for _ in range(rng.randint(1, 400))] for _ in crowd.sessions]
    jobs = [lambda s=s, ids=ids: greedy(s, ids, 30) for s, ids in zip(crowd.sessions, prompts, strict=True)]
    assert together(*jobs) == [expected(ids, 30) for ids in prompts]
    shared = [work for work in crowd.executor.passes if len(work) > 1]
    assert sum(map(len, shared)) > len(crowd.executor.passes)  # far from one pass a token and caller
    assert all(sum(work) <= 128 for work in crowd.executor.passes)


def test_one_caller_uses_the_executors_own_memory_and_several_get_copies():
    crowd, seen = Crowd(2), []

    def look(logits: np.ndarray) -> None:
        seen.append(np.shares_memory(logits, crowd.executor._memory))

    crowd.sessions[0].advance([1, 2, 3], use=look)
    assert seen == [True]
    seen.clear()
    arrived, step = threading.Event(), crowd.executor.step

    def slow(*work):  # the first pass lasts until both others are queued
        arrived.wait(10)
        return step(*work)

    crowd.executor.step = slow
    third = crowd.session()

    def opens() -> None:
        while len(crowd.engine._queue) < 3:
            time.sleep(0.001)
        arrived.set()

    together(*[lambda s=s: s.advance([5, 6], use=look) for s in (*crowd.sessions, third)], opens)
    assert sorted(map(len, crowd.executor.passes[1:])) == [1, 2]
    assert sorted(seen) == [False, False, True]


def test_the_first_token_of_a_ninth_comes_within_two_passes():
    crowd, stop = Crowd(8), threading.Event()
    counts = crowd.count_passes()

    def comes() -> list[int]:
        waits = []
        for n in range(100, 120):
            time.sleep(0.01)
            ninth = crowd.session()
            assert greedy(ninth, [7] * n, 1) == expected([7] * n, 1)
            waits.append(counts[ninth.cache])
        stop.set()
        return waits

    *right, waits = together(*[lambda s=s: goes_on(s, stop) for s in crowd.sessions], comes)
    assert right == [True] * 8
    assert waits == [1] * 20  # the first that begins after it has come


def test_a_long_prompt_does_not_stop_the_others():
    crowd, stop = Crowd(3), threading.Event()
    long, *others = crowd.sessions
    counts = crowd.count_passes()

    def reads() -> list[int]:
        time.sleep(0.02)
        try:
            return greedy(long, [9] * 5000, 1)
        finally:
            stop.set()

    assert together(*[lambda s=s: goes_on(s, stop) for s in others], reads) == [True, True, expected([9] * 5000, 1)]
    chunks = [work for work in crowd.executor.passes if max(work) > 100]
    assert len(chunks) >= 5000 // 128
    assert sum(1 in work for work in chunks) >= len(chunks) // 8  # nearly all take the others along, where those come in time
    assert all(counts[other.cache] == len(other.ids) - 2 for other in others), "who has come waits for no second pass"
    assert max(map(sum, chunks)) <= 128


@pytest.mark.parametrize("bad", [[300], [-1], [1] * 100_001, []], ids=["unknown", "negative", "too many", "none"])
def test_an_error_is_that_callers_only(bad):
    crowd = Crowd(4)
    runs = [lambda s=s: greedy(s, [4, 5, 6], 40) for s in crowd.sessions]
    ids = np.array(bad, np.int32)

    def fails() -> str:
        for _ in range(30):
            cache = crowd.executor.new_cache(50)
            with pytest.raises(PocketlmError) as error:
                crowd.engine.run(cache, ids, 1, np.copy)
            assert "\n" not in str(error.value)
            assert cache.ids == []
        return "as it should"

    *answers, errors = together(*runs, fails)
    assert answers == [expected([4, 5, 6], 40)] * 4
    assert errors == "as it should"


def test_what_a_sampler_raises_is_its_callers_only():
    crowd = Crowd(4)

    def fails(session: Session) -> str:
        for _ in range(20):
            with pytest.raises(ZeroDivisionError):
                session.advance([1, 2, 3], use=lambda logits: 1 / 0)
        return greedy(session, [4, 5, 6], 10)

    first, *others = crowd.sessions
    assert together(lambda: fails(first), *[lambda s=s: greedy(s, [4, 5, 6], 40) for s in others]) == [
        expected([4, 5, 6], 10), *[expected([4, 5, 6], 40)] * 3,
    ]  # fmt: skip


# ---- interrupts -----------------------------------------------------------------------------------------------------


class Neighbours:
    """Sessions that go on in threads of their own and look at every token."""

    def __init__(self, crowd: Crowd, sessions: list[Session]):
        self.stop, self.wrong, self.tokens = threading.Event(), list[object](), 0
        self.threads = [threading.Thread(target=self.live, args=(crowd, s), daemon=True) for s in sessions]
        for thread in self.threads:
            thread.start()

    def live(self, crowd: Crowd, session: Session) -> None:
        try:
            while not self.stop.is_set():
                if (said := greedy(session, [8, 9], 20)) != expected([8, 9], 20):
                    self.wrong.append(said)
                self.tokens += 20
        except BaseException as error:
            self.wrong.append(error)

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self.threads), "somebody waits for ever"
        assert self.wrong == []


@needs_timer
@pytest.mark.parametrize("company", [0, 3])
def test_a_storm_of_interrupts_loses_nobodys_work(company):
    """Real signals: a tracer would raise between the end of a `with` block and the lock's release, where Python never does."""
    crowd = Crowd(1 + company, seconds=0.0005)
    mine, *others = crowd.sessions
    neighbours = Neighbours(crowd, others)

    def check() -> None:
        assert greedy(mine, [1, 2, 3], 3) == expected([1, 2, 3], 3)

    storm = signal_storm(lambda: greedy(mine, [1, 2, 4], 20), check, 30, 5, engine_module, session_module)
    assert storm >= 30
    neighbours.end()
    assert neighbours.tokens > 0 or not company
    assert crowd.engine._queue == []


# ---- the end --------------------------------------------------------------------------------------------------------


def test_close_ends_everybodys_waiting_with_one_line():
    crowd, computing, go = Crowd(4), threading.Event(), threading.Event()

    def blocks(ids: list[int]) -> None:
        computing.set()
        go.wait(10)

    crowd.executor.before = blocks

    def closes() -> None:
        computing.wait(10)
        while len(crowd.engine._queue) < 4:
            time.sleep(0.001)
        crowd.engine.close("this model is closed; load it again")
        go.set()

    *ends, _ = together(*[lambda s=s: greedy(s, [1, 2], 5) for s in crowd.sessions], closes)
    assert [str(error) for error in ends] == ["this model is closed; load it again"] * 4


@pytest.mark.parametrize("what", ["close", "the engine's close", "fork", "advance", "clear"])
def test_who_interrupts_his_own_pass_is_told_that_he_cannot_wait_for_its_end(what):
    """As a signal handler does, which runs in the thread that it interrupts."""
    crowd = Crowd(2)
    mine, other = crowd.sessions
    handlers: dict[str, Callable[[], object]] = {
        "close": lambda: mine.close("closed"), "the engine's close": lambda: crowd.engine.close("closed"), "fork": mine.fork,
        "advance": lambda: other.advance([1]), "clear": mine.clear,
    }  # fmt: skip

    def handle(ids: list[int]) -> None:
        crowd.executor.before = lambda ids: None
        handlers[what]()

    crowd.executor.before = handle
    (error,) = together(lambda: greedy(mine, [1, 2], 3))
    assert "signal handler" in str(error)
    assert together(lambda: greedy(other, [1, 2], 3)) == [expected([1, 2], 3)]


def test_who_waits_for_a_pass_and_is_taken_back_is_told():
    crowd, computing, go = Crowd(2), threading.Event(), threading.Event()
    first, second = crowd.sessions

    def blocks(ids: list[int]) -> None:
        computing.set()
        go.wait(10)

    def takes_back() -> None:
        computing.wait(10)
        while len(crowd.engine._queue) < 2:
            time.sleep(0.001)
        crowd.engine._take_out(second.cache)  # as `forget` does once the pass is over
        go.set()

    def waits() -> list[int]:
        computing.wait(10)
        return greedy(second, [1, 2], 2)

    crowd.executor.before = blocks
    said, error, _ = together(lambda: greedy(first, [1, 2], 2), waits, takes_back)
    assert said == expected([1, 2], 2)
    assert "in the middle of it" in str(error)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_computes_though_a_pass_was_going_on(recwarn):
    crowd = Crowd(3, seconds=0.002)
    mine, *others = crowd.sessions
    neighbours = Neighbours(crowd, others)
    time.sleep(0.02)
    for _ in range(5):
        pid = os.fork()
        if not pid:
            try:
                os._exit(0 if greedy(mine, [1, 2, 3], 3) == expected([1, 2, 3], 3) else 1)
            finally:
                os._exit(2)
        until, status = time.monotonic() + 30, 0
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > until:
                os.kill(pid, 9)
            time.sleep(0.002)
        status = done[1]
        assert os.waitstatus_to_exitcode(status) == 0
    neighbours.end()


def test_what_is_taken_back_is_found_behind_what_is_handed_out_at_that_moment():
    engine = Crowd(1).engine

    class Leaving:
        """A request that a leader takes from the queue while another thread looks through that."""

        @property
        def cache(self) -> None:
            if self in engine._queue:
                engine._queue.remove(self)

    mine = SimpleNamespace(cache=object())
    engine._queue += [Leaving(), mine]
    engine.forget(mine.cache)
    assert not engine._queue


def test_a_prompt_is_computed_though_there_are_more_single_tokens_than_a_pass_takes():
    crowd, stop = Crowd(9, block=4), threading.Event()
    counts = crowd.count_passes()

    def goes_on(session: Session) -> None:
        session.advance([1])
        while not stop.is_set() and len(session.ids) < 5000:
            session.append(3)

    def asks() -> int:
        while len(crowd.executor.passes) < 20:
            time.sleep(0.001)
        crowd.sessions[8].advance(list(range(10)))
        stop.set()
        return counts[crowd.sessions[8].cache]

    *_, n_passes = together(*[lambda s=s: goes_on(s) for s in crowd.sessions[:8]], asks)
    assert n_passes < 60


def test_copies_of_logits_are_used_again_and_only_those_of_one_row_stay():
    crowd = Crowd(4)

    def drafts(session: Session) -> list[int]:
        said = [session.advance([1, 2, 3], use=lambda logits: int(logits.argmax()))[0]]
        while len(said) < 60:  # a draft that is refused: a pass of four rows of which one token stays
            draft = [] if len(said) % 2 else [0, 0, 0]
            said += session.append(said[-1], draft, use=lambda rows: rows.argmax(-1).tolist()[:1])
        return said

    assert together(*[lambda s=s: drafts(s) for s in crowd.sessions]) == [expected([1, 2, 3], 60)] * 4
    assert 1 <= len(crowd.engine._spare) <= 4
    assert all(len(copy) == 1 for copy in crowd.engine._spare)
