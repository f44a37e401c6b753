"""What one slot has computed of the beginning of a prompt, the others copy: the same answers, with less work."""

from __future__ import annotations

import random
import threading

import pytest
from serving import hello, serving, tiny_chat, wait_until

import pocketlm
from pocketlm.errors import PocketlmError
from pocketlm.runtime.ids import in_common

CHAT = "/v1/chat/completions"


def test_what_two_lists_have_in_common():
    rng = random.Random(5)
    for _ in range(2000):
        a = [rng.randrange(2) for _ in range(rng.randrange(12))]
        b = a[: rng.randrange(12)] + [rng.randrange(2) for _ in range(rng.randrange(12))]
        expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert in_common(a, b) == expected


@pytest.fixture(scope="module", params=[{}, {"kv": "q8"}, {"backend": "numpy"}], ids=str)
def model(request, tmp_path_factory):
    with pocketlm.load(tiny_chat(tmp_path_factory.mktemp("shared")), threads=1, **request.param) as opened:
        yield opened


def answer(session, ids):
    *pieces, last = session.generate(ids, max_tokens=8, temperature=0, ignore_eos=True)
    exactly = session._model.backend != "numpy"  # which promises closeness, and not bits
    return [(piece.id, piece.logprob if exactly else None) for piece in pieces], last.cached_tokens


def test_a_beginning_that_was_copied_gives_the_same_answer(model):
    ids = model.tokenizer.encode("the inn stood at the end of the long road, and nobody knew who had built it") * 2
    with model.session() as donor, model.session() as fresh, model.session() as alone:
        answer(donor, ids[:-6] + ids[:9])
        expected, cached = answer(alone, ids)
        assert cached == 0
        fresh.borrow([alone, donor, fresh], ids[:-6] + ids[9:])  # of several the one that has most
        assert fresh.state.ids == ids[:-6]
        assert answer(fresh, ids) == (expected, len(ids) - 6)
        before = list(donor.state.ids)
        donor.borrow([fresh], ids[:5])  # what is there already, or is not worth it, changes nothing
        assert donor.state.ids == before
        alone.close()
        with pytest.raises(PocketlmError):
            fresh.state.borrow(alone.state, ids)


def test_nobody_borrows_what_was_moved(model):
    """Keys that were moved when older text went are close, and not what they would be if they were computed again."""
    ids = model.tokenizer.encode("the inn stood at the end of the long road, and nobody knew who had built it")
    with model.session() as donor, model.session() as fresh:
        donor.state.advance(ids + ids[5:])
        donor.state.advance(ids[:4] + ids[5:] + ids[5:], shift=True)
        assert donor.state.n_exact < len(donor.state.ids)
        fresh.state.borrow(donor.state, list(donor.state.ids))
        assert len(fresh.state.ids) == donor.state.n_exact


def test_two_may_borrow_from_each_other_at_the_same_time(model):
    ids = model.tokenizer.encode("the inn stood at the end of the long road, and nobody knew who had built it")
    with model.session() as one, model.session() as other, model.session() as alone:
        expected = answer(alone, ids)[0]
        found: list[object] = []

        def work(mine, theirs):
            for cut in range(9, 9 + 20):
                answer(mine, ids[:cut])
                mine.borrow([theirs], ids)
                found.append(answer(mine, ids)[0])

        threads = [threading.Thread(target=work, args=pair) for pair in ((one, other), (other, one))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert found == [expected] * 40


def test_nobody_waits_for_the_prompt_of_another(model):
    ids = model.tokenizer.encode("the inn stood at the end of the long road, and nobody knew who had built it")
    with model.session() as donor, model.session() as fresh:
        donor.state.advance(ids)
        held, done = threading.Event(), threading.Event()

        def compute():
            with donor.state.lock.here:
                held.set()
                done.wait(120)

        thread = threading.Thread(target=compute)
        thread.start()
        held.wait()
        fresh.borrow([donor], ids)
        assert not done.is_set()
        assert thread.is_alive(), "it came back while the other one was still computing"
        assert fresh.state.ids == []
        done.set()
        thread.join()
        fresh.borrow([donor], ids)
        assert fresh.state.ids == ids


def test_slots_share_what_conversations_begin_with(tmp_path):
    with serving(tiny_chat(tmp_path), slots=3) as server:
        system = {"role": "system", "content": "Answer like the keeper of an inn at the end of a long road."}

        def asked(text, **fields):
            reply = server.post(CHAT, hello(messages=[system, {"role": "user", "content": text}], max_tokens=8, **fields)).json
            return reply["choices"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]

        slots = server.answerer.slots
        expected = asked("where is it?", cache_prompt=False)
        assert expected[1] == 0
        for slot in slots.all:
            slot.session.state.clear()
        assert asked("another question")[1] == 0
        used = next(slot for slot in slots.all if slot.session.state.ids)
        slots._free.remove(used)  # somebody else has it
        try:
            again = asked("where is it?")
            assert again[0] == expected[0]
            assert again[1] > 40, "the system prompt was copied"
            assert asked("where is it?", cache_prompt=False) == expected
        finally:
            slots._free.append(used)


def test_a_server_that_has_begun_computes_what_conversations_begin_with(tmp_path):
    system = "Be kind, and answer like the keeper of an inn."
    with serving(tiny_chat(tmp_path), prepared=system) as server:
        wait_until(lambda: server.answerer._preparing.done())
        assert server.answerer.counters.requests == 0
        assert server.model._guides._vocabulary is not None
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "hello"}]
        reply = server.post(CHAT, hello(messages=messages)).json
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] > 30
        wait_until(server.idle)
