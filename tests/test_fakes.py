"""The fakes of the other tests do as the real ones do: the same calls on both give the same kind of answer.

A fake that is kinder than what it stands for hides defects; here each is held against a tiny real model.
"""

from __future__ import annotations

import ast
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from chat_fake import FakeModel
from fake_executor import FakeExecutor
from tiny_models import write_model

import pocketlm
from pocketlm.errors import PocketlmError, UsageError
from pocketlm.runtime.executors import Executor
from pocketlm.runtime.generator import Piece, generate
from pocketlm.runtime.session import MIN_SHIFT, Session

N_CTX, N_VOCAB = 128, 263

# ── executors ────────────────────────────────────────────────────────────────────────────────────────────────────────

KINDS = ["fake", "numpy", "native"]


@pytest.fixture(scope="module", params=["rotary", "learned"])
def learned(request) -> bool:
    return request.param == "learned"


@pytest.fixture(scope="module")
def make(learned, tmp_path_factory) -> Iterator[Callable[[str], Any]]:
    """A fresh executor of a kind; real ones run a model of two layers."""
    shape: dict[str, Any] = {"arch": "gpt2", "n_ctx": N_CTX} if learned else {"arch": "llama", "n_ctx": 1024}
    path = write_model(tmp_path_factory.mktemp("fakes") / "model.gguf", **shape)
    models = {kind: pocketlm.load(path, backend=kind, threads=1, ctx=N_CTX) for kind in KINDS[1:]}

    def made(kind: str) -> Any:
        if kind == "fake":
            return FakeExecutor(n_vocab=N_VOCAB, n_ctx=N_CTX, learned=learned)
        models[kind].executor.cache.truncate(0)
        return models[kind].executor

    yield made
    for model in models.values():
        model.close()


def numbers(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(N_VOCAB) for _ in range(n)]


def array(ids: list[int]) -> np.ndarray:
    return np.array(ids, np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_an_executor_has_all_that_the_protocol_names(make, kind):
    executor = make(kind)
    names = {*get_type_hints(Executor), *(name for name in vars(Executor) if not name.startswith("_"))}
    assert {"cache", "forward", "close", "hyper", "n_ctx"} <= names
    assert [name for name in sorted(names) if not hasattr(executor, name)] == []
    assert (executor.n_ctx, executor.hyper.n_vocab) == (N_CTX, N_VOCAB)


@pytest.mark.parametrize("kind", KINDS)
def test_whether_a_longer_context_is_of_use_is_known(make, kind, learned):
    assert make(kind).hyper.reaches(N_CTX + 1) is not learned


def test_any_walk_leaves_as_many_positions_in_every_cache(make, learned):
    rng = random.Random(5)
    executors = {kind: make(kind) for kind in KINDS}
    for _ in range(150):
        length = executors["fake"].cache.length
        step = rng.choice(["forward", "forward", "truncate", "remove"])
        ids, cut = numbers(rng, rng.randint(1, 30)), rng.randint(-2, length + 2)
        start = rng.randint(0, length)
        stop = rng.randint(start, length)
        rows = rng.choice(["last", "all"])
        answers = {}
        for kind, executor in executors.items():
            cache = executor.cache
            if step == "truncate":
                answers[kind] = cache.truncate(cut), cache.length
            elif step == "remove":
                answers[kind] = cache.remove(start, stop), cache.length
            else:
                try:
                    logits = executor.forward(array(ids), rows=rows)
                    answers[kind] = logits.shape, logits.dtype, cache.length
                except PocketlmError as error:
                    answers[kind] = str(error), cache.length
        assert answers["numpy"] == answers["native"] == answers["fake"], step
        if step == "remove":
            assert answers["fake"][0] is not learned


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ids_in_the_cache_give_the_same_logits_however_they_came_there(make, kind):
    executor, rng = make(kind), random.Random(6)
    ids = numbers(rng, 40)
    at_once = executor.forward(array(ids))[0].copy()
    executor.cache.truncate(20)
    executor.forward(array(numbers(rng, 7)))
    executor.cache.truncate(15)
    for id in ids[15:]:
        step = executor.forward(array([id]))[0].copy()
    np.testing.assert_allclose(step, at_once, atol=2e-2)
    executor.cache.truncate(0)
    np.testing.assert_allclose(executor.forward(array(ids), rows="all")[-1], at_once, atol=2e-2)
    executor.cache.truncate(0)
    assert not np.allclose(executor.forward(array(ids[::-1]))[0], at_once, atol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [[], [-1], [N_VOCAB], [0.5], [[1, 2]], [1] * (N_CTX + 1)], ids=str)
def test_ids_that_make_no_sense_are_refused_alike_and_leave_the_cache_alone(make, kind, bad):
    executor = make(kind)
    executor.forward(array([1, 2, 3]))
    with pytest.raises(PocketlmError, match=r"^(token ids must be|\d+ tokens do not fit)"):
        executor.forward(np.array(bad))
    assert executor.cache.length == 3


# ── sessions and generators on them ──────────────────────────────────────────────────────────────────────────────────


class Script:
    """A sampler that says what it is told, so that answers do not depend on the model."""

    def __init__(self, ids: list[int]):
        self.ids = iter(ids)

    def __call__(self, logits: np.ndarray, so_far: Any) -> tuple[int, float]:
        assert logits.shape == (N_VOCAB,)
        assert np.isfinite(logits).all()
        return next(self.ids), 0.0


class Letters:
    def push(self, id: int) -> str:
        return chr(97 + id % 26)

    def flush(self) -> str:
        return "!"


def records(pieces: Iterator[Piece]) -> list[tuple[Any, ...]]:
    seen = []
    try:
        for p in pieces:
            seen.append((p.text, p.id, p.finish_reason, p.prompt_tokens, p.cached_tokens, p.generated_tokens, p.note))
    except PocketlmError as error:
        seen.append((type(error), str(error)))
    return seen


def test_a_session_takes_as_much_from_the_cache_and_says_the_same(make):
    rng = random.Random(8)
    sessions = {kind: Session(make(kind)) for kind in KINDS}
    ids = numbers(rng, 60)
    for _ in range(60):
        kind_of_step = rng.randrange(4)
        shift = kind_of_step == 0
        if shift and len(ids) > MIN_SHIFT + 20:
            ids = [*ids[:10], *ids[18:], *numbers(rng, 3)]  # a turn went
        elif kind_of_step == 1:
            ids = [*ids[: rng.randint(0, len(ids))], *numbers(rng, rng.randint(1, 60))]  # now and then too long
        elif kind_of_step == 2:
            ids = [*ids, N_VOCAB] if rng.random() < 0.2 else ids[: rng.randint(1, len(ids))]
        else:
            ids = [*ids, *numbers(rng, 5)]
        answers = {}
        for kind, session in sessions.items():
            try:
                logits, cached = session.advance(ids, shift=shift)
                assert logits is not None
                answers[kind] = cached, session.note, logits.shape, session.executor.cache.length, list(session.ids)
            except PocketlmError as error:
                answers[kind] = type(error), str(error), list(session.ids)
        assert answers["fake"] == answers["numpy"] == answers["native"]
        ids = [id for id in ids[: N_CTX - 1] if id < N_VOCAB]


def test_a_generator_gives_the_same_records(make):
    rng = random.Random(9)
    cases: list[dict[str, Any]] = [
        {"max_tokens": 6},
        {"max_tokens": 0},
        {"stop": ["cde"]},
        {"stop": ["zz", "de"], "max_tokens": 5},
        {"end_ids": {4}},
        {"end_ids": {4}, "ignore_eos": True, "max_tokens": 7},
        {"cancel": threading.Event()},
        {"reuse_cache": False, "max_tokens": 3},
        {},  # until the context is full
        {"make_room": lambda: None},
        {"max_tokens": -1},
        {"stop": [""]},
    ]
    cases[6]["cancel"].set()
    prompts = [[1, 2, 3], numbers(rng, 100), numbers(rng, N_CTX + 3), [], [N_VOCAB]]
    sessions = {kind: Session(make(kind)) for kind in KINDS}
    for prompt in prompts:
        for case in cases:
            script = [n % 26 for n in range(400)]
            answers = [records(generate(session, prompt, Script(script), Letters(), **case)) for session in sessions.values()]
            assert answers[0] == answers[1] == answers[2], (prompt[:5], case)


def test_a_prompt_cut_short_in_a_full_context_gives_the_same_records(make):
    rng = random.Random(10)
    system, dropped, rest = numbers(rng, 10), numbers(rng, 30), numbers(rng, 60)
    answers = []
    for kind in KINDS:
        room = iter([[*system, *rest], None])
        options: dict[str, Any] = {"make_room": lambda room=room: next(room)}
        pieces = generate(Session(make(kind)), [*system, *dropped, *rest], Script([5] * 400), Letters(), **options)
        answers.append(records(pieces))
    assert answers[0] == answers[1] == answers[2]
    assert "context of 128 tokens is full" in answers[0][-1][-1]


# ── the model that a chat sees ───────────────────────────────────────────────────────────────────────────────────────

HELLO = [{"role": "user", "content": "a b c d e f"}]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Iterator[Any]:
    path = write_model(tmp_path_factory.mktemp("fakes") / "model.gguf", n_ctx=N_CTX, metadata={"general.name": "Tiny"})
    with pocketlm.load(path, backend="numpy", threads=2) as model:
        yield model


@pytest.fixture(params=["real", "fake"])
def model(request, real) -> Any:
    if request.param == "fake":
        return FakeModel()
    real.set_threads(2)
    return real


def _read_of_a_model() -> set[str]:
    """The attributes that the sources of `chat/` read of anything that is called a model."""
    found = set()
    for path in (Path(pocketlm.__file__).parent / "chat").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in ("model", "_model"):
                found.add(node.attr)
    return found - {"start", "wait"}  # of `Opening`, which takes a model's place


def test_all_that_a_chat_reads_of_a_model_is_there(model):
    used = _read_of_a_model()
    assert {"chat", "name", "n_ctx", "template", "context_used"} <= used
    lacking = {name for name in used if not hasattr(model, name)}
    assert lacking <= ({"close"} if isinstance(model, FakeModel) else set())  # nobody closes the fake


def test_what_the_fake_says_of_itself_has_the_types_of_the_real_one(real):
    fake = FakeModel()
    for name in _read_of_a_model() - {"chat", "close", "tokenizer", "template", "set_threads", "set_backend"}:
        assert type(getattr(fake, name)) is type(getattr(real, name)), name
    assert isinstance(fake.template.note, type(real.template.note))


def test_the_records_of_the_fake_have_the_fields_and_types_of_the_real_ones(real):
    theirs = list(real.chat(HELLO, max_tokens=3, temperature=0))
    ours = list(FakeModel().chat(HELLO, max_tokens=3))
    names = {field.name for field in fields(Piece)}
    for record, example in ((ours[0], theirs[0]), (ours[-1], theirs[-1])):
        assert set(vars(record)) <= names
        for name, value in vars(record).items():
            assert type(value) is type(getattr(example, name)), name


def test_a_stream_ends_with_one_record_that_counts(model):
    for n in (0, 1, 3):
        messages = [dict(message) for message in HELLO]
        *pieces, last = model.chat(messages, max_tokens=n, temperature=0)
        assert messages == HELLO
        assert all(piece.finish_reason is None and piece.id >= 0 for piece in pieces)
        assert (last.id, last.finish_reason, last.generated_tokens) == (-1, "length", n)
        assert 0 <= last.cached_tokens <= last.prompt_tokens
        assert last.note == ""
        assert 0 < model.context_used <= model.n_ctx


def test_a_cancelled_stream_says_so(model):
    cancel = threading.Event()
    cancel.set()
    pieces = list(model.chat(HELLO, cancel=cancel))
    assert [(piece.id, piece.finish_reason) for piece in pieces] == [(-1, "cancelled")]
    cancel.clear()
    pieces = []
    for piece in model.chat(HELLO, cancel=cancel, temperature=0):
        pieces.append(piece)
        cancel.set()
    assert len(pieces) <= 2
    assert pieces[-1].finish_reason == "cancelled"


def test_a_prompt_that_does_not_fit_is_the_same_error(model):
    question = "fail" if isinstance(model, FakeModel) else "much too long " * 50
    with pytest.raises(PocketlmError, match=r"^the prompt has \d+ tokens but the context holds \d+") as raised:
        list(model.chat([{"role": "user", "content": question}]))
    assert not isinstance(raised.value, UsageError)
    assert list(model.chat(HELLO, max_tokens=1))[-1].finish_reason, "and the model still works"


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": 1.5}, {"no_such_option": 1}], ids=str)
def test_sampling_options_that_make_no_sense_are_refused_alike(model, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        list(model.chat(HELLO, max_tokens=1, **options))


@pytest.mark.parametrize("n_threads", [0, -1, 100_000])
def test_a_number_of_threads_out_of_range_is_refused_alike(model, n_threads):
    before = model.n_threads
    with pytest.raises(UsageError, match=rf"^--threads {n_threads}: expected 1 to \d+$"):
        model.set_threads(n_threads)
    assert model.n_threads == before
    model.set_threads(1)
    assert model.n_threads == 1


def test_an_unknown_backend_is_refused_alike(model):
    with pytest.raises(UsageError, match=r"^backend abacus: expected one of auto, "):
        model.set_backend("abacus")
    model.set_backend("numpy")
    assert model.backend == "numpy"
