"""`async for` over answers: the same pieces, other coroutines go on meanwhile, and who leaves ends the work."""

import asyncio
import gc
import threading
import time
import weakref
from contextlib import suppress

import pytest
from serving import tiny_chat, wait_until

import pocketlm
from pocketlm.asynchronous import Handover, _Post, in_thread
from pocketlm.errors import PocketlmError, UsageError

QUESTION = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with pocketlm.load(tiny_chat(tmp_path_factory.mktemp("async")), threads=1) as model:
        yield model


async def ids_of(stream):
    return [piece.id async for piece in stream]


def test_the_pieces_are_those_of_the_plain_stream(model):
    options = {"max_tokens": 12, "temperature": 0}
    assert asyncio.run(ids_of(model.achat(QUESTION, **options))) == [p.id for p in model.chat(QUESTION, **options)]
    assert asyncio.run(ids_of(model.agenerate("the", **options))) == [p.id for p in model.generate("the", **options)]


def test_streams_of_several_sessions_go_on_at_the_same_time(model):
    alone = [p.id for p in model.chat(QUESTION, max_tokens=30, temperature=0)]

    async def together():
        sessions = [model.session() for _ in range(9)]
        return await asyncio.gather(*(ids_of(s.achat(QUESTION, max_tokens=30, temperature=0)) for s in sessions))

    assert asyncio.run(together()) == [alone] * 9


def test_other_coroutines_go_on_while_a_pass_is_computed(model, monkeypatch):
    step, inside, leave = model.executor.step, threading.Event(), threading.Event()

    def slow(*work):
        inside.set()
        assert leave.wait(30)
        return step(*work)

    monkeypatch.setattr(model.executor, "step", slow)

    async def others():
        stream = asyncio.ensure_future(ids_of(model.agenerate("the", max_tokens=2)))
        while not inside.is_set():
            await asyncio.sleep(0.001)
        leave.set()  # reached although the pass waits for it
        return await stream

    assert len(asyncio.run(others())) == 3


@pytest.mark.parametrize("how", ["break", "cancel"])
def test_who_leaves_ends_the_answer(model, how, monkeypatch):
    session, step = model.session(), model.executor.step
    # else it is done before
    monkeypatch.setattr(model.executor, "step", lambda *work: (any(work[1]) and time.sleep(0.02), step(*work))[1])

    async def leave():
        async def read():
            async for _ in session.agenerate("the", ignore_eos=True, temperature=0):
                if how == "break":
                    break

        reading = asyncio.ensure_future(read())
        await asyncio.sleep(0.02)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    asyncio.run(leave())
    wait_until(lambda: not any(thread.name == "pocketlm-stream" for thread in threading.enumerate()))
    assert session.context_used < 512
    assert list(session.generate("the", max_tokens=1))[-1].finish_reason == "length", "the session is as good as new"


def test_errors_come_where_the_stream_is_read(model):
    with pytest.raises(PocketlmError, match="context"):
        asyncio.run(ids_of(model.agenerate("x" * 999)))
    with pytest.raises(PocketlmError, match="temperature"):
        asyncio.run(ids_of(model.achat(QUESTION, temperature=-1)))
    with pytest.raises(UsageError, match="cancel: there is no such option here"):
        model.achat(QUESTION, cancel=threading.Event())


def test_what_a_thread_had_made_goes_with_its_error():
    class Large:
        pass

    made = []

    def fail(cancel):
        large = Large()
        made.append(weakref.ref(large))
        raise ValueError
        yield

    async def read():
        with suppress(ValueError):
            async for _ in in_thread(fail):
                pass

    gc.disable()  # what would otherwise find it, sooner or later
    try:
        asyncio.run(read())
        assert made[0]() is None
    finally:
        gc.enable()


def test_a_slow_reader_lets_the_thread_wait():
    made = []

    async def read():
        stream = in_thread(lambda cancel: (made.append(i) or i for i in range(10_000)), ahead=10)
        assert await stream.__anext__() == 0
        time.sleep(0.05)
        seen = len(made)
        rest = [part async for part in stream]
        return seen, rest

    seen, rest = asyncio.run(read())
    assert seen <= 13
    assert rest == [*range(1, 10_000)]


def test_the_package_says_that_it_is_typed():
    from pathlib import Path

    assert (Path(pocketlm.__file__).parent / "py.typed").exists()


def test_who_has_read_everything_finds_the_work_ended(monkeypatch):
    call = Handover._call
    monkeypatch.setattr(Handover, "_call", lambda handover, function: (call(handover, function), time.sleep(0.05)))

    async def read():
        through = []
        handover = Handover()
        handover.start(lambda cancel: iter("ab"), lambda: through.append(True))
        return [part async for part in handover], through

    assert asyncio.run(read()) == (["a", "b"], [True])


def test_what_comes_within_a_pause_is_given_together_and_the_end_at_once():
    go_on, more = threading.Event(), threading.Event()

    def make(cancel):
        yield "first"
        assert go_on.wait(60)
        yield from "abc"
        more.set()
        assert cancel.wait(60)
        yield "last"

    async def read():
        handover = Handover(ahead=None)
        handover.start(make)
        looks = [await handover.several(0.0)]
        go_on.set()
        await asyncio.get_running_loop().run_in_executor(None, more.wait, 60)  # all three are there
        looks.append(await handover.several(0.01))
        handover.cancel.set()
        while found := await handover.several(1e6):  # nobody waits so long for what is the end
            looks.append(found)
        return looks

    assert asyncio.run(read()) == [["first"], ["a", "b", "c"], ["last"]]


def test_what_came_before_an_error_is_given_before_it():
    def make(cancel):
        yield from "ab"
        raise PocketlmError("that was all")

    async def read():
        handover, found = Handover(ahead=None), []
        handover.start(make)
        try:
            while True:
                found += await handover.several(0.001)
        except PocketlmError as error:
            return found, str(error)

    assert asyncio.run(read()) == (["a", "b"], "that was all")


def test_a_reader_that_does_not_wait_is_not_woken(monkeypatch):
    """A loop that is woken for every piece takes the interpreter from those who make them."""
    woken, call = [], Handover._call
    monkeypatch.setattr(Handover, "_call", lambda handover, function: (woken.append(function), call(handover, function)))

    async def read():
        handover = Handover(ahead=None)
        handover.start(lambda cancel: iter(range(5000)))
        parts = []
        while found := await handover.several(1e6):
            parts += found
        return parts

    assert asyncio.run(read()) == [*range(5000)]
    assert len(woken) < 100, "and not 5000 times"


@pytest.fixture
def loop():
    """An event loop whose clock stands still until a test moves it, and the times for which its timers were set."""
    loop = asyncio.new_event_loop()
    now, call_at, loop.timers = loop.time(), loop.call_at, []
    loop.clock = now
    loop.time = lambda: loop.clock
    loop.call_at = lambda when, *arguments: (loop.timers.append(when), call_at(when, *arguments))[1]
    yield loop
    loop.close()


async def timer(pause, seconds=1.0):
    """Of a reader who looks again right after two looks, each of which found one part after so many seconds: when it is to be
    woken at the latest.
    """
    loop, gates = asyncio.get_running_loop(), [threading.Event() for _ in range(3)]
    handover = Handover(ahead=None)

    def make(cancel):
        for gate in gates:
            assert gate.wait(600)
            yield "part"

    handover.start(make)
    for gate in gates[:2]:
        loop.clock += seconds
        gate.set()
        assert await handover.several(0.0) == ["part"]
    before, third = len(loop.timers), asyncio.ensure_future(handover.several(pause))
    await asyncio.sleep(0)  # it waits now
    set_then = loop.timers[before:]
    gates[2].set()
    assert await third == ["part"]  # of a clock that stands still: it is the end that wakes it
    handover.close()
    return set_then


def test_all_who_wait_as_long_look_at_the_same_times(loop):
    loop.clock = 8000.0

    async def two():
        return await timer(16.0), await timer(16.0)

    assert loop.run_until_complete(two()) == ([8016.0], [8016.0]), "at 8002 and at 8004 they looked, one after the other"


def test_what_comes_slowly_is_not_waited_for_by_the_clock(loop):
    """Each time that the loop wakes, a thread may have to wait for it."""
    loop.clock = 8000.0
    assert loop.run_until_complete(timer(16.0, seconds=32.0)) == []
    assert len(loop.run_until_complete(timer(16.0, seconds=31.0))) == 1


def test_who_fails_does_not_take_what_the_others_are_told():
    told = []

    async def tell():
        loop, post = asyncio.get_running_loop(), _Post()
        loop.set_exception_handler(lambda loop, context: told.append(type(context["exception"])))
        arrived = asyncio.Event()
        for function in (lambda: 1 // 0, lambda: told.append("the next"), arrived.set):
            post.tell(loop, function)
        await asyncio.wait_for(arrived.wait(), 60)

    asyncio.run(tell())
    assert told == [ZeroDivisionError, "the next"]
