"""A resumed conversation goes on from what was computed of it: the same answer, sooner; without, if that is damaged."""

import io
import os
import time

import pytest

import pocketlm
from pocketlm.chat import saved, states, transcript
from pocketlm.chat.opening import Opening
from pocketlm.chat.repl import run
from pocketlm.cli import main

ASKED = ("Hello! Who are you?", "What do you like best?", "Tell me a little story about a cat.")


@pytest.fixture(autouse=True)
def short(home, monkeypatch):
    monkeypatch.setattr(states, "SHORTEST", 16)


def load(**options):
    return pocketlm.load("small-talk", threads=1, **options)


def chat(*lines, model=None, **options):
    """What is shown and noted of a chat that is kept."""
    shown, notes = io.StringIO(), io.StringIO()
    given = {"sampling": {"seed": 1, "max_tokens": 60}, "save": True, "lines": True, **options}
    with model or load() as opened:
        run(opened, **given, stdin=io.StringIO("".join(f"{line}\n" for line in lines)), stdout=shown, stderr=notes)
    return shown.getvalue(), notes.getvalue()


def from_the_cache(notes):
    return [int(line.split(",")[1].split()[0]) for line in notes.splitlines() if line.startswith("prompt:")][-1]


def kept():
    return sorted((transcript.data_folder() / "states").glob("*"))


def resumed(**options):
    (path,) = saved.paths()
    before = path.read_bytes()
    answer, notes = chat("And then?", "/stats", resume=path.stem, **options)
    path.write_bytes(before)  # as if nobody had asked
    assert "resumed: 3 turns" in notes
    return answer, from_the_cache(notes)


def test_the_answer_is_the_same_and_the_prompt_need_not_be_computed():
    chat(*ASKED)
    (state,) = kept()
    content = state.read_bytes()
    answer, n_cached = resumed()
    assert n_cached > 100
    for file in kept():
        file.unlink()
    assert resumed() == (answer, 0)
    state.write_bytes(content)
    assert resumed()[1] == n_cached


def test_a_model_that_opens_behind_the_prompt_finds_it_too():
    model_id = "m" * 32
    chat(*ASKED, model_id=model_id)
    with Opening(load, "small-talk") as model:
        _, notes = chat("And then?", "/stats", model=model, model_id=model_id, resume=saved.paths()[0].stem)
    assert from_the_cache(notes) > 100


@pytest.mark.parametrize("harm", ["one bit", "half", "empty", "a folder", "another model's", "noise"])
def test_a_damaged_state_is_computed_anew(harm):
    chat(*ASKED)
    (state,) = kept()
    content = state.read_bytes()
    expected = resumed()
    state.unlink()
    if harm == "a folder":
        state.mkdir()
    else:
        bad = bytearray(content)
        bad[len(bad) // 2] ^= 1
        half, noise = content[: len(content) // 2], os.urandom(len(content))
        other = content[:40] + bytes(32) + content[72:]
        state.write_bytes({"one bit": bytes(bad), "half": half, "empty": b"", "another model's": other, "noise": noise}[harm])
    assert resumed() == (expected[0], 0)


def test_another_backend_and_a_shorter_context_compute_anew():
    chat(*ASKED)
    (state,) = kept()
    content = state.read_bytes()
    assert resumed(model=load(backend="numpy"))[1] == 0
    state.write_bytes(content)
    assert resumed(model=load(ctx=100))[1] == 0


def test_nothing_is_kept_with_no_save_or_of_little():
    chat(*ASKED, save=False)
    assert not kept()
    states.SHORTEST = 10_000
    chat(*ASKED)
    assert not kept()


def test_a_deleted_conversation_takes_its_state_along(capsys):
    chat(*ASKED)
    assert len(kept()) == 1
    assert main(["chats", "--delete", saved.paths()[0].stem]) == 0
    assert not kept()


def test_what_was_computed_of_one_conversation_is_not_kept_as_anothers(monkeypatch):
    monkeypatch.setattr(states, "SHORTEST", 100)
    chat("Hi!")
    (other,) = saved.paths()
    for command in ("/reset", f"/load {other.stem}"):
        chat(*ASKED, command)
        assert not kept()


def test_words_that_are_taken_back_are_in_no_state():
    chat(*ASKED, "/undo")
    assert not kept()
    chat("And then?", resume=saved.paths()[0].stem)
    assert len(kept()) == 1
    chat("/undo", resume=saved.paths()[0].stem)
    assert not kept()
    chat("And then?", resume=saved.paths()[0].stem)
    chat(*["/undo"] * 3, resume=saved.paths()[0].stem)
    assert not kept()
    assert not saved.paths()


def test_a_question_without_an_answer_is_in_no_state():
    chat(*ASKED)
    (state,) = kept()
    before = state.read_bytes()
    chat("And then?", resume=saved.paths()[0].stem, sampling={"max_tokens": 0})
    assert state.read_bytes() == before


def test_old_ones_go(monkeypatch):
    monkeypatch.setattr(states, "MOST", 2)
    for age in (3000, 2000, 1000):
        chat("Hello! How are you today, my friend?")
        os.utime(max(kept(), key=os.path.getmtime), (time.time() - age,) * 2)
    newest = kept()
    assert [round(time.time() - file.stat().st_mtime, -3) for file in newest] in ([1000, 2000], [2000, 1000])
    assert len(saved.paths()) == 3, "the conversations themselves stay"
    monkeypatch.setattr(states, "MOST_BYTES", 10)
    chat("Hello! How are you today, my friend?")
    assert kept() == newest, "one that is too large is not written"


def test_what_was_moved_is_not_kept_as_if_it_were_exact():
    with load(ctx=200) as model:
        session = model.own_session
        messages = []
        for question in (*ASKED, *ASKED):
            messages.append({"role": "user", "content": question})
            text = "".join(piece.text for piece in model.chat(messages, max_tokens=60, seed=2))
            messages.append({"role": "assistant", "content": text})
        assert session._turns.dropped
        assert session.state.n_exact < len(session.state.ids)
        ids = session.state.ids[: session.state.n_exact]
        assert session.fork().state.n_exact == len(ids)
        session.state.advance([*ids, 5])
        assert session.state.n_exact == len(ids) + 1
