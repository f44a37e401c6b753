"""Drafts looked up in the text change no token, no log-probability and no ending; they are tried where they pay."""

import random
from array import array
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from fake_executor import FakeExecutor

from pocketlm.runtime import engine as engine_module
from pocketlm.runtime.drafts import LONGEST, SHORTEST, Drafts, Odds
from pocketlm.runtime.engine import Engine
from pocketlm.runtime.generator import NoText, generate
from pocketlm.runtime.pass_times import Company, PassTimes
from pocketlm.runtime.sampling import make_sampler
from pocketlm.runtime.session import Session


@pytest.fixture(autouse=True)
def one_token_at_a_time(monkeypatch):
    """These look at what is there after every pass; test_bursts.py has several in a row."""
    monkeypatch.setattr(engine_module, "BURST_SECONDS", 0)


class Eager(Odds):
    """Always the longest draft, or one of any length: what is verified does not depend on what passes cost."""

    def __init__(self, lengths=(LONGEST,)):
        super().__init__()
        self.lengths, self.random = lengths, random.Random(1)

    def best_length(self, match, company):
        return self.random.choice(self.lengths)


def alone():
    return Company(PassTimes())


class Priced(Odds):
    """Passes cost what is usual: those of a fake tell nothing."""

    def best_length(self, match, company):
        return super().best_length(match, alone())


def answer(executor, prompt, *, draft, odds=None, cache=None, **options):
    """(ids, logprobs, finish reason) of an answer in a session of its own, and its last piece."""
    rules = {name: options.pop(name) for name in ("stop", "max_tokens", "end_ids", "cancel", "keep") if name in options}
    session = Session(executor, options.pop("engine", None), cache or executor.new_cache())
    if odds is not None:
        session.odds = odds
    decoder = options.pop("decoder", NoText)()
    sampler = make_sampler(n_vocab=executor.hyper.n_vocab, selection=executor.new_selection(), **options)
    *pieces, last = generate(session, prompt, sampler, decoder, draft=draft, **{"max_tokens": 40, **rules})
    text = "".join(piece.text for piece in (*pieces, last))
    return ([p.id for p in pieces], [p.logprob for p in pieces], last.finish_reason, text), last


class Letters:
    def push(self, id):
        return chr(97 + id % 26)

    def flush(self):
        return ""


def random_prompt(rng, n_vocab=60):
    """With repetitions, so that there is something to look up."""
    part = rng.integers(n_vocab, size=int(rng.integers(3, 9))).tolist()
    return (rng.integers(n_vocab, size=int(rng.integers(1, 6))).tolist() + part * int(rng.integers(1, 4)))[:24]


def random_options(rng):
    return {
        "seed": int(rng.integers(1 << 30)),
        "temperature": float(rng.choice([0.0, 0.3, 0.7, 1.5])),
        "top_k": int(rng.choice([0, 2, 40])),
        "repeat_penalty": float(rng.choice([1.0, 1.1, 1.5])),
        "frequency_penalty": float(rng.choice([0.0, 0.5])),
        "repeat_last_n": int(rng.choice([4, 64])),
        "max_tokens": int(rng.integers(1, 40)),
        "end_ids": frozenset(rng.integers(60, size=2).tolist()) if rng.random() < 0.5 else frozenset(),
        "stop": [chr(97 + int(rng.integers(26))) + chr(97 + int(rng.integers(26)))] if rng.random() < 0.5 else [],
        "keep": 1 if rng.random() < 0.3 else None,
        "decoder": Letters,
    }


def test_no_answer_is_changed(native):
    rng, accepted, refused = np.random.default_rng(3), 0, 0
    for _ in range(250):
        prompt, options = random_prompt(rng), random_options(rng)
        expected, _ = answer(native, prompt, draft=False, **options)
        got, last = answer(native, prompt, draft=True, odds=Eager((1, 2, 3, 7)), **options)
        assert got == expected, (prompt, options)
        accepted += last.accepted_tokens
        refused += last.drafted_tokens - last.accepted_tokens
    assert accepted > 60
    assert refused > 100


def test_sessions_at_the_same_time_change_none_either(native):
    rng, engine, wrong, accepted = np.random.default_rng(4), Engine(native), [], [0]
    cases = [(random_prompt(rng), random_options(rng)) for _ in range(60)]
    expected = [answer(native, prompt, draft=False, **options)[0] for prompt, options in cases]

    def some(part):
        for at in range(part, len(cases), 4):
            prompt, options = cases[at]
            got, last = answer(native, prompt, draft=True, odds=Eager((0, 1, 3, 7)), engine=engine, **options)
            accepted[0] += last.accepted_tokens
            if got != expected[at]:
                wrong.append(at)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(some, range(4)))
    assert not wrong
    assert accepted[0] > 10


def fake(choose, n_ctx=500):
    executor = FakeExecutor(n_vocab=130, n_ctx=n_ctx, choose=choose)
    executor.same_bits = True
    return executor


def test_what_was_refused_leaves_the_cache():
    """After every pass the cache holds the text, and nothing that was only tried."""
    executor = fake(lambda ids: (ids[-1] + 1) % 7 + 60 if len(ids) % 11 else 99)
    session = Session(executor)
    session.odds = Eager()
    text = [60, 61, 62, 63] * 3
    sampler = make_sampler(n_vocab=executor.hyper.n_vocab, temperature=0)
    for piece in generate(session, text[:], sampler, NoText(), max_tokens=100):
        if piece.id >= 0:
            text.append(piece.id)
        assert session.ids[: len(text)] == text[: len(session.ids)]
        assert session.ids == session.executor.cache.ids
        assert len(session.ids) < len(text) + 1 + LONGEST


@pytest.mark.parametrize("room", range(1, 12))
def test_a_draft_never_asks_for_more_than_the_context_holds(room):
    prompt = [60, 61, 62, 63] * 3
    executor = fake(lambda ids: 60 + len(ids) % 4, len(prompt) + room)
    got, last = answer(executor, prompt, draft=True, odds=Eager(), temperature=0, max_tokens=None)
    assert got[0] == [60 + (len(prompt) + i) % 4 for i in range(room + 1)]
    assert last.finish_reason == "length"


def test_a_copied_text_comes_several_tokens_a_pass_and_a_new_one_one_by_one():
    rng = np.random.default_rng(5)
    text = rng.integers(60, 120, 300).tolist()
    executor = fake(lambda ids: text[len(ids) - 300], 1000)
    got, last = answer(executor, text, draft=True, odds=Priced(), temperature=0, max_tokens=290)
    assert got[0] == text[:290]
    assert len(executor.passes) < 80
    assert last.accepted_tokens > 200
    other = rng.integers(60, 120, 300).tolist()
    executor = fake(lambda ids: other[len(ids) - 300], 1000)
    got, last = answer(executor, text, draft=True, odds=Priced(), temperature=0, max_tokens=290)
    assert got[0] == other[:290]
    assert last.drafted_tokens < 15  # two words in a row are soon there again by chance


def test_a_text_that_deceives_is_soon_no_longer_believed():
    """The same three tokens again and again, and every time another one follows."""
    def choose(ids):
        return 60 + len(ids) % 4 if len(ids) % 4 < 3 else random.Random(len(ids)).randrange(63, 130)

    executor = fake(choose, 2000)
    _, last = answer(executor, [60, 61, 62], draft=True, odds=Priced(), temperature=0, max_tokens=1500)
    assert last.drafted_tokens - last.accepted_tokens < 60


def test_the_draft_is_what_followed_the_last_time():
    drafts = Drafts(Eager())
    text = array("i", [1, 2, 3, 4, 5, 6, 1, 2, 3, 7, 8, 9, 0, 1, 2, 3])
    assert drafts.after(text, 100, alone) == [7, 8, 9, 0, 1, 2, 3]
    assert drafts.after(text, 4, alone) == [7, 8, 9, 0]
    text.append(7)
    assert drafts.after(text, 100, alone) == [8, 9, 0, 1, 2, 3, 7], "what would be foretold of the draft itself comes behind it"
    text.extend([50, 51, 52])
    assert drafts.after(text, 100, alone) == []
    assert drafts.after(array("i", [4, 4, 4, 4]), 100, alone) == [4] * 7
    assert drafts.after(array("i", [1, 2]), 100, alone) == []
    assert drafts.after(array("i", range(SHORTEST)), 100, alone) == []


def test_an_executor_whose_bits_depend_on_the_pass_gets_no_drafts():
    executor = fake(lambda ids: 60)
    executor.same_bits = False
    _, last = answer(executor, [60] * 9, draft=True, odds=Eager(), temperature=0)
    assert (last.drafted_tokens, last.accepted_tokens) == (0, 0)


def test_a_cancelled_answer_ends_in_the_middle_of_a_draft():
    executor, cancel = fake(lambda ids: 60), SimpleNamespace(is_set=lambda: len(seen) > 4)
    session, seen = Session(executor), []
    session.odds = Eager()
    sampler = make_sampler(n_vocab=executor.hyper.n_vocab, temperature=0)
    for piece in generate(session, [60] * 9, sampler, NoText(), cancel=cancel, max_tokens=50):
        seen.append(piece)
    assert [p.id for p in seen] == [60] * 5 + [-1]
    assert seen[-1].finish_reason == "cancelled"
