"""What a caller may do where the next token is chosen: change the logits, and see the likeliest."""

import math
import threading

import numpy as np
import pytest
from test_drafts import Eager
from tiny_models import write_model

import pocketlm
from pocketlm.errors import PocketlmError, UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with pocketlm.load(write_model(tmp_path_factory.mktemp("hooks") / "tiny.gguf"), threads=1) as model:
        yield model


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"top_k": 0, "top_p": 1, "min_p": 0}])
def test_a_mask_leaves_only_what_it_allows(model, options):
    allowed, seen = [65, 66, 67], []

    def mask(logits, ids):
        seen.append(list(ids))
        kept = logits[allowed].copy()
        logits.fill(-math.inf)
        logits[allowed] = kept

    pieces = list(model.generate("the", max_tokens=10, process=mask, **options))[:-1]
    assert {piece.id for piece in pieces} <= {*allowed}
    prompt = model.tokenizer.encode("the")
    assert seen[0] == prompt
    assert seen[-1] == prompt + [piece.id for piece in pieces[:-1]]
    plain = model.logits(seen[-1])[-1].astype(float)
    logprob = plain[pieces[-1].id] - plain.max() - math.log(np.exp(plain - plain.max()).sum())
    assert pieces[-1].logprob == pytest.approx(logprob, abs=1e-4), "the log-probability is the model's own"


def test_the_likeliest_are_listed_with_every_piece(model):
    *pieces, last = model.generate("the", max_tokens=6, temperature=0, top_logprobs=4)
    for piece in pieces:
        ids, logprobs = zip(*piece.top_logprobs, strict=True)
        assert ids[0] == piece.id
        assert logprobs[0] == pytest.approx(piece.logprob, abs=1e-6)
        assert list(logprobs) == sorted(logprobs, reverse=True)
    assert last.top_logprobs == ()
    assert len(next(model.generate("the", top_logprobs=np.int64(2))).top_logprobs) == 2
    for bad in (-1, 1.5, True, 101):
        with pytest.raises(UsageError, match="top_logprobs"):
            list(model.generate("the", top_logprobs=bad))


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.5, "seed": 4}])
def test_without_log_probabilities_the_tokens_are_the_same(model, options):
    options = {"max_tokens": 10, **options}
    pieces, without = ([*model.generate("the", logprobs=logprobs, **options)] for logprobs in (True, False))
    assert [piece.id for piece in without] == [piece.id for piece in pieces]
    assert all(math.isnan(piece.logprob) for piece in without)
    assert not any(math.isnan(piece.logprob) for piece in pieces[:-1])
    listed = [*model.generate("the", logprobs=False, top_logprobs=2, **options)]
    assert [piece.logprob for piece in listed[:-1]] == [piece.logprob for piece in pieces[:-1]], "who lists them needs them"
    with pytest.raises(UsageError, match=r"^logprobs is 5; it must be True or False: top_logprobs says"):
        next(model.generate("the", logprobs=5))


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.5, "seed": 4}])
def test_both_are_the_same_where_drafts_are_tried(model, options):
    """The hooks see every token of an answer once, in order, also where several are verified in one pass."""

    def answer(draft):
        seen = []

        def mask(logits, ids):
            seen.append(len(ids))
            logits[70:] = -math.inf  # a small alphabet repeats itself

        session = model.session()
        session.state.odds = Eager()  # tries whatever was found
        pieces = list(session.generate("the the the", max_tokens=60, draft=draft, process=mask, top_logprobs=3, **options))
        return [(piece.id, piece.logprob, piece.top_logprobs) for piece in pieces[:-1]], pieces[-1].drafted_tokens

    plain, none = answer(False)
    drafted, n = answer(True)
    assert drafted == plain
    assert none == 0
    assert n > 0
    assert all(len(top) == 3 for *_, top in drafted)


def test_ids_that_a_hook_keeps_do_not_stop_the_text_from_growing(model):
    kept = []
    pieces = list(model.generate("the", max_tokens=4, process=lambda logits, ids: kept.append(np.asarray(ids))))
    assert [len(ids) for ids in kept] == [len(kept[0]) + n for n in range(4)]
    assert [ids[-1] for ids in kept[1:]] == [piece.id for piece in pieces[:3]]


@pytest.mark.parametrize("process", [5, lambda logits, ids: logits + 1])
def test_a_hook_that_changes_nothing_is_refused(model, process):
    with pytest.raises(UsageError, match=r"^process "):
        list(model.generate("the", max_tokens=2, process=process))
    list(model.generate("the", max_tokens=2, process=lambda logits, ids: np.multiply(logits, 2, out=logits)))


@pytest.mark.parametrize("backend", ["native", "numpy"])
@pytest.mark.parametrize("draft", [False, True])
def test_a_hook_may_ask_other_sessions_of_the_model(model, backend, draft):
    """Guidance by another prompt (arXiv 2306.17806): logits of one session, moved away from those of another."""
    prompt, aside = model.tokenizer.encode("the the the the"), model.tokenizer.encode("in ")
    with pocketlm.load(model.path, backend=backend, threads=1) as model:
        session, other = model.session(), model.session()
        session.state.odds = Eager()

        def logits_of(ids):
            return other.logits(ids)[-1]

        def guided(logits, ids):
            logits += logits - logits_of(aside + ids[len(prompt) :].tolist())

        pieces = in_time(lambda: list(session.generate(prompt, max_tokens=8, temperature=0, process=guided, draft=draft)))
        ids = prompt[:]
        for _ in pieces[:-1]:
            ids.append(int((2 * logits_of(ids) - logits_of(aside + ids[len(prompt) :])).argmax()))
        assert [piece.id for piece in pieces[:-1]] == ids[len(prompt) :]


@pytest.mark.parametrize("does", ["generate", "close", "fork", "save"])
def test_a_hook_that_asks_its_own_session_gets_what_it_asks_for_or_ends_the_answer(model, does, tmp_path):
    session = model.session()
    expected = [piece.id for piece in session.generate("the", max_tokens=3, temperature=0)]
    things = {
        "generate": lambda: list(session.generate("a", max_tokens=1)), "close": session.close,
        "fork": session.fork, "save": lambda: session.save(tmp_path / "state"),
    }  # fmt: skip
    options = {"max_tokens": 3, "temperature": 0, "process": lambda logits, ids: things[does]()}
    said = in_time(lambda: [piece.id for piece in session.generate("the", **options)])
    if does in ("fork", "save"):
        assert said == expected
    else:
        assert isinstance(said, PocketlmError)


def in_time(call):
    """What it returns, or raises as an error of the package's."""

    def run():
        try:
            found.append(call())
        except PocketlmError as error:
            found.append(error)

    found: list = []
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert found, "it waits for ever"
    return found[0]
