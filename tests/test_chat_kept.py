"""What is kept of conversations: whose they are, that none is overwritten, and how they are listed, found and exported."""

import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from chat_fake import FakeModel

from pocketlm.chat import saved, transcript
from pocketlm.chat.repl import run
from pocketlm.chat.transcript import Conversation, Record
from pocketlm.cli import main
from pocketlm.errors import FileError, PocketlmError

DRIVER = str(Path(__file__).with_name("chat_fake.py"))
pytestmark = pytest.mark.usefixtures("home")


def chat(*lines, model=None, **options):
    """Notes of a chat through pipes that is kept, a line a message."""
    shown, notes = io.StringIO(), io.StringIO()
    given = {"sampling": {}, "save": True, "lines": True, **options}
    run(model or FakeModel(), **given, stdin=io.StringIO("".join(f"{line}\n" for line in lines)), stdout=shown, stderr=notes)
    return notes.getvalue()


def keep(name, *questions, model="Fake 1M", model_id="f" * 32, interactive=True, age=0):
    """Write a conversation, as one that changed `age` seconds ago."""
    messages = [m for q in questions for m in ({"role": "user", "content": q}, {"role": "assistant", "content": "Yes."})]
    path = transcript.chats_folder() / f"{name}.json"
    Record(path).save(Conversation("", messages, model, model_id, interactive))
    os.utime(path, (time.time() - age,) * 2)
    return path


def kept():
    return [transcript.load(path) for path in saved.paths()]


# ---- whose conversation it is


def talk(terminal, question, *arguments):
    shown = terminal(*arguments)
    shown.prompt(1)
    shown.type(f"{question}\r", f"You said: {question}")
    shown.prompt(2 if "--resume" not in arguments else 3)
    shown.leave()
    return shown.text()


def test_resume_goes_on_with_the_last_conversation_that_a_person_held_with_this_model(terminal, home):
    talk(terminal, "I am with Ada", "--model=Ada")
    talk(terminal, "I am with Bob", "--model=Bob")
    environment = {**os.environ, "XDG_DATA_HOME": str(home)}
    command = [sys.executable, DRIVER, "--model=Ada", "--save"]
    subprocess.run(command, input=b"from a script", env=environment, check=True, capture_output=True)
    resumed = terminal("--model=Ada", "--resume")
    resumed.wait("resumed: 1 turn with Ada, ")
    resumed.wait("You said: I am with Ada")
    assert "another model" not in resumed.text()
    resumed.prompt(2)
    resumed.leave()
    new = terminal("--model=Eve", "--resume")
    new.wait("there is no saved conversation with this model yet: a new one begins")


def test_a_named_conversation_of_another_model_is_resumed_and_named(terminal):
    talk(terminal, "I am with Ada", "--model=Ada")
    (path,) = saved.paths()
    resumed = terminal("--model=Bob", f"--resume={path.stem}")
    resumed.wait("resumed: 1 turn with Ada (another model), ")
    resumed.wait("You said: I am with Ada")


def test_pipes_keep_nothing_unless_they_are_asked_to(home):
    chat("one", save=None)
    assert not (home / "pocketlm").exists()
    chat("one", save=True)
    assert [conversation.interactive for conversation in kept()] == [False]


def test_resume_names_a_conversation_that_came_through_a_pipe():
    chat("one", save=True)
    (path,) = saved.paths()
    note = f"there is no saved conversation with this model yet, but for a program's (--resume {path.stem}): a new one begins\n"
    assert chat("two", save=True, resume=True) == note
    assert chat("three", save=True, resume=path.stem).startswith("resumed: 1 turn with Fake 1M, ")


def test_a_conversation_of_an_earlier_version_is_read_and_belongs_to_nobody():
    path = transcript.chats_folder() / "20250101-101010-1.json"
    path.parent.mkdir(parents=True)
    old = {"format": transcript.FORMAT, "system": "", "model": "Fake 1M", "messages": [
        {"role": "user", "content": "old"}, {"role": "assistant", "content": "Yes."},
    ]}  # fmt: skip
    path.write_text("\ufeff" + json.dumps(old), encoding="utf-8")  # seen in an editor since
    assert saved.latest("f" * 32) is None
    model = FakeModel()
    assert "resumed: 1 turn with Fake 1M, " in chat("new", model=model, resume="20250101")
    assert [message["content"] for message in model.asked[0]] == ["old", "Yes.", "new"]


def test_a_failed_first_question_leaves_no_file():
    chat("fail")
    assert saved.paths() == []
    chat("one", "fail", "/undo")
    assert saved.paths() == []


def test_two_conversations_of_one_second_have_two_files(monkeypatch):
    monkeypatch.setattr(transcript.time, "strftime", lambda *_: "20260101-000000")
    chat("one", "/reset", "two", "/reset", "three")
    assert Counter(conversation.messages[0]["content"] for conversation in kept()) == Counter(["one", "two", "three"])


# ---- two programs and one conversation


def test_two_windows_on_one_conversation_lose_nothing(terminal):
    talk(terminal, "the beginning")
    windows = [terminal("--resume") for _ in range(2)]
    for window in windows:  # both are open before one of them says anything
        window.wait("You said: the beginning")
    for number, window in enumerate(windows):
        window.type(f"window {number}\r", f"You said: window {number}")
        window.wait("tokens/s")
    windows[1].wait("was changed by another program")
    assert "was changed" not in windows[0].text()
    for n, window in enumerate(reversed(windows)):
        window.type(f"again {n}\r", f"You said: again {n}")
        window.wait("tokens/s", 2)
        window.leave()
    assert windows[1].text().count("was changed by another program") == 1
    questions = [[m["content"] for m in each["messages"][::2]] for each in windows[0].conversations()]
    assert sorted(questions) == [["the beginning", "window 0", "again 1"], ["the beginning", "window 1", "again 0"]]


@pytest.mark.parametrize("change", ["edited", "deleted", "replaced"])
def test_a_file_that_changed_is_left_alone(change, home):
    path = keep("20260101-000000-1", "one")
    seen = {}

    class Meddled(FakeModel):
        def chat(self, messages, **options):
            if not seen:
                if change == "deleted":
                    path.unlink()
                else:
                    path.write_text("mine" if change == "replaced" else path.read_text().replace("two", "2"))
                seen["content"] = path.read_bytes() if path.exists() else None
            yield from super().chat(messages, **options)

    notes = chat("two", "three", model=Meddled(), resume="20260101")
    changed = " was changed by another program, and stays as it is: this conversation goes on as "
    assert notes.count(" was deleted meanwhile: this conversation is kept as " if change == "deleted" else changed) == 1
    assert (path.read_bytes() if path.exists() else None) == seen["content"]
    new = [transcript.load(other) for other in saved.paths() if other != path]
    assert [[m["content"] for m in each.messages[::2]] for each in new] == [["one", "two", "three"]]


def _write_often(folder, name, number, n_saves, barrier):
    os.environ.update({"XDG_DATA_HOME": folder, "LOCALAPPDATA": folder})
    transcript.LOCK_SECONDS = 1e9  # who waits for seconds is not in their turn, and none of these is suspended
    record = Record()
    conversation = record.load(saved.find(name))
    barrier.wait()
    for n in range(n_saves):
        conversation.messages += [
            {"role": "user", "content": f"{number}.{n}"}, {"role": "assistant", "content": "x" * 1000 * (n % 7)},
        ]  # fmt: skip
        record.save(conversation)


def test_many_writers_of_one_conversation_lose_nothing(home):
    keep("20260101-000000-1", "the beginning")
    n_writers, n_saves = 8, 25
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(n_writers)
    writers = [
        context.Process(target=_write_often, args=(str(home), "20260101-000000-1", number, n_saves, barrier))
        for number in range(n_writers)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * n_writers
    found = sorted([m["content"] for m in conversation.messages[::2]] for conversation in kept())
    wanted = sorted(["the beginning", *(f"{number}.{n}" for n in range(n_saves))] for number in range(n_writers))
    assert found == wanted
    assert not [path for path in transcript.chats_folder().iterdir() if path.name.startswith(".") and path.name != ".lock"]


@pytest.mark.skipif(os.name == "nt", reason="flock is POSIX")
def test_a_program_that_was_suspended_with_the_lock_holds_nobody_up(monkeypatch):
    import fcntl

    path = keep("20260101-000000-1", "one")
    monkeypatch.setattr(transcript, "LOCK_SECONDS", 0.1)
    with open(path.with_name(".lock"), "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = path.read_bytes()
        chat("two", resume="20260101")
    assert path.read_bytes() == before
    assert max(conversation.n_turns for conversation in kept()) == 2


def test_save_writes_over_its_own_copies_only(tmp_path):
    path = tmp_path / "talk.json"
    chat("one", f"/save {path}", "two", f"/save {path}", save=False)
    assert transcript.load(path).n_turns == 2
    assert os.listdir(tmp_path) == ["talk.json"]
    notes = chat("other", f"/save {path}", save=False)
    assert notes == f"pocketlm: {path}: holds another conversation; choose another name\n"
    assert transcript.load(path).messages[0]["content"] == "one"


def test_a_conversation_that_save_alone_has_kept_is_resumed():
    notes = chat("/save", "one", "/save", save=False)
    assert notes.startswith("pocketlm: there is nothing to save yet\nsaved: ")
    assert [conversation.model_id for conversation in kept()] == ["f" * 32]


def test_what_killed_saves_leave_is_taken_away_later():
    path = keep("20260101-000000-1", "one")
    rests = [path.with_name(f".{path.name}.{n}") for n in range(2)]
    for rest in rests:
        rest.write_text("half a conv")
    os.utime(rests[0], (1, 1))
    chat("two")
    assert [rest.exists() for rest in rests] == [False, True]


# ---- lists, names, numbers


def test_load_shows_model_date_turns_and_first_words_and_takes_a_number_or_a_beginning():
    keep("20260103-101010-1", "Tell me\na long story about a fox who wanted to see the sea", "And then?", model="Ada")
    keep("20260102-101010-1", "Hello", model="Bob", age=100)
    keep("20260102-111111-1", "Bye", model="Bob", age=50)
    date = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d")
    head, *lines = date.sub("DATE", chat("/load", save=False)).splitlines()
    assert head == "/load NUMBER, or NAME, or how that begins:"
    assert lines == [
        "1  20260103-101010-1  Ada · DATE · 2 turns · Tell me a long story about a fox who wa…",
        "2  20260102-111111-1  Bob · DATE · 1 turn · Bye",
        "3  20260102-101010-1  Bob · DATE · 1 turn · Hello",
    ]
    for name in ("3", "20260102-10", "20260102-101010-1", "20260102-101010-1.json"):
        model = FakeModel()
        chat(f"/load {name}", "next", model=model, save=False)
        assert model.asked[0][0]["content"] == "Hello"
    assert chat("/load 20260102", save=False) == (
        "pocketlm: 2 conversations begin with '20260102': 20260102-111111-1, 20260102-101010-1\n"
    )
    assert chat("/load 4", save=False) == "pocketlm: 4: there is no such conversation; /load lists them\n"


def test_a_long_list_names_the_command_that_shows_all():
    for n in range(12):
        keep(f"20260101-0000{n:02}-1", "one", age=n)
    assert chat("/load", save=False).splitlines()[11:] == ["… and 2 more, by the beginning of their name"]


def test_damaged_and_hostile_files_are_listed_in_one_line_each():
    keep("20260101-000000-1", "\x1b[2Jred\x07", model="\x1b]0;title\x07Ada")
    transcript.chats_folder().joinpath("20250101-000000-1.json").write_text("{")
    lines = saved.listed(saved.paths())
    assert len(lines) == 2
    assert all(character.isprintable() for line in lines for character in line)
    assert any("(is not a saved conversation)" in line for line in lines)


@pytest.mark.skipif(os.name == "nt", reason="named pipes are POSIX")
def test_what_has_no_end_is_not_read_as_a_conversation(tmp_path):
    """A device gives bytes for ever, and a pipe that nobody writes to gives none."""
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe"):
        with pytest.raises(FileError, match="is not a file"):
            transcript.load(path)


def test_chats_lists_deletes_and_exports(tmp_path, capsys):
    assert main(["chats"]) == 0
    assert capsys.readouterr().out == "there are no saved conversations yet\n"
    path = keep("20260101-000000-1", "Hello", "How are you?", model="Ada")
    keep("20250101-000000-1", "Old", age=1000)
    assert main(["chats"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["20260101-000000-1", "20250101-000000-1"]
    page = tmp_path / "page.md"
    assert main(["chats", "--export", str(page), "1"]) == 0
    assert capsys.readouterr().out == f"{page}: 2 turns\n"
    assert page.read_text() == (
        "# A conversation with Ada\n\n**You:** Hello\n\n**Ada:** Yes.\n\n**You:** How are you?\n\n**Ada:** Yes.\n"
    )
    assert main(["chats", "--export", str(page), "1"]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["chats", "--delete", "2026"]) == 0
    assert capsys.readouterr().out.startswith("deleted: 20260101-000000-1  Ada · ")
    assert not path.exists()
    assert len(saved.paths()) == 1


def test_chats_deletes_nothing_but_conversations(tmp_path, capsys):
    precious = tmp_path / "thesis.txt"
    precious.write_text("years of work")
    assert main(["chats", "--delete", str(precious)]) == 1
    assert "is not a saved conversation" in capsys.readouterr().err
    assert precious.exists()


@pytest.mark.parametrize("options", [["--delete", "nothing"], ["--export", "page.md", "nothing"]])
def test_chats_says_which_command_lists_them(options, capsys):
    assert main(["chats", *options]) == 1
    assert capsys.readouterr().err == "pocketlm: nothing: there is no such conversation; pocketlm chats lists them\n"


def test_find_raises_what_it_says():
    with pytest.raises(PocketlmError, match="there is no such conversation"):
        saved.find("nothing")
    keep("20260101-000000-1", "a")
    keep("20260101-000000-2", "b")
    with pytest.raises(PocketlmError, match="2 conversations begin with"):
        saved.find("2026")


@pytest.mark.parametrize("line", ["/load " + "9" * 5000, "/load ~a\0b", "/save ~a\0b", "/load a\0b", "/save a\0b"])
def test_a_name_that_nothing_can_have_is_one_line(line):
    notes = chat("one", line)
    assert notes.startswith("pocketlm: ")
    assert notes.count("\n") == 1


def test_other_ways_that_a_conversation_went_are_kept_and_checked(tmp_path):
    """The page makes them; the terminal, which knows none, keeps those whose beginning is still there."""
    def other(at):
        return {"at": at, "messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c", "cut": True}]}

    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "d"}]
    path = tmp_path / "kept.json"
    record = transcript.Record(path)
    record.save(transcript.Conversation(messages=messages, branches=[other(0), other(2)]))
    assert transcript.load(path).branches == [other(0), other(2)]
    again = transcript.Record()
    conversation = again.load(path)
    del conversation.messages[1:]
    again.save(conversation)
    assert transcript.load(path).branches == [other(0)]
    for wrong in ({"at": 0}, "x", {"at": 0, "messages": [{"role": "x", "content": "y"}]}):
        file = {"format": transcript.FORMAT, "messages": messages, "branches": [wrong]}
        path.write_text(json.dumps(file))
        with pytest.raises(FileError, match="damaged"):
            transcript.load(path)


def test_other_ways_do_not_end_up_behind_another_question():
    """What went on from a question that was taken back goes with it; other answers to one that is asked again stay."""

    def other(at):
        return {"at": at, "messages": [{"role": "user" if at % 2 == 0 else "assistant", "content": "x"}]}

    def branches(*lines, last="two"):
        chat("one", "two", save=True)
        record = transcript.Record()
        conversation = record.load(path := saved.paths()[0])
        conversation.messages[2]["content"] = last
        conversation.branches = [other(at) for at in (0, 2, 3, 4)]
        record.save(conversation)
        chat(*lines, save=True, resume=path.stem)
        found = [each["at"] for each in transcript.load(path).branches]
        path.unlink()
        return found

    assert branches("three") == [0, 2, 3, 4]
    assert branches("/undo", "three") == [0, 2]
    assert branches("/retry") == [0, 2, 3]
    assert branches("/retry", "three", last="fail") == [0, 2], "a question that gets no answer is taken back"
    assert branches("/undo", "/undo") == [0], "the file stays for what is still in it"
