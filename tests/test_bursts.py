"""Several tokens in a row for one who is alone: the same answers, and nobody else waits for them."""

import threading

import numpy as np
import pytest
from fake_executor import FakeExecutor
from native_calls import executors, host_level
from test_drafts import answer, random_options, random_prompt

from pocketlm.runtime import engine as engine_module
from pocketlm.runtime.engine import Engine
from pocketlm.runtime.generator import NoText, generate
from pocketlm.runtime.sampling import make_sampler
from pocketlm.runtime.session import Session

PROMPT = [1, 2, 3]


@pytest.fixture(autouse=True)
def long_bursts(monkeypatch):
    monkeypatch.setattr(engine_module, "BURST_SECONDS", 1e9)


def start(session, **options):
    sampler = make_sampler(n_vocab=session.executor.hyper.n_vocab, temperature=0, repeat_penalty=1)
    return generate(session, PROMPT, sampler, NoText(), **options)


def ids_of(pieces):
    return [piece.id for piece in pieces if piece.id >= 0]


def alone(n):
    """What the fake says, one token at a time."""
    executor, ids = FakeExecutor(), list(PROMPT)
    for _ in range(n):
        ids.append(int(executor.logits(ids).argmax()))
    return ids[len(PROMPT) :]


def test_no_answer_is_changed(monkeypatch):
    executor, reference = executors(host_level(), "Q4_0", 2, n_vocab=60)
    reference.close()
    rng = np.random.default_rng(5)
    try:
        for _ in range(60):
            prompt, options = random_prompt(rng), random_options(rng)
            monkeypatch.setattr(engine_module, "BURST", 1)
            expected, _ = answer(executor, prompt, draft=False, **options)
            monkeypatch.setattr(engine_module, "BURST", 16)
            assert answer(executor, prompt, draft=False, **options)[0] == expected, (prompt, options)
            assert answer(executor, prompt, draft=True, **options)[0] == expected, (prompt, options)
    finally:
        executor.close()


@pytest.mark.parametrize("n", [0, 1, 2, 5, 17, 18, 40])
def test_nothing_is_computed_that_is_not_asked_for(n):
    session = Session(FakeExecutor())
    assert ids_of(start(session, max_tokens=n)) == alone(n)
    assert session.executor.fed == [len(PROMPT)] + [1] * (n - 1)
    assert session.ids == session.executor.cache.ids == PROMPT + alone(n)[:-1]


def test_an_end_token_ends_it():
    session, said = Session(FakeExecutor()), alone(9)
    assert ids_of(start(session, end_ids={said[6]})) == said[:6]
    assert session.executor.cache.ids == PROMPT + said[:6]


@pytest.mark.parametrize("room", [1, 2, 3, 9])
def test_a_full_context_ends_it(room):
    session = Session(FakeExecutor(n_ctx=len(PROMPT) + room))
    *pieces, last = start(session)
    assert (ids_of(pieces), last.finish_reason) == (alone(room + 1), "length")


def test_cancelled_in_the_middle():
    session, cancel = Session(FakeExecutor()), threading.Event()
    session.executor.before = lambda ids: cancel.set() if session.executor.cache.length == 8 else None
    *_, last = start(session, cancel=cancel)
    assert last.finish_reason == "cancelled"
    assert session.executor.cache.length == 8
    session.executor.before = lambda ids: None
    cancel.clear()
    assert ids_of(start(session, max_tokens=20, cancel=cancel)) == alone(20)


@pytest.mark.parametrize("at", [5, 6, 11])
def test_interrupted_in_the_middle(at):
    session = Session(FakeExecutor())

    def interrupt(ids):
        if session.executor.cache.length == at:
            raise KeyboardInterrupt

    session.executor.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        list(start(session, max_tokens=30))
    session.executor.before = lambda ids: None
    assert session.ids == (PROMPT + alone(30))[: len(session.ids)]
    assert ids_of(start(session, max_tokens=30)) == alone(30)


def test_closed_in_the_middle():
    session = Session(FakeExecutor())
    pieces = start(session)
    assert [next(pieces).id for _ in range(3)] == alone(3)
    pieces.close()
    assert session.ids == session.executor.cache.ids
    assert ids_of(start(session, max_tokens=20)) == alone(20)


def test_who_comes_is_in_the_next_pass():
    executor = FakeExecutor()
    engine = Engine(executor)
    first, second = (Session(executor, engine, executor.new_cache()) for _ in range(2))
    other = threading.Thread(target=lambda: list(start(second, max_tokens=4)))

    def before(ids):
        if first.cache.length == 9 and not other.ident:
            other.start()
            while len(engine._queue) < 2:  # it waits for a pass
                pass

    executor.before = before
    assert ids_of(start(first, max_tokens=40)) == alone(40)
    other.join()
    assert executor.passes[:7] == [[len(PROMPT)]] + [[1]] * 6  # the first one's prompt, and up to where the second came
    assert len(PROMPT) in executor.passes[7]


def test_a_pass_takes_what_it_takes(monkeypatch):
    """What is known of times is of one pass, not of all in a row."""
    clock, session = [0.0], Session(FakeExecutor())
    monkeypatch.setattr(engine_module, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(engine_module, "BURST_SECONDS", 0.05)

    def before(ids):
        clock[0] += 0.01 * len(ids)

    session.executor.before = before
    list(start(session, max_tokens=40))
    assert session.engine._seconds == pytest.approx(0.01)
    assert session.engine.burst in (4, 5)
