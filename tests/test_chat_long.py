"""A long conversation: what is remembered from one question to the next changes no id, and bounds what a question costs."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import pytest
from chat_data import PUBLISHED, SYSTEM
from tiny_models import vocabulary, write_model

import pocketlm
from pocketlm.chat import templates
from pocketlm.conversation import ANSWER_ROOM, Turns
from pocketlm.tokenizer import Tokenizer, from_metadata

MARKERS = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
PIECES = [  # of contents: what merges, what templates trim, what steers and what only looks so
    "the thing", "then", "in", " ", "  ", "\n", "\n\n", "t", "h", "e", "<", "|>", "im_end", "<|im_end|>", "<|im_", "user",
    "</s>", "<end_of_turn>", "<s>", "ş", "😀", "[INST]", "?", "",
]  # fmt: skip


def _byte_bpe() -> dict:
    return vocabulary()


def _sentencepiece(prefix: bool = True) -> dict:
    """Pieces that reach over a space: the text between two markers cannot be cut into words."""
    pieces = [*"▁abcdefghijklmnopqrstuvwxyz\n?", "th", "the", "▁the", "e▁t", "▁t", "in", "▁in", "n▁", "ing", "thing"]
    tokens = ["<unk>", *MARKERS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.token_type": [2] + [3] * len(MARKERS) + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * (len(tokens) - len(pieces)) + [float(len(piece)) for piece in pieces],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip


def _characters() -> dict:
    letters = sorted({*"".join(PIECES), *map(chr, range(32, 127)), "\n", "｜", "▁", "用", "户"})
    return {
        "pocketlm.tokenizer.kind": "characters", "tokenizer.ggml.model": "characters",
        "tokenizer.ggml.tokens": [*letters, *MARKERS], "tokenizer.ggml.token_type": [1] * len(letters) + [3] * len(MARKERS),
    }  # fmt: skip


KINDS: dict[str, Callable[[], dict]] = {
    "byte-level BPE": _byte_bpe,
    "SentencePiece": _sentencepiece,
    "SentencePiece without a prefix": lambda: _sentencepiece(False),
    "that strips around markers": lambda: {**_sentencepiece(), "general.name": "Phi-3"},
    "symbols": lambda: {**_sentencepiece(), "tokenizer.ggml.token_type": [
        4 if kind == 3 and i > 2 else kind for i, kind in enumerate(_sentencepiece()["tokenizer.ggml.token_type"])
    ]},
    "characters": _characters,
}  # fmt: skip


@cache
def objects(kind: str, template: str) -> tuple[Tokenizer, templates.Template, Tokenizer, templates.Template]:
    """A tokenizer and a template that remember, and the same for those that forget."""
    made = []
    for _ in range(2):
        tokenizer = from_metadata(KINDS[kind](), "test")
        own = template in PUBLISHED
        made += [tokenizer, templates.choose(PUBLISHED[template], tokenizer) if own else templates.named(template, tokenizer)]
    return tuple(made)


def forget(tokenizer: Tokenizer, template: templates.Template) -> None:
    tokenizer._texts, tokenizer._texts_length, template._markers = {}, 0, None
    tokenizer._words.clear()


def content(chance: random.Random, longest: int = 6) -> str:
    return "".join(chance.choice(PIECES) for _ in range(chance.randint(0, longest)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*PUBLISHED, *templates.BUILT_IN])
def test_a_growing_conversation_has_the_ids_that_it_has_alone(kind, name):
    tokenizer, template, other, forgetful = objects(kind, name)
    chance = random.Random(f"{kind} {name}")
    for round_ in range(2):
        messages = [SYSTEM] * round_
        for _ in range(6):
            messages.append({"role": "user", "content": content(chance)})
            ids = template.encode(messages, tokenizer)
            forget(other, forgetful)
            assert ids == forgetful.encode(messages, other)
            ids.append(0)  # what was given away is the caller's
            messages.append({"role": "assistant", "content": content(chance)})
        del messages[-4:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_with_markers_is_the_ids_of_what_stands_between_them(kind):
    """Merges do not reach over a marker; around it, each text has the ids it has in a text of its own."""
    tokenizer, _, other, _ = objects(kind, "chatml")
    chance = random.Random(kind)
    for _ in range(300):
        text = content(chance, 20)
        other._texts, other._texts_length = {}, 0
        assert tokenizer.encode(text, special=True) == other.encode(text, special=True)


# ── turns that have to go ────────────────────────────────────────────────────────────────────────────────────────────


def one_by_one(messages: list[dict], template: templates.Template, tokenizer: Tokenizer, room: int) -> tuple[list[int], int]:
    """The definition: the oldest turn goes, everything is encoded again, until it fits or one turn is left."""
    left, dropped = list(messages), 0
    while True:
        ids = template.encode(left, tokenizer)
        starts = [i for i, message in enumerate(left) if message["role"] == "user"]
        if len(ids) <= room or len(starts) < 2:
            return ids, dropped
        del left[starts[0] : starts[1]]
        dropped += 1


@pytest.mark.parametrize("name", ["chatml", "llama-3", "mistral-v3", "gemma", "alpaca", "plain"])
@pytest.mark.parametrize("room", [40, 200])
def test_the_turns_that_go_are_those_that_would_go_one_by_one(name, room):
    tokenizer, template, _, _ = objects("byte-level BPE", name)
    chance = random.Random(room)
    for system in ([], [SYSTEM]):
        messages, turns = list(system), None
        for step in range(24):
            messages.append({"role": "user", "content": content(chance, chance.choice([1, 5, 40]))})
            turns = Turns(messages, template, tokenizer, turns)
            ids = turns.fit(room)
            if step % 4 == 3:  # one by one takes long
                assert (ids, turns.dropped) == one_by_one(messages, template, tokenizer, room)
            cold = Turns(messages, template, tokenizer)  # a conversation that is resumed
            assert (cold.fit(room), cold.dropped) == (ids, turns.dropped)
            messages.append({"role": "assistant", "content": content(chance, chance.choice([1, 5, 40]))})


def test_a_conversation_that_does_not_go_on_from_the_last_is_looked_at_whole():
    tokenizer, template, _, _ = objects("byte-level BPE", "chatml")
    long = [{"role": role, "content": f"the thing {i}"} for i in range(30) for role in ("user", "assistant")][:-1]
    before = Turns(long, template, tokenizer)
    before.fit(200)
    assert before.dropped > 0
    changed = [{**long[0], "content": "other"}, *long[1:]]
    for messages in (long[:3], changed, long[:-2], [SYSTEM, *long]):
        assert Turns(messages, template, tokenizer, before).dropped == 0
    assert Turns(long, templates.named("alpaca", tokenizer), tokenizer, before).dropped == 0
    assert Turns(long, template, tokenizer, before).dropped == before.dropped
    long[0]["content"] = "changed in place"
    assert Turns(long, template, tokenizer, before).dropped == 0


def test_what_a_context_cannot_hold_at_all_goes_at_the_cost_of_a_look_at_each_message():
    tokenizer, template, _, _ = objects("byte-level BPE", "chatml")
    looks = []

    class Text(str):
        def __len__(self):
            looks.append(1)
            return super().__len__()

    said = [{"role": role, "content": Text(f"thing {i}")} for i in range(400) for role in ("user", "assistant")][:-1]
    turns, n_chars = Turns([SYSTEM, *said], template, tokenizer), len(SYSTEM["content"]) + 100
    looks.clear()
    turns.drop_beyond(n_chars)
    assert len(looks) <= 2 * len(said)
    rest = [len(str(message["content"])) for message in said[2 * turns.dropped - 2 :]]
    assert sum(rest[2:]) <= 100 < sum(rest)  # one turn less would have been too few
    turns.drop_beyond(0)
    assert turns.dropped == 399


# ── what a question costs ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n_ctx", [512, 1 << 16])
def test_the_hundredth_question_costs_what_the_tenth_does(tmp_path, monkeypatch, n_ctx):
    """Counted in characters: those that become ids, and those that the template is given where the context is small."""
    rendered, encoded = [0], [0]
    chance = random.Random(1)
    path = write_model(tmp_path / "m.gguf", n_ctx=1 << 16, metadata={"tokenizer.chat_template": PUBLISHED["chatml"]})
    with pocketlm.load(path, backend="numpy", ctx=n_ctx) as model:
        render, encode_text = model.template._render_jinja, model.tokenizer._encode_text

        def counted_render(messages, add_generation_prompt):
            rendered[0] += sum(len(message["content"]) for message in messages)
            return render(messages, add_generation_prompt)

        def counted_encode(text, start):
            encoded[0] += len(text)
            return encode_text(text, start)

        monkeypatch.setattr(model.template, "_render_jinja", counted_render)
        monkeypatch.setattr(model.tokenizer, "_encode_text", counted_encode)
        messages, costs = [], []
        for _ in range(150):
            messages.append({"role": "user", "content": "".join(chance.choice("then ") for _ in range(60))})
            rendered[0] = encoded[0] = 0
            model.chat(messages, max_tokens=100)
            costs.append((rendered[0], encoded[0]))
            messages.append({"role": "assistant", "content": "".join(chance.choice("then ") for _ in range(60))})
    assert sum(len(message["content"]) for message in messages) > 30 * 512
    for rendered_of_one, encoded_of_one in costs[20:]:
        assert encoded_of_one < 400  # the question, and the answer before it
        if n_ctx == 512:
            assert rendered_of_one < 8 * 512


def test_a_long_conversation_that_is_resumed_is_encoded_a_few_times(tmp_path):
    tokenizer, template, _, _ = objects("byte-level BPE", "chatml")
    chance = random.Random(2)
    messages = [
        {"role": role, "content": " ".join(["the thing"] * chance.randint(1, 20))}
        for _ in range(500)
        for role in ("user", "assistant")
    ][:-1]
    turns, times = Turns(messages, template, tokenizer), []
    encode = turns.encode
    turns.encode = lambda: times.append(turns.dropped) or encode()  # type: ignore[method-assign]
    ids = turns.fit(512 - ANSWER_ROOM // 2)
    assert len(ids) <= 512 - ANSWER_ROOM // 2
    assert len(times) < 12
