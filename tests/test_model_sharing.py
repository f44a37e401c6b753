"""Who shares a model gets an error, never another's text: streams that overlap, threads, changes in the middle of an answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from tiny_models import write_model

import pocketlm
from pocketlm.errors import PocketlmError

OPTIONS = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
TALK = [{"role": "user", "content": "the thing"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("shared") / "tiny.gguf", n_ctx=512)


@pytest.fixture(params=["numpy", "native"])
def model(request, path) -> Iterator[pocketlm.model.Model]:
    with pocketlm.load(path, backend=request.param, threads=2) as model:
        yield model


def ids(pieces) -> list[int]:
    return [piece.id for piece in pieces]


CHANGES: dict[str, tuple[Callable, str]] = {
    "another stream": (lambda model: next(model.generate("in the", **OPTIONS)), "begun another"),
    "a chat": (lambda model: list(model.chat(TALK, max_tokens=2)), "begun another"),
    "logits": (lambda model: model.logits([5, 6, 7]), "begun another"),
    "set_threads": (lambda model: model.set_threads(1), "ask again"),
    "set_backend": (lambda model: model.set_backend("numpy"), "ask again"),
    "close": (lambda model: model.close(), "closed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_older_stream_ends_with_an_error_that_says_why(model, change):
    act, words = CHANGES[change]
    older = model.generate("then", **OPTIONS)
    next(older)
    act(model)
    with pytest.raises(PocketlmError, match=words) as error:
        next(older)
    assert "\n" not in str(error.value)
    assert list(older) == []  # it has ended


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "close"])
def test_what_comes_after_a_stream_that_was_cut_off_is_right(model, change):
    alone = ids(model.generate("in the thing", **OPTIONS))
    older = model.generate("then", **OPTIONS)
    next(older)
    CHANGES[change][0](model)
    with pytest.raises(PocketlmError):
        next(older)
    assert ids(model.generate("in the thing", **OPTIONS)) == alone


def test_the_younger_stream_says_what_it_says_alone(model):
    alone = ids(model.generate("in the thing", **OPTIONS))
    older, younger = model.generate("then", **OPTIONS), model.generate("in the thing", **OPTIONS)
    next(older)
    pieces = [next(younger)]
    with pytest.raises(PocketlmError):
        next(older)
    assert ids([*pieces, *younger]) == alone


def test_a_stream_that_was_cancelled_before_it_began_ends_no_other(model):
    """A task that is cancelled at once, and the question that follows: the thread of the first may come last."""
    alone = ids(model.generate("then", **OPTIONS))
    other, cancel = model.generate("then", **OPTIONS), threading.Event()
    first = next(other)
    cancel.set()
    assert [piece.finish_reason for piece in model.generate("in the", cancel=cancel, **OPTIONS)] == ["cancelled"]
    assert [first.id, *ids(other)] == alone


def test_a_stream_begins_with_its_first_piece(model):
    alone = ids(model.generate("then", **OPTIONS))
    waiting = model.generate("then", **OPTIONS)
    list(model.generate("in the thing", **OPTIONS))
    assert ids(waiting) == alone


def test_logits_inside_a_stream_are_those_of_an_empty_cache(model):
    expected = model.logits([5, 6, 7])
    next(model.generate("then", **OPTIONS))
    np.testing.assert_array_equal(model.logits([5, 6, 7]), expected)


def test_threads_that_share_a_model_get_the_whole_right_answer_or_an_error(model):
    prompts = ["then", "in the thing", "the the the", "nothing in this"]
    options = {**OPTIONS, "max_tokens": 30}
    alone = {prompt: ids(model.generate(prompt, **options)) for prompt in prompts}
    logits = model.logits([5, 6, 7])
    wrong: list[object] = []
    right = [0]
    barrier = threading.Barrier(len(prompts) + 1)

    def generates(prompt: str) -> None:
        barrier.wait()
        for _ in range(20):
            got = []
            try:
                for piece in model.generate(prompt, **options):
                    got.append(piece.id)
            except PocketlmError as error:
                if "begun another" not in str(error) or got != alone[prompt][: len(got)]:
                    wrong.append((prompt, got, str(error)))
            except BaseException as error:
                wrong.append(repr(error))
            else:
                right[0] += 1
                if got != alone[prompt]:
                    wrong.append((prompt, got))

    def computes() -> None:
        barrier.wait()
        for _ in range(20):
            try:
                if not np.array_equal(model.logits([5, 6, 7]), logits):
                    wrong.append("logits")
            except PocketlmError as error:  # pragma: no cover - taken between its claim and its turn
                if "begun another" not in str(error):
                    wrong.append(str(error))

    threads = [threading.Thread(target=generates, args=(prompt,)) for prompt in prompts] + [threading.Thread(target=computes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert right[0] > 0  # the last to begin is never interrupted


@pytest.mark.parametrize("use", [
    lambda model: list(model.generate("then")), lambda model: list(model.chat(TALK)), lambda model: model.logits([5]),
    lambda model: model.set_threads(1), lambda model: model.set_backend("numpy"), lambda model: model.fingerprint,
], ids=["generate", "chat", "logits", "set_threads", "set_backend", "fingerprint"])  # fmt: skip
def test_a_closed_model_says_so(model, use):
    model.close()
    with pytest.raises(PocketlmError, match="closed; load it again"):
        use(model)


def test_close_waits_for_a_computation_in_another_thread(model):
    prompt = [5] * 500
    expected = model.logits(prompt)
    results: list[object] = []
    started = threading.Event()

    def compute() -> None:
        for _ in range(50):
            started.set()
            try:
                results.append(np.array_equal(model.logits(prompt), expected))
            except PocketlmError as error:
                results.append("closed" in str(error))
            except BaseException as error:
                results.append(error)

    thread = threading.Thread(target=compute)
    thread.start()
    started.wait()
    model.close()
    thread.join(60)
    assert results == [True] * 50


def test_a_long_prompt_gives_way_between_two_blocks(path):
    """The older answer is still reading its prompt when the younger one begins: it ends there, with an error."""
    with pocketlm.load(path, backend="numpy", threads=1, ctx=4096) as model:
        step, outcome = model.executor.step, []
        younger: list[threading.Thread] = []

        def slow(work, *how):
            result = step(work, *how)
            if len(work[0][1]) == 512 and not younger:
                younger.append(threading.Thread(target=lambda: outcome.append(ids(model.generate("then", **OPTIONS)))))
                claim = model.own_session.state._claim
                younger[0].start()
                while model.own_session.state._claim is claim:
                    pass
            return result

        model.executor.step = slow  # type: ignore[method-assign]
        with pytest.raises(PocketlmError, match="begun another"):
            list(model.generate([5] * 2000, max_tokens=1))
        younger[0].join(60)
        assert outcome == [ids(model.generate("then", **OPTIONS))]
