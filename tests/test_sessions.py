"""Sessions of one model: each says what it says alone, whoever else is there, wherever its state comes from."""

from __future__ import annotations

import os
import threading
import time
import tracemalloc

import pytest
from session_walk import ACTIONS, MEGABYTES_ALLOWED, Walk, resident
from tiny_models import write_model
from two_backends import OPTIONS, ids, model_fixture, path_fixture  # noqa: F401

import pocketlm
from pocketlm.constrain import grammar
from pocketlm.errors import FileError, PocketlmError, UsageError
from pocketlm.locks import ForkedLock
from pocketlm.runtime import memory
from pocketlm.runtime.native.caches import NativeCache

PROMPTS = ["then", "in the thing", "the the the", "nothing in this", "a", "thin " * 30, "hen", "the inn"]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 7}], ids=["greedy", "sampled"])
def test_eight_at_once_say_what_each_says_alone(model, sampling):
    options = {**OPTIONS, **sampling}
    alone = [ids(model.generate(prompt, **options)) for prompt in PROMPTS]
    found: list[object] = [None] * 8
    barrier = threading.Barrier(8)

    def speaks(i: int) -> None:
        with model.session() as session:
            barrier.wait(30)
            found[i] = [ids(session.generate(PROMPTS[i], **options)) for _ in range(3)]

    threads = [threading.Thread(target=speaks, args=(i,), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == [[text] * 3 for text in alone]


def test_streams_of_several_sessions_take_turns_in_one_thread(model):
    options = {**OPTIONS, "temperature": 0}
    alone = [ids(model.generate(prompt, **options)) for prompt in PROMPTS[:3]]
    streams = [model.session().generate(prompt, **options) for prompt in PROMPTS[:3]]
    assert [list(column) for column in zip(*zip(*map(ids, streams), strict=True), strict=True)] == alone
    streams = [model.session().generate(prompt, **options) for prompt in PROMPTS[:3]]
    turns = [[next(stream).id for stream in streams] for _ in range(len(alone[0]))]
    assert [list(column) for column in zip(*turns, strict=True)] == alone


def test_the_older_stream_of_a_session_ends_and_those_of_others_do_not(model):
    a, b = model.session(), model.session()
    older, other = a.generate("then", **OPTIONS, temperature=0), b.generate("then", **OPTIONS, temperature=0)
    first = [next(older).id, next(other).id]
    next(a.generate("in", **OPTIONS))
    with pytest.raises(PocketlmError, match="begun another"):
        next(older)
    assert [first[1], *ids(other)] == ids(model.generate("then", **OPTIONS, temperature=0))


def test_a_chat_goes_on_in_its_own_session(model):
    def turn(session, messages):
        return "".join(piece.text for piece in session.chat(messages, max_tokens=12, temperature=0))

    talk = [{"role": "user", "content": "the thing"}]
    answer = turn(model, talk)
    longer = [*talk, {"role": "assistant", "content": answer}, {"role": "user", "content": "then"}]
    expected = turn(model, longer)
    a, b = model.session(), model.session()
    assert (turn(a, talk), turn(b, longer), turn(a, longer)) == (answer, expected, expected)
    assert a.context_used == b.context_used > 0


def test_a_fork_goes_on_from_here_and_neither_hears_of_the_other(model):
    session = model.session()
    prompt = list(range(3, 90))
    said = ids(session.generate(prompt, max_tokens=5, temperature=0, ignore_eos=True))[:-1]
    fork = session.fork()
    assert fork.context_used == session.context_used == 91
    whole = [*prompt, *said]
    for ending in ([5], [6, 7, 8] * 20):
        expected = ids(model.generate(whole + ending, **OPTIONS, temperature=0, reuse_cache=False))
        pieces = list(fork.generate(whole + ending, **OPTIONS, temperature=0))
        assert pieces[-1].cached_tokens >= 91
        assert ids(pieces) == expected
        assert ids(session.generate(whole + ending, **OPTIONS, temperature=0)) == expected


# ---- memory and ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_a_second_session_takes_its_cache_and_at_most_a_megabyte(tmp_path, backend):
    path = write_model(tmp_path / "model.gguf", n_ctx=1024, rows=50_000)
    with pocketlm.load(path, backend=backend, threads=2) as model:
        list(model.generate([5] * 40, max_tokens=3))
        tracemalloc.start()
        try:
            session = model.session()
            list(session.generate([5] * 40, max_tokens=3))
            took = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        cache = session.state.cache
        assert took <= cache.memory.nbytes + (1 << 20)


def test_a_session_that_has_no_room_is_refused_in_one_line(model, monkeypatch):
    size = type(model.executor.cache).bytes_for(model.hyper, model.n_ctx)
    monkeypatch.setattr(memory, "available_bytes", lambda: 3 * size)  # the model's own cache has been promised, too
    kept = [model.session(), model.session()]
    for asks in (model.session, kept[0].fork):
        with pytest.raises(FileError, match="one more session needs") as error:
            asks()
        assert "\n" not in str(error.value)
    kept.pop().close()
    model.session()


@pytest.mark.parametrize("ctx", [0, -1, 513])
def test_a_context_that_the_model_was_not_loaded_with_is_refused(model, ctx):
    with pytest.raises(UsageError, match="expected 1 to 512"):
        model.session(ctx=ctx)


def test_a_session_of_fewer_positions_is_full_sooner(model):
    session = model.session(ctx=40)
    *pieces, last = session.generate([5] * 30, temperature=0, ignore_eos=True)
    assert len(pieces) == 11
    assert "context of 40 tokens is full" in last.note


def test_sessions_live_through_other_threads_and_end_with_the_model(model):
    session = model.session()
    expected = ids(session.generate("then", **OPTIONS, temperature=0))
    stream = session.generate("then", **OPTIONS, temperature=0)
    next(stream)
    model.set_threads(1)
    with pytest.raises(PocketlmError, match="ask again"):
        next(stream)
    assert ids(session.generate("then", **OPTIONS, temperature=0)) == expected
    stream = session.generate("then", **OPTIONS, temperature=0)
    next(stream)
    model.close()
    for use in (lambda: next(stream), lambda: session.logits([5]), session.fork, model.session):
        with pytest.raises(PocketlmError, match="closed"):
            use()


def test_a_closed_session_says_so_and_gives_its_memory_back(model):
    with model.session() as session:
        list(session.generate("then", **OPTIONS))
    assert session.state.cache.memory.nbytes == 0
    with pytest.raises(PocketlmError, match="this session is closed"):
        session.logits([5])
    session.close()


def test_sessions_that_come_and_go_at_random_say_what_they_say_alone(path, tmp_path):
    with pocketlm.load(path, "native", threads=2) as model, pocketlm.load(path, "native", threads=1) as alone:
        walk = Walk(model, alone, tmp_path)
        walk.run(1500, seed=3)
        before = resident()
        walk.run(3000, seed=4)
        assert walk.wrong == []
        assert set(walk.done) == set(ACTIONS)
        assert walk.merged[0] > 100
        assert walk.drafts[1] > 100
        assert len(model._sessions) <= 1 + 8 * 3  # all that were dropped are gone
        assert resident() - before < MEGABYTES_ALLOWED << 20


WRONG = {  # what the walk must notice
    "a fork lacks its last position": ("_filled", lambda filled: lambda cache, layer, n: filled(cache, layer, max(n - 1, 0))),
    "a state is saved in another order": ("read_keys", lambda read: lambda *where: read(*where)[:, ::-1].copy()),
    "a text is cut one too late": ("truncate", lambda cut: lambda cache, n: cut(cache, n + (n < cache.length))),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_walk_notices_when(path, tmp_path, monkeypatch, what):
    name, wrong = WRONG[what]
    with pocketlm.load(path, "native", threads=2) as model, pocketlm.load(path, "native", threads=1) as alone:
        monkeypatch.setattr(NativeCache, name, wrong(getattr(NativeCache, name)))
        walk = Walk(model, alone, tmp_path)
        walk.run(10_000, seed=3)
        assert isinstance(walk.wrong[0], tuple)  # an answer that differs, no error


def test_no_session_comes_while_room_is_counted(model):
    thread = threading.Thread(target=model.check_room, args=(1,))
    with model.changing.here:  # as whoever makes a session
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("last", [{"role": "assistant"}, {"role": "assistant", "content": None}, None, {}])
def test_what_is_no_message_is_refused_in_one_line(model, last):
    with pytest.raises(UsageError, match="a message is a dict of two texts"):
        model.chat([{"role": "user", "content": "then"}, last])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_uses_what_another_thread_was_using(model):
    """As a server's worker does that is forked while a thread makes a session, or reads a form or a template."""
    talk = [{"role": "user", "content": "then"}]
    list(model.chat(talk, choices=["a", "b"]))
    held, go = threading.Event(), threading.Event()

    guides = model._guides
    inner = [masks._lock for masks in guides._kept.values()]

    def hold(*locks: ForkedLock) -> None:  # no ExitStack: Python 3.10 and 3.14 have locks for `with` alone
        if not locks:
            held.set()
            go.wait(60)
            return
        with locks[0].here:
            hold(*locks[1:])

    holder = threading.Thread(target=hold, args=(model.changing, guides._lock, guides._reading, grammar._lock, *inner))
    holder.start()
    assert held.wait(60)
    pid = os.fork()
    if not pid:
        try:
            list(model.session().chat(talk, choices=["a", "b"]))
            list(model.session().fork().generate("a", max_tokens=3, regex="[xyz]+"))
            model.set_threads(1)
            os._exit(0)
        finally:
            os._exit(1)
    until = time.monotonic() + 60
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(pid, 9)
        time.sleep(0.01)
    go.set()
    holder.join()
    assert os.waitstatus_to_exitcode(done[1]) == 0
