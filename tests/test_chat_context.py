"""What a chat says and does when the context is full or an answer was cut, and about characters that a model does not know."""

import io

import numpy as np
import pytest
from chat_fake import FakeModel
from tiny_models import TOKENS, write_model

import pocketlm
from pocketlm.chat.repl import run
from pocketlm.chat.templates import continued, named
from pocketlm.model import find_model
from pocketlm.tokenizer.characters import from_table

ENTER, CTRL_C, CTRL_D = "\r", "\x03", "\x04"


def chat(model, *lines, **options):
    """Answers and notes of a chat, in the order of the screen."""
    shown = io.StringIO()
    given = {"sampling": {"temperature": 0, "max_tokens": 20}, "lines": True, **options}
    run(model, **given, stdin=io.StringIO("".join(f"{line}\n" for line in lines)), stdout=shown, stderr=shown)
    return shown.getvalue()


# ---- turns that are forgotten


def test_turns_that_go_are_told_before_the_answer_each_time(terminal):
    shown = terminal("--turns=2")
    for n in range(1, 6):
        shown.prompt(n)
        shown.type(f"question {n}" + ENTER, f"You said: question {n}")
    shown.wait("tokens/s", 5)
    lines = [line for line in shown.text().splitlines() if line and "tokens/s" not in line][3:]
    assert lines[: lines.index("You said: question 5") + 1] == [
        "> question 1", "You said: question 1", "> question 2", "You said: question 2",
        "> question 3", "the oldest turn was forgotten", "You said: question 3",
        "> question 4", "the 2 oldest turns were forgotten", "You said: question 4",
        "> question 5", "the 3 oldest turns were forgotten", "You said: question 5",
    ]  # fmt: skip
    assert "\x1b[2mthe 3 oldest turns were forgotten\x1b[0m" in shown.raw


def test_nothing_is_forgotten_for_a_question_that_does_not_fit(tmp_path):
    path = write_model(tmp_path / "model.gguf", n_ctx=128, seed=1)
    with pocketlm.load(path, backend="numpy") as model:
        shown = chat(model, "the thing", "the thing " * 200)
    assert shown.splitlines()[-1].startswith("pocketlm: the prompt has ")
    assert "forgotten" not in shown


def test_the_number_is_that_of_the_turns_the_model_does_not_see(tmp_path):
    path = write_model(tmp_path / "model.gguf", n_ctx=128, seed=1)
    questions = [f"{n} the thing in the inn" for n in range(7)]
    with pocketlm.load(path, backend="numpy") as model:
        seen = []
        encode = model.template.encode

        def watched(messages, tokenizer, *arguments, **keywords):
            seen.append(sum(message["role"] == "user" for message in messages))
            return encode(messages, tokenizer, *arguments, **keywords)

        model.template.encode = watched
        shown = chat(model, *questions, sampling={"temperature": 0, "max_tokens": 8})
        forgotten = len(questions) - seen[-1]
    assert forgotten > 2
    assert f"the {forgotten} oldest turns were forgotten\n" in shown


def test_the_pieces_of_a_stream_say_how_many_turns_are_gone(tmp_path):
    path = write_model(tmp_path / "model.gguf", n_ctx=128, seed=1)
    messages = [{"role": role, "content": "the thing in the inn"} for _ in range(6) for role in ("user", "assistant")][:-1]
    with pocketlm.load(path, backend="numpy") as model:
        first, *_, last = model.chat(messages, temperature=0, max_tokens=4)
        assert (first.text, first.id, first.finish_reason) == ("", -1, None)
        assert first.dropped_turns == last.dropped_turns > 0
        assert all(piece.dropped_turns == 0 for piece in model.chat(messages[:1], temperature=0, max_tokens=4))


# ---- a base model: a text and no turns


@pytest.mark.parametrize("arch", ["llama", "gpt2", "refact"])
def test_a_base_model_goes_on_beyond_its_context(arch, tmp_path):
    path = write_model(tmp_path / "model.gguf", arch=arch, n_ctx=64, metadata={"general.name": "Base"})
    options = {"template": "plain", "sampling": {"temperature": 0, "max_tokens": 150, "ignore_eos": True}}
    with pocketlm.load(path, backend="numpy") as model:
        shown = chat(model, "Once upon a time", "/stats", "and then", "/stats", **options)
    assert shown.count("150 tokens") == 2
    assert "begin a new" not in shown
    assert "the context of 64 tokens is full: the oldest " in shown
    assert " tokens were forgotten\n" in shown


def test_what_a_base_model_writes_follows_from_what_it_still_sees(tmp_path):
    """Learned positions: nothing is moved, so every token is the likeliest after exactly the tokens that are left."""
    path = write_model(tmp_path / "model.gguf", arch="gpt2", n_ctx=32, metadata={"tokenizer.ggml.add_bos_token": True})
    with pocketlm.load(path, backend="numpy") as model, pocketlm.load(path, backend="numpy") as other:
        model.template = named("plain", model.tokenizer)
        options = {"temperature": 0, "repeat_penalty": 1, "max_tokens": 70, "ignore_eos": True}
        ids = [piece.id for piece in model.chat([{"role": "user", "content": "then in the"}], **options) if piece.id >= 0]
        window = other.tokenizer.encode("then in the", bos=True)
        assert window[0] == other.tokenizer.bos_id
        for id in ids:
            if len(window) > 32:
                del window[1 : 1 + 31 // 2]  # the older half behind the first token
            assert id == int(np.argmax(other.logits(window)[-1]))
            window.append(id)
        assert len(ids) == 70


def test_a_text_that_is_too_long_for_a_base_model_loses_its_beginning(tmp_path):
    path = write_model(tmp_path / "model.gguf", n_ctx=64, metadata={"tokenizer.ggml.add_bos_token": True})
    text = "".join(chr(97 + n % 26) for n in range(300))
    with pocketlm.load(path, backend="numpy") as model:
        model.template = named("plain", model.tokenizer)
        first, *_ = model.chat([{"role": "user", "content": text}], max_tokens=3, temperature=0)
        whole = model.tokenizer.encode(text, bos=True)
        kept = model.own_session.state.ids[: 64 - 3]
        assert kept == [model.tokenizer.bos_id, *whole[-(64 - 3 - 1) :]]
        assert first.note == f"the oldest {len(whole) - len(kept)} tokens were forgotten"
        text = model.tokenizer.decode(whole[1 : 64 - 3 + 1])
        n_lost = len(model.tokenizer.encode(text, bos=True)) - (64 - 3)
        assert n_lost == 1
        first, *_ = model.chat([{"role": "user", "content": text}], max_tokens=3, temperature=0)
        assert first.note == "the oldest token was forgotten"


def test_without_a_limit_a_base_model_still_ends(tmp_path):
    path = write_model(tmp_path / "model.gguf", n_ctx=32)
    with pocketlm.load(path, backend="numpy") as model:
        model.template = named("plain", model.tokenizer)
        *_, last = model.chat([{"role": "user", "content": "then"}], temperature=0, ignore_eos=True)
        assert last.finish_reason == "length"


# ---- answers that were cut


def test_more_goes_on_where_an_answer_was_cut():
    with pocketlm.load(find_model("small-talk"), backend="numpy") as model:
        whole = chat(model, "Tell me a joke.", sampling={"temperature": 0, "max_tokens": 100})
        parts = chat(model, "/max_tokens 6", "Tell me a joke.", "/more", "/max_tokens 100", "/more", "/more", lines=True,
                     sampling={"temperature": 0})  # fmt: skip
    notes = ("max_tokens", "the last answer")
    said = [line for line in parts.splitlines() if not line.startswith(notes)]
    assert len(said) == 3
    assert "".join(said) == whole.replace("\n", "")
    assert parts.endswith("the last answer has come to its end\n")


def test_a_last_message_of_the_assistant_is_the_beginning_of_its_answer():
    question = {"role": "user", "content": "Tell me a joke."}
    with pocketlm.load(find_model("small-talk"), backend="numpy") as model:
        texts = [piece.text for piece in model.chat([question], temperature=0)]
        for cut in range(1, len(texts) - 1):
            messages = [question, {"role": "assistant", "content": "".join(texts[:cut])}]
            assert [piece.text for piece in model.chat(messages, temperature=0)] == texts[cut:]
        assert cut > 8


def test_more_in_a_fake_conversation_is_one_answer():
    model = FakeModel()
    shown = chat(model, "/max_tokens 2", "one two three", "/more", "/max_tokens 9", "/more", "next", sampling={})
    assert [line for line in shown.splitlines() if not line.startswith("max_tokens")] == [
        "You said:", " one two", " three", "You said: next",
    ]  # fmt: skip
    assert [message["content"] for message in model.asked[-1]] == ["one two three", "You said: one two three", "next"]


def test_cut_off_says_how_to_go_on(terminal):
    shown = terminal()
    shown.prompt(1)
    shown.type("/max_tokens 2" + ENTER, "max_tokens: 2\n")
    shown.type("one two" + ENTER, "cut off, /more continues")
    shown.type("/stats off" + ENTER)
    shown.prompt(4)
    shown.type("one two" + ENTER, "(cut off: /more continues)")
    shown.type("/max_tokens 9" + ENTER, "max_tokens: 9\n")
    shown.type("/more" + ENTER, "\n one two\n")
    shown.leave()
    (conversation,) = shown.conversations()
    answers = conversation["messages"][1::2]
    assert answers[0]["cut"] is True
    assert answers[1] == {"role": "assistant", "content": "You said: one two"}


@pytest.mark.parametrize("text", ["", "Hello", " Hello", "\nHello", "žluťoučký kůň", "<|im_end|> stays text"])
def test_a_continuation_is_the_text_and_no_marker(text, tmp_path):
    with pocketlm.load(write_model(tmp_path / "model.gguf"), backend="numpy") as model:
        ids = continued(text, model.tokenizer)
        assert model.tokenizer.decode(ids) == text
        assert not any(model.tokenizer.is_control(id) for id in ids)


# ---- a model of characters


def characters(letters):
    model = FakeModel()
    model.tokenizer = from_table("x", {letter: n for n, letter in enumerate(letters)})
    return model


def test_what_a_vocabulary_lacks_is_left_out_and_named_once():
    model = characters("abcdefghijklmnopqrstuvwxyzA .?:Y")
    shown = chat(model, "née à Łódź\u200b?", "née", "ñ", "a ñ", system="Sé", sampling={})
    notes = [line for line in shown.splitlines() if line.startswith("left out")]
    assert notes == [
        "left out, because this model does not know them: S à é ó Ł ź U+200B",
        "left out, because this model does not know it: ñ",
    ]
    assert model.asked[0] == [{"role": "system", "content": ""}, {"role": "user", "content": "ne  d?"}]
    assert "pocketlm: this model knows none of the message's characters\n" in shown
    assert model.asked[-1][-1]["content"] == "a "


def test_a_model_with_an_unknown_token_is_told_everything():
    model = FakeModel()
    model.tokenizer = from_table("x", {"a": 0, "<unk>": 1})
    assert "left out" not in chat(model, "žluťoučký")
    assert model.asked[0][-1]["content"] == "žluťoučký"


def test_a_text_with_every_byte_has_nothing_left_out(tmp_path):
    assert len(TOKENS) > 256
    with pocketlm.load(write_model(tmp_path / "model.gguf"), backend="numpy") as model:
        assert "left out" not in chat(model, "žluťoučký kůň \u200b")
