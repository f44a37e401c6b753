"""The Python face: what `pocketlm.load` returns does what its docstrings say, on tiny models of both backends."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from tiny_models import SPECIALS, TOKENS, write_model

import pocketlm
from pocketlm.errors import FileError, PocketlmError, UsageError
from pocketlm.runtime import memory
from pocketlm.runtime.evaluation import perplexity

TALK = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "the thing"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", n_ctx=512, metadata={"general.name": "Tiny"})


@pytest.fixture(params=["numpy", "native"])
def model(request, path):
    with pocketlm.load(path, backend=request.param, threads=2) as model:
        yield model


def texts(pieces) -> str:
    return "".join(piece.text for piece in pieces)


def test_the_attributes_describe_the_model(model, path):
    assert (model.name, model.path, model.n_threads, model.n_ctx) == ("Tiny", path, 2, 512)
    assert model.backend in ("numpy", "native")
    assert model.hyper.n_vocab == model.tokenizer.n_vocab == len(TOKENS)
    assert model.file_bytes == path.stat().st_size
    assert model.n_parameters == sum(tensor.data.nbytes for tensor in model.tensors.values()) // 4
    assert model.metadata["llama.block_count"] == 2


def test_a_model_without_a_name_is_called_by_its_file(tmp_path):
    for name in (None, "  "):
        with pocketlm.load(write_model(tmp_path / "my-model.gguf", metadata={"general.name": name}), backend="numpy") as model:
            assert model.name == "my-model"


def test_logits_start_from_an_empty_cache(model):
    ids = model.tokenizer.encode("then in the thing")
    first = model.logits(ids)
    assert first.shape == (len(ids), model.hyper.n_vocab)
    assert first.dtype == np.float32
    list(model.generate("something else", max_tokens=3))
    np.testing.assert_array_equal(model.logits(ids), first)
    assert model.context_used == len(ids)


def test_generate_takes_a_text_or_its_ids(model):
    ids = model.tokenizer.encode("then")
    options = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    assert texts(model.generate("then", **options)) == texts(model.generate(ids, **options))


def test_greedy_is_the_likeliest_token_with_its_probability(model):
    ids = model.tokenizer.encode("then")
    pieces = list(model.generate(ids, max_tokens=5, temperature=0, repeat_penalty=1.0, ignore_eos=True))
    answer = [piece.id for piece in pieces[:-1]]
    logits = model.logits(ids + answer)[len(ids) - 1 : -1].astype(np.float64)
    assert answer == logits.argmax(1).tolist()
    expected = logits.max(1) - np.log(np.exp(logits).sum(1))
    np.testing.assert_allclose([piece.logprob for piece in pieces[:-1]], expected, atol=1e-2)


def test_an_empty_prompt_starts_from_the_begin_token(model):
    assert list(model.generate("", max_tokens=2, ignore_eos=True))[-1].prompt_tokens == 1


@pytest.mark.parametrize("prompt", [[], [-1], [len(TOKENS)], [1 << 40], [[1, 2], [3]]], ids=str)
def test_ids_that_are_none_are_an_error(model, prompt):
    with pytest.raises(UsageError):
        list(model.generate(prompt))
    with pytest.raises(PocketlmError, match="token ids must be a list"):
        model.logits(prompt)


@pytest.mark.parametrize("prompt", [[1.5], b"then", ["1"], None, 5, [[1, 2]]], ids=str)
def test_what_is_neither_a_text_nor_ids_is_no_prompt(model, prompt):
    """1.5 is not rounded to an id, nor are bytes taken for a list of ids."""
    with pytest.raises(UsageError, match="must be a text or a list of token ids"):
        model.generate(prompt, max_tokens=1)
    ids = model.tokenizer.encode("then")
    assert texts(model.generate(np.array(ids), max_tokens=3, seed=1)) == texts(model.generate(ids, max_tokens=3, seed=1))


def test_the_end_token_ends_and_ignore_eos_goes_on(model):
    end = TOKENS.index(SPECIALS[2])
    options = {"max_tokens": 4, "temperature": 0, "logit_bias": {end: 1000.0}}
    last = list(model.generate("then", **options))[-1]
    assert (last.finish_reason, last.generated_tokens) == ("stop", 0)
    last = list(model.generate("then", ignore_eos=True, **options))[-1]
    assert (last.finish_reason, last.generated_tokens) == ("length", 4)


def test_a_cancelled_answer_says_so_and_the_model_goes_on(model):
    cancel, pieces = threading.Event(), []
    for piece in model.generate("then", ignore_eos=True, cancel=cancel):
        pieces.append(piece)
        if len(pieces) == 3:
            cancel.set()
    assert pieces[-1].finish_reason == "cancelled"
    assert pieces[-1].generated_tokens == 3
    assert list(model.generate("then", max_tokens=2, ignore_eos=True))[-1].generated_tokens == 2


def test_an_abandoned_answer_leaves_the_model_usable(model):
    stream = model.generate("then", ignore_eos=True)
    next(stream)
    stream.close()
    with_cache = texts(model.generate("then", max_tokens=5, temperature=0, ignore_eos=True))
    assert with_cache == texts(model.generate("then", max_tokens=5, temperature=0, ignore_eos=True, reuse_cache=False))


def test_a_chat_reuses_what_is_in_the_cache(model):
    first = list(model.chat(TALK, max_tokens=10, temperature=0))
    again = [*TALK, {"role": "assistant", "content": texts(first)}, {"role": "user", "content": "in the"}]
    second = list(model.chat(again, max_tokens=4, temperature=0))[-1]
    assert second.cached_tokens >= first[-1].prompt_tokens
    assert list(model.chat(again, max_tokens=4, reuse_cache=False))[-1].cached_tokens == 0


def test_a_chat_without_messages_is_an_error(model):
    with pytest.raises(PocketlmError, match="no messages"):
        list(model.chat([]))


def test_the_template_can_be_replaced(model):
    from pocketlm.chat.templates import named

    before = list(model.chat(TALK, max_tokens=1))[-1].prompt_tokens
    model.template = named("alpaca", model.tokenizer)
    assert list(model.chat(TALK, max_tokens=1))[-1].prompt_tokens != before


def test_threads_and_backend_can_be_changed_and_the_answer_stays(model):
    options = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    before = texts(model.generate("then", **options))
    model.set_threads(1)
    assert model.n_threads == 1
    assert texts(model.generate("then", **options)) == before
    for backend in ("numpy", "native"):
        model.set_backend(backend)
        assert model.backend == backend
        assert texts(model.generate("then", **options)) == before


def test_a_backend_that_cannot_start_leaves_the_one_that_runs(model, monkeypatch):
    before = model.backend
    with pytest.raises(UsageError):
        model.set_backend("cuda")
    with pytest.raises(UsageError):
        model.set_threads(0)
    real, calls = memory.require, []

    def refuse_once(*words):
        calls.append(words)
        if len(calls) == 1:
            raise FileError("m.gguf", "needs more than there is")
        real(*words)

    monkeypatch.setattr(memory, "require", refuse_once)
    with pytest.raises(FileError):
        model.set_backend("numpy")
    assert model.backend == before
    assert list(model.generate("then", max_tokens=2, ignore_eos=True))[-1].generated_tokens == 2


def test_closing_twice_is_harmless(path):
    for backend in ("numpy", "native"):
        with pocketlm.load(path, backend=backend) as model:
            model.close()
        before = threading.active_count()
        model.close()
        assert threading.active_count() == before


def test_two_models_do_not_disturb_each_other(path, tmp_path):
    other_path = write_model(tmp_path / "other.gguf", arch="gpt2", seed=5)
    with pocketlm.load(path) as model, pocketlm.load(other_path) as other:
        ids = model.tokenizer.encode("then in the thing")
        alone, others = model.logits(ids), other.logits(ids)
        for _ in range(3):
            np.testing.assert_array_equal(model.logits(ids), alone)
            np.testing.assert_array_equal(other.logits(ids), others)


# ── vocabularies that do not match the table ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_rows_beyond_the_vocabulary_are_never_drawn(tmp_path, backend):
    path = write_model(tmp_path / "model.gguf", rows=len(TOKENS) + 500)
    with pocketlm.load(path, backend=backend) as model:
        assert model.hyper.n_vocab == len(TOKENS) + 500
        for temperature in (0, 5.0):
            pieces = list(
                model.generate(
                    "then", max_tokens=60, temperature=temperature, top_k=0, top_p=1, min_p=0, seed=1, ignore_eos=True
                )
            )
            assert max(piece.id for piece in pieces) < len(TOKENS)
            assert pieces[-1].generated_tokens == 60


def test_more_tokens_than_rows_is_an_error(tmp_path):
    with pytest.raises(FileError, match="263 tokens, but a token table of 262 rows"):
        pocketlm.load(write_model(tmp_path / "model.gguf", rows=len(TOKENS) - 1))


# ── contexts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_default_context_is_the_models_own_up_to_4096(tmp_path):
    for trained, given in ((100, 100), (100_000, 4096)):
        with pocketlm.load(write_model(tmp_path / "model.gguf", n_ctx=trained), backend="numpy") as model:
            assert model.n_ctx == given


@pytest.mark.parametrize("backend", ["numpy", "native"])
@pytest.mark.parametrize("ctx", [1, 2, 17])
def test_the_smallest_contexts_work(path, backend, ctx):
    with pocketlm.load(path, backend=backend, ctx=ctx) as model:
        last = list(model.generate([5], ignore_eos=True))[-1]
        assert last.finish_reason == "length"
        assert last.generated_tokens == ctx
        assert "full" in last.note
        with pytest.raises(PocketlmError, match="context"):
            model.logits([5] * (ctx + 1))


# ── perplexity ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bos", [None, 260])
@pytest.mark.parametrize("window", [2, 7, 100, 200, 512])
def test_perplexity_is_that_of_the_windows(model, bos, window):
    ids = np.random.default_rng(0).integers(0, 256, 301).tolist()
    lead = [] if bos is None else [bos]
    step, nats, count = window - len(lead), 0.0, 0
    for start in range(0, len(ids), step):
        block = lead + ids[start : start + step]
        logits = model.logits(block).astype(np.float64)
        logits -= np.log(np.exp(logits).sum(1, keepdims=True))
        nats -= sum(logits[i, block[i + 1]] for i in range(len(block) - 1))
        count += len(block) - 1
    result = perplexity(model.executor, ids, bos, window)
    assert result.n_tokens == count
    assert result.nats == pytest.approx(nats, rel=1e-4)
    assert model.context_used == 0


def test_perplexity_of_almost_nothing_is_an_error(model):
    for ids in ([], [5]):
        with pytest.raises(PocketlmError, match="two tokens"):
            perplexity(model.executor, ids, None)
    assert perplexity(model.executor, [5], 260).n_tokens == 1
