"""Tokens drawn inside passes, several in a row: the same answers, nothing computed too much, and nobody else waits for them."""

import ctypes
import math
import random
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import test_drafts
from native_calls import compiled, each_level, executors, host_level
from operation_lists import LISTS, tensors_of
from test_drafts import answer, random_options, random_prompt
from test_native_draw import CHAINS

from pocketlm.cancel import Cancel
from pocketlm.errors import PocketlmError
from pocketlm.runtime import engine as engine_module
from pocketlm.runtime.engine import Engine
from pocketlm.runtime.generator import NoText, generate
from pocketlm.runtime.memory import aligned
from pocketlm.runtime.native import next_token, sizes
from pocketlm.runtime.native.executor import NativeExecutor
from pocketlm.runtime.native.ir import I64, PTR, Module
from pocketlm.runtime.native.levels import host_abi
from pocketlm.runtime.native.linker import load
from pocketlm.runtime.native.records import RUN
from pocketlm.runtime.native.sizes import MAX_PASSES, SPAN
from pocketlm.runtime.sampling import make_sampler
from pocketlm.runtime.session import Session

PROMPT = [1, 2, 3]
SAMPLED = {"temperature": 0.8, "top_k": 40, "seed": 5, "repeat_penalty": 1.1}


@pytest.fixture(autouse=True)
def long_bursts(monkeypatch):
    monkeypatch.setattr(engine_module, "BURST_SECONDS", 1e9)


@pytest.fixture
def undisturbed(native, monkeypatch):
    """Nothing ends a row but what the test does, however busy the machine is."""
    monkeypatch.setattr(native, "single", None)  # no measurements, which are single passes,
    monkeypatch.setattr(native._n_running, "value", 1)  # and no late thread, which ends a row, too,
    monkeypatch.setattr(native._workers, "_adapt", lambda: None)  # nor one that is taken in again


@pytest.fixture
def rows(native, monkeypatch):
    """(texts, passes) of every run in which somebody draws."""
    found, step = [], native.step

    def noted(work, samplers=(), *rest):
        result = step(work, samplers, *rest)
        if any(samplers):
            found.append((len(work), result[1]))
        return result

    monkeypatch.setattr(native, "step", noted)
    return found


def outside(executor, *prompts, **options):
    """The answers whose tokens are drawn from logits, by calls of a sampler that can do nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_drafts, "make_sampler", lambda **options: partial(make_sampler(**options)))
        return [answer(executor, prompt, draft=False, **options)[0] for prompt in prompts]


def start(session, **options):
    executor = session.executor
    rules = {name: options.pop(name) for name in ("max_tokens", "end_ids", "cancel", "draft") if name in options}
    sampler = make_sampler(n_vocab=executor.hyper.n_vocab, selection=executor.new_selection(), **{**SAMPLED, **options})
    return generate(session, PROMPT, sampler, NoText(), **{"draft": False, **rules})


def new_session(native, n_ctx=None, engine=None):
    return Session(native, engine, native.new_cache(n_ctx))


def ids_of(pieces):
    return [piece.id for piece in pieces if piece.id >= 0]


def alone(native, n):
    return outside(native, PROMPT, max_tokens=n, **SAMPLED)[0][0]


@pytest.mark.parametrize("seconds", [0, 1e9], ids=["one by one", "in a row"])
def test_no_answer_is_changed(native, rows, monkeypatch, seconds):
    monkeypatch.setattr(engine_module, "BURST_SECONDS", seconds)
    rng = np.random.default_rng(5)
    for _ in range(60):
        prompt, options = random_prompt(rng), random_options(rng)
        (expected,) = outside(native, prompt, **options)
        assert answer(native, prompt, draft=False, **options)[0] == expected, (prompt, options)
        assert answer(native, prompt, draft=True, **options)[0] == expected, (prompt, options)
    assert (max(passes for _, passes in rows) > 1) == (seconds > 0)


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_every_chain_has_rows_and_numpys_tokens(native, rows, chain):
    options = {**SAMPLED, "logit_bias": {7: -math.inf, 9: 1.0}, "max_tokens": 60, **chain}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_drafts, "make_sampler", lambda selection, **options: make_sampler(**options))
        expected = answer(native, PROMPT, draft=False, **options)[0]
    assert not rows
    assert answer(native, PROMPT, draft=False, **options)[0][0] == expected[0]
    assert max(passes for _, passes in rows) > 1


@each_level
def test_nor_on_any_level_where_rows_end_anywhere(level, monkeypatch):
    monkeypatch.setattr(Engine, "_in_a_row", random_rows(3))
    native, reference = executors(level, "Q4_0", 2, n_vocab=60)
    reference.close()
    options = {**SAMPLED, "max_tokens": 50, "frequency_penalty": 0.3, "repeat_last_n": 7}
    assert answer(native, PROMPT, draft=False, **options)[0] == outside(native, PROMPT, **options)[0]
    native.close()


def random_rows(seed):
    """In place of Engine._in_a_row: any number."""
    n = random.Random(seed)

    def some(self, work):
        most = min(n.randint(1, MAX_PASSES), *(request.most for request, _ in work))
        return most if len(self._queue) == len(work) else 1

    return some


@pytest.mark.parametrize("name", LISTS)
def test_any_kind_of_model_across_spans(name, monkeypatch):
    """Windows, rings, convolutions, experts, the token before: what a pass needs to know moves on with the token."""
    monkeypatch.setattr(Engine, "_in_a_row", random_rows(name))
    plan = LISTS[name]()
    native = NativeExecutor(plan, tensors_of(plan), 5 * SPAN, 2)
    options = {**SAMPLED, "max_tokens": 5 * SPAN - 9}  # a window's ring goes round
    try:
        assert answer(native, PROMPT, draft=False, **options)[0] == outside(native, PROMPT, **options)[0]
    finally:
        native.close()


def test_several_at_once_get_what_they_get_alone(native, rows):
    prompts, engine = [[i, i + 1, i + 2] for i in range(8)], Engine(native)
    expected = [outside(native, prompt, max_tokens=60, **SAMPLED)[0] for prompt in prompts]
    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda p: answer(native, p, draft=False, engine=engine, max_tokens=60, **SAMPLED)[0], prompts))
        assert got == expected
    assert any(texts > 1 and passes > 1 for texts, passes in rows)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 17, 18, 40])
def test_nothing_is_computed_that_is_not_asked_for(native, rows, n):
    session, expected = new_session(native), alone(native, n)
    assert ids_of(start(session, max_tokens=n)) == expected
    assert session.ids == PROMPT + expected[:-1]
    assert sum(passes for _, passes in rows) == max(0, n - 1)  # the first is drawn after the prompt


def test_an_end_token_ends_it(native):
    session, said = new_session(native), alone(native, 30)
    at = next(i for i in range(5, 30) if said[i] not in said[:i])
    assert ids_of(start(session, end_ids={said[at]})) == said[:at]
    assert session.ids == PROMPT + said[:at]
    assert session.cache.length == len(session.ids)


@pytest.mark.parametrize("room", [1, 2, 3, 9])
def test_a_full_context_ends_it(native, room):
    *pieces, last = start(new_session(native, len(PROMPT) + room))
    assert (ids_of(pieces), last.finish_reason) == (alone(native, room + 1), "length")


def test_cancelled_in_the_middle(native, monkeypatch):
    session, cancel, step = new_session(native), threading.Event(), native.step
    monkeypatch.setattr(native, "step", lambda *work: (any(work[1]) and cancel.set(), step(*work))[1])
    *_, last = start(session, cancel=cancel)
    assert last.finish_reason == "cancelled"
    cancel.clear()
    assert ids_of(start(session, max_tokens=20)) == alone(native, 20)


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize(("event", "passes"), [(Cancel, 1), (threading.Event, MAX_PASSES)])
def test_a_cancellation_ends_the_row_where_it_is_heard(native, rows, monkeypatch, event, passes):
    session, cancel, step = new_session(native), event(), native.step

    def cancelled(work, samplers=(), most=1, wanted=None):
        if most == MAX_PASSES:  # a row begins
            cancel.set()
        return step(work, samplers, most, wanted)

    monkeypatch.setattr(native, "step", cancelled)
    *_, last = start(session, cancel=cancel)
    assert last.finish_reason == "cancelled"
    assert rows[-1] == (1, passes)
    assert ids_of(start(new_session(native), max_tokens=20, cancel=event())) == alone(native, 20)


@pytest.mark.usefixtures("undisturbed")
def test_nor_is_a_cancellation_lost_before_the_row_begins(native, rows, monkeypatch):
    session, cancel, calls = new_session(native), Cancel(), []
    gather = session.engine._gather

    def cancelled(own):
        gather(own)
        calls.append(own)
        if len(calls) == 3:
            cancel.set()

    monkeypatch.setattr(session.engine, "_gather", cancelled)
    *_, last = start(session, cancel=cancel)
    assert (last.finish_reason, len(calls), rows[-1]) == ("cancelled", 3, (1, 1))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_interrupted_in_the_middle(native, monkeypatch, at, behind):
    monkeypatch.setattr(sizes, "MAX_PASSES", 16)  # so that there are four passes
    session, step, count = new_session(native), native.step, []

    def interrupted(*work):
        count.append(1)
        result = step(*work) if behind else None
        if len(count) == at:
            raise KeyboardInterrupt
        return result or step(*work)

    with monkeypatch.context() as patch:
        patch.setattr(native, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(start(session, max_tokens=50))
    assert session.ids == (PROMPT + alone(native, 50))[: len(session.ids)]
    assert ids_of(start(session, max_tokens=50)) == alone(native, 50)


def test_an_interrupt_of_who_leads_changes_nothing_for_the_other(native, monkeypatch):
    """What was drawn for the other is drawn again, with the same random numbers, in another pass."""
    engine, step, expected, once = Engine(native), native.step, alone(native, 60), []

    def interrupted(work, samplers=(), *rest):
        result = step(work, samplers, *rest)
        if len(work) == 2 and result[1] > 1 and not once:
            once.append(1)
            raise KeyboardInterrupt
        return result

    def run(session):
        try:
            return ids_of(start(session, max_tokens=60))
        except KeyboardInterrupt:
            return None

    monkeypatch.setattr(native, "step", interrupted)
    monkeypatch.setattr(engine_module, "LONGEST", 1)
    monkeypatch.setattr(engine_module, "GATHER", 1e9)  # both are in every pass
    while not once:  # the two may miss each other, one having said all before the other begins
        with ThreadPoolExecutor(2) as pool:
            said = list(pool.map(run, [new_session(native, engine=engine) for _ in range(2)]))
    assert None in said
    assert expected in said


def test_closed_in_the_middle(native):
    session = new_session(native)
    pieces = start(session)
    assert [next(pieces).id for _ in range(3)] == alone(native, 3)
    pieces.close()
    assert session.cache.length == len(session.ids)
    assert ids_of(start(session, max_tokens=20)) == alone(native, 20)


@pytest.mark.usefixtures("undisturbed")
def test_who_comes_is_in_the_next_pass(native, monkeypatch):
    engine, step, seen = Engine(native), native.step, []
    first, second = new_session(native, engine=engine), new_session(native, engine=engine)
    other = threading.Thread(target=lambda: list(start(second, max_tokens=4)))

    def noted(work, samplers=(), most=1, wanted=None):
        if first.cache.length == 3 + MAX_PASSES and not other.ident:
            other.start()
            while len(engine._queue) < 2:  # it waits for a pass
                pass
        result = step(work, samplers, most, wanted)
        seen.append((len(work), most, result[1]))
        return result

    monkeypatch.setattr(native, "step", noted)
    assert ids_of(start(first, max_tokens=60)) == alone(native, 60)
    other.join()
    assert seen[:4] == [(1, 1, 1), (1, MAX_PASSES, MAX_PASSES), (1, 59 - MAX_PASSES, 1), (2, 1, 1)]


@pytest.mark.parametrize(("lost", "goes_on"), [(0, 1), (249, 1), (251, 0)])
def test_a_row_ends_where_much_time_is_lost(lost, goes_on):
    """In waiting for a late thread; a little is lost wherever one had to wake up."""
    module = Module(host_abi())
    next_token.define(module)
    with module.function("goes_on", {"run": PTR, "elapsed": I64}, returns=I64, linkage="entry") as f:
        f.ret(f.call(I64, "follow", *f.args()))
    code = load(compiled(module, host_level()))
    run, wanted = aligned(1, RUN), ctypes.c_int64()
    run["most"], run["lost"], run["wanted"] = 2, lost, ctypes.addressof(wanted)
    follow = code.function("goes_on", ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
    assert follow(run.ctypes.data, 1000) == goes_on
    code.close()


def test_no_token_left_is_the_same_error(native):
    nothing = dict.fromkeys(range(60), -math.inf)
    sampler = make_sampler(n_vocab=60, selection=native.new_selection(), logit_bias=nothing)
    session = new_session(native)
    session.advance(PROMPT)
    with pytest.raises(PocketlmError, match="no token is left"):
        session.draw(4, sampler, array("i", [*PROMPT, 4]), 5)
    assert session.cache.length == len(session.ids)


@pytest.mark.usefixtures("undisturbed")
def test_a_pass_takes_what_it_takes(native, monkeypatch):
    """What is known of times is of one pass, not of all in a row."""
    clock, session, step = [0.0], new_session(native), native.step
    monkeypatch.setattr(engine_module, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(engine_module, "BURST_SECONDS", 0.055)
    seen = []

    def slow(*work):
        result = step(*work)
        clock[0] += 0.01 * result[1]
        seen.append(result[1])
        return result

    monkeypatch.setattr(native, "step", slow)
    list(start(session, max_tokens=40))
    assert session.engine._seconds == pytest.approx(0.01)
    assert set(seen[2:-1]) == {5}


def test_what_was_drawn_before_a_broken_one_is_handed_out(native, rows):
    """As if passes were made one by one: the error comes with the token that it is about."""
    tables = [table.copy() for table in native._tables.values()]
    for table in native._tables.values():
        table[9] = math.nan  # positions from here on have no logits
    session, ids = new_session(native), list[int]()
    try:
        with pytest.raises(PocketlmError, match="NaN"):
            ids.extend(piece.id for piece in start(session))
    finally:
        for table, was in zip(native._tables.values(), tables, strict=True):
            table[...] = was
    said = alone(native, 20)
    assert ids == said[:7]
    assert max(passes for _, passes in rows) > 1
    assert session.cache.length == len(session.ids)
    assert ids_of(start(session, max_tokens=20)) == said
