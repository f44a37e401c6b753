"""SmolLM2-135M-Instruct, a real Llama: faithful to its weights, and a chat that keeps its cache and never overflows.

The exact forward is that of `exact_llama`, in float64 from the dequantised weights; llama.cpp stands beside it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agreement import compare, perplexity
from exact_llama import SMOLLM2, dequantised, exact_logits
from llama_reference import LlamaReference
from tiny_models import write_model

import pocketlm
from pocketlm.errors import PocketlmError
from pocketlm.runtime.gguf_reader import open_gguf

# Lewis Carroll, Alice's Adventures in Wonderland (1865)
ALICE = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice \
she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "and what is the use \
of a book," thought Alice "without pictures or conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and stupid), \
whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking the daisies, when \
suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the Rabbit say \
to itself, "Oh dear! Oh dear! I shall be late!" (when she thought it over afterwards, it occurred to her that she ought \
to have wondered at this, but at the time it all seemed quite natural); but when the Rabbit actually took a watch out of \
its waistcoat-pocket, and looked at it, and then hurried on, Alice started to her feet, for it flashed across her mind \
that she had never before seen a rabbit with either a waistcoat-pocket, or a watch to take out of it, and burning with \
curiosity, she ran across the field after it, and fortunately was just in time to see it pop down a large rabbit-hole \
under the hedge.

In another moment down went Alice after it, never once considering how in the world she was to get out again.
"""
# Herman Melville, Moby-Dick (1851)
WHALE = """\
Call me Ishmael. Some years ago—never mind how long precisely—having little or no money in my purse, and nothing \
particular to interest me on shore, I thought I would sail about a little and see the watery part of the world. It is a \
way I have of driving off the spleen and regulating the circulation. Whenever I find myself growing grim about the mouth; \
whenever it is a damp, drizzly November in my soul; whenever I find myself involuntarily pausing before coffin \
warehouses, and bringing up the rear of every funeral I meet; and especially whenever my hypos get such an upper hand of \
me, that it requires a strong moral principle to prevent me from deliberately stepping into the street, and methodically \
knocking people's hats off—then, I account it high time to get to sea as soon as I can. This is my substitute for pistol \
and ball. With a philosophical flourish Cato throws himself upon his sword; I quietly take to the ship. There is nothing \
surprising in this. If they but knew it, almost all men in their degree, some time or other, cherish very nearly the same \
feelings towards the ocean with me.
"""
N_TOKENS = 300
HELLO = [{"role": "user", "content": "Hello! Name one colour."}]


@pytest.fixture(scope="module", params=["numpy", "native"])
def each(request, smollm2_path) -> Iterator[Any]:
    with pocketlm.load(smollm2_path, backend=request.param, threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def model(smollm2_path) -> Iterator[Any]:
    with pocketlm.load(smollm2_path) as model:
        yield model


@pytest.fixture(scope="module")
def ids(smollm2_path) -> np.ndarray:
    return np.array(pocketlm.tokenizer.load(smollm2_path).encode(ALICE)[:N_TOKENS])


@pytest.fixture(scope="module")
def exact(smollm2_path, ids) -> np.ndarray:
    assert len(ids) == N_TOKENS
    return exact_logits(dequantised(smollm2_path), ids, SMOLLM2)


def test_the_logits_are_those_of_the_weights(each, ids, exact):
    logits = each.logits(ids)
    found = compare(exact, logits)
    assert found.kl < (1e-6 if each.backend == "numpy" else 1e-5)
    assert found.max_error < (2e-3 if each.backend == "numpy" else 0.1)
    assert perplexity(logits, ids) == pytest.approx(perplexity(exact, ids), rel=1e-3)


def test_llama_cpp_means_the_same_by_the_file(smollm2_path, model, ids, exact):
    """Its perplexity is compared over two texts: on 300 tokens of one, its rounding alone moves it by up to 1.1 %."""
    with LlamaReference(smollm2_path, n_ctx=512) as llama:
        assert llama.tokenize(ALICE)[:N_TOKENS] == ids.tolist()
        more = np.array(llama.tokenize(WHALE))
        theirs = [llama.logits(ids), llama.logits(more)]
    assert compare(exact, theirs[0]).kl <= 4e-3
    assert compare(model.logits(ids), theirs[0]).kl <= 4e-3
    ours = [exact, model.logits(more)]
    both = [np.sqrt(perplexity(a, ids) * perplexity(b, more)) for a, b in (ours, theirs)]
    assert both[1] == pytest.approx(both[0], rel=1e-2)


def test_token_by_token_is_the_same_as_in_one_block(each, ids, exact):
    executor = each.executor
    executor.cache.truncate(0)
    executor.forward(ids[:100])
    steps = np.concatenate([executor.forward(ids[i : i + 1]).copy() for i in range(100, 130)])
    found = compare(exact[100:130], steps)
    assert found.kl <= 1e-5
    assert found.same_first == 1


def test_eval_gives_the_perplexity_of_the_logits(model, ids, exact):
    from pocketlm.runtime.evaluation import perplexity as measured

    result = measured(model.executor, ids.tolist(), None)
    assert result.n_tokens == N_TOKENS - 1
    assert result.perplexity == pytest.approx(perplexity(exact, ids), rel=1e-3)


# ── talking to it ────────────────────────────────────────────────────────────────────────────────────────────────────


def answer(model: Any, messages: list[dict[str, str]], **options: Any) -> tuple[str, Any]:
    pieces = list(model.chat(messages, temperature=0, **options))
    return "".join(piece.text for piece in pieces), pieces[-1]


def test_a_greedy_continuation_makes_sense(each):
    pieces = list(each.generate("The capital of France is", max_tokens=8, temperature=0, repeat_penalty=1.0))
    assert "Paris" in "".join(piece.text for piece in pieces)
    assert all(piece.logprob <= 0 for piece in pieces[:-1])
    assert pieces[-1].generated_tokens == 8
    assert pieces[-1].finish_reason == "length"


def test_the_next_turn_costs_only_its_own_tokens(model):
    text, first = answer(model, HELLO, max_tokens=24)
    assert first.finish_reason in ("stop", "length")
    again = [*HELLO, {"role": "assistant", "content": text}, {"role": "user", "content": "And another one?"}]
    second = answer(model, again, max_tokens=8)[1]
    assert second.cached_tokens >= first.prompt_tokens
    assert second.prompt_tokens - second.cached_tokens < 40
    assert answer(model, again, max_tokens=8, reuse_cache=False)[1].cached_tokens == 0


def test_a_reused_cache_does_not_change_the_answer(model):
    text, _ = answer(model, HELLO, max_tokens=16)
    again = [*HELLO, {"role": "assistant", "content": text}, {"role": "user", "content": "Why that one?"}]
    assert answer(model, again, max_tokens=12)[0] == answer(model, again, max_tokens=12, reuse_cache=False)[0]


def test_a_full_context_loses_whole_turns_and_keeps_system_prompt_and_question(smollm2_path):
    """A conversation that never fits is answered turn after turn, and what is in the cache is always a whole conversation."""
    messages = [{"role": "system", "content": "You are a parrot named Polly."}]
    with pocketlm.load(smollm2_path, ctx=160) as model:
        seen = ""
        for turn in range(8):
            messages.append({"role": "user", "content": f"Question {turn}: tell me about the number {turn}, please."})
            text, last = answer(model, messages, max_tokens=40, ignore_eos=True)
            messages.append({"role": "assistant", "content": text})
            assert last.finish_reason == "length"
            assert last.generated_tokens == 40
            assert model.context_used <= model.n_ctx == 160
            seen = model.tokenizer.decode(model.own_session.state.ids, special=True)
            assert seen.startswith("<|im_start|>system\nYou are a parrot named Polly.<|im_end|>\n<|im_start|>user\n")
            assert f"Question {turn}: tell me about the number {turn}, please.<|im_end|>\n<|im_start|>assistant\n" in seen
            assert seen.count("<|im_start|>user") == seen.count("<|im_start|>assistant")
        assert "Question 0" not in seen


def test_an_answer_that_outgrows_the_context_ends_with_a_note(smollm2_path):
    with pocketlm.load(smollm2_path, ctx=64) as model:
        _, last = answer(model, HELLO, ignore_eos=True)
        assert last.finish_reason == "length"
        assert "context of 64 tokens is full" in last.note
        assert model.context_used == 64


def test_a_prompt_longer_than_the_context_is_one_line(smollm2_path):
    with pocketlm.load(smollm2_path, ctx=32) as model:
        for stream in (model.generate(ALICE), model.chat([{"role": "user", "content": ALICE}])):
            with pytest.raises(PocketlmError, match=r"the prompt has \d+ tokens but the context holds 32") as raised:
                next(stream)
            assert "\n" not in str(raised.value)
        assert list(model.generate("Once", max_tokens=2))[-1].generated_tokens == 2, "the model still works"


def test_learned_positions_are_computed_again_with_a_note(tmp_path):
    path = write_model(tmp_path / "model.gguf", arch="gpt2", n_ctx=320)
    messages: list[dict[str, str]] = []
    with pocketlm.load(path, backend="numpy", threads=1) as model:
        last = None
        for turn in range(6):
            messages.append({"role": "user", "content": f"Question {turn} of several, and a few words more to fill the room."})
            text, last = answer(model, messages, max_tokens=30, ignore_eos=True)
            messages.append({"role": "assistant", "content": text})
            assert model.context_used <= 320
        assert last is not None
        assert "learned" in last.note


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opening_does_not_copy_the_file(smollm2_path: Path):
    """The vocabulary and the header are read, the weights are not touched until an executor wants them."""
    before = _resident()
    with open_gguf(smollm2_path) as file:
        assert len(file.tensors) > 200
        assert _resident() - before < 20 << 20


def _resident() -> int:
    """Bytes of this process in memory that are its own."""
    with open("/proc/self/statm", encoding="ascii") as file:
        fields = file.read().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
