"""The chat saves itself: after every turn, by name, resumed, and where it cannot be saved; through pipes, with a fake model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from chat_fake import FakeModel, chat

from pocketlm.chat import transcript
from pocketlm.chat.repl import run
from pocketlm.errors import FileError, PocketlmError

FULL = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from chat_fake import *
from pocketlm.chat.repl import run
try:
    run(FakeModel(), sampling={{}}, save=False)
except PocketlmError as error:
    print(error, file=sys.stderr)
    sys.exit(3)
"""
pytestmark = pytest.mark.usefixtures("home")


def saved(home: Path) -> list[Path]:
    return sorted((home / "pocketlm" / "chats").glob("[!.]*"))


def test_a_conversation_is_saved_after_every_turn(home):
    seen = []

    class Watching(FakeModel):
        def chat(self, messages, **options):
            seen.append([len(json.loads(path.read_text())["messages"]) for path in saved(home)])
            yield from super().chat(messages, **options)

    chat("one", "two", "three", model=Watching(), save=True)
    assert seen == [[2], [4], [6]]  # so that a question is kept before its answer comes
    (path,) = saved(home)
    assert transcript.load(path).messages[-1] == {"role": "assistant", "content": "You said: three"}
    assert path.stat().st_mode & 0o077 == 0 or os.name == "nt"


def test_no_save_leaves_no_file(home):
    chat("one", "/system x", save=False)
    assert not (home / "pocketlm").exists()


def test_resume_goes_on_with_a_conversation(home):
    chat("/system Be brief.", "one", save=True)
    _, notes, _, model = chat("two", save=True, resume=saved(home)[0].stem)
    assert [message["content"] for message in model.asked[0]] == ["Be brief.", "one", "You said: one", "two"]
    assert notes.startswith("resumed: 1 turn with Fake 1M, ")
    assert len(saved(home)) == 1
    assert transcript.load(saved(home)[0]).n_turns == 2


def test_resume_without_a_conversation_begins_one(home):
    answers, notes, status, _ = chat("one", save=True, resume=True)
    note = "there is no saved conversation with this model yet: a new one begins\n"
    assert (answers, notes, status) == ("You said: one\n", note, 0)


def test_save_and_load_by_name(home, tmp_path):
    path = tmp_path / "talk.json"
    assert chat("one", f"/save {path}")[1] == f"saved: {path}\n"
    model = chat(f"/load {path}", "two")[3]
    assert [message["content"] for message in model.asked[0]] == ["one", "You said: one", "two"]
    chat("three", save=True)
    name = saved(home)[0].stem
    assert name in chat("/load")[1]
    assert len(chat(f"/load {name}", "four")[3].asked[0]) == 3


def test_where_nothing_can_be_saved_one_note_says_so(home):
    (home / "pocketlm").write_text("a file where the folder would be")
    answers, notes, status, _ = chat("one", "two", save=True)
    assert (answers, status) == ("You said: one\nYou said: two\n", 0)
    assert notes.count("\n") == 1
    assert re.search(r"the conversation cannot be saved \([^()]+\); it goes on without\n$", notes)


def test_what_could_not_be_saved_for_a_while_is_saved_again(home, monkeypatch):
    """A disk that was full has room again: all that was said is kept."""
    write, full = transcript.write, [False, False, True, True, True, True]  # a question and its answer, each two times

    def fails_at_times(*arguments):
        if full and full.pop(0):
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(transcript, "write", fails_at_times)
    notes = chat("one", "two", "three", "four", save=True)[1].splitlines()
    assert [note.partition(": ")[2] or note for note in notes] == [
        "the conversation cannot be saved (No space left on device); it goes on without", "the conversation is saved again"
    ]  # fmt: skip
    (path,) = saved(home)
    assert len(json.loads(path.read_text())["messages"]) == 8


def test_it_works_without_a_home(monkeypatch):
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.delenv("LOCALAPPDATA")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    answers, notes, status, _ = chat("one", "two", save=True)
    assert (answers, status) == ("You said: one\nYou said: two\n", 0)
    advice = "set XDG_DATA_HOME, or use --no-save; it goes on without"
    assert notes == f"there is no home folder to keep conversations in; {advice}\n"


def test_save_overwrites_nothing_but_conversations(tmp_path):
    precious = tmp_path / "thesis.txt"
    precious.write_text("years of work")
    assert "thesis.txt: is not a saved conversation" in chat("one", f"/save {precious}")[1]
    assert precious.read_text() == "years of work"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "/", "."])
def test_a_name_that_cannot_be_a_file_is_one_line(name):
    for command in ("/load", "/save"):
        notes, status = chat("one", f"{command} {name}")[1:3]
        assert (notes.count("\n"), status) == (1, 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        child = subprocess.run([sys.executable, "-c", FULL], input=b"Hello\n", stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert child.stderr.strip() == b"the answer cannot be written: No space left on device"
    assert child.returncode == 3


def test_a_save_that_fails_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "talk.json"
    record = transcript.Record(path)
    record.save(transcript.Conversation("", [{"role": "user", "content": "old"}]))
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(FileError, match="No space left on device"):
        record.save(transcript.Conversation("", [{"role": "user", "content": "new"}]))
    assert transcript.load(path).messages[0]["content"] == "old"
    assert [file.name for file in path.parent.iterdir()] == ["talk.json"]


DAMAGED = {
    "empty": "", "no JSON": "{", "another JSON": "[]", "another format": '{"format": "x"}', "deep": "[" * 100_000,
    "no messages": '{"format": "pocketlm conversation 1"}',
    "messages of numbers": '{"format": "pocketlm conversation 1", "messages": [1]}',
    "a strange role": '{"format": "pocketlm conversation 1", "messages": [{"role": "root", "content": ""}]}',
    "no text": '{"format": "pocketlm conversation 1", "messages": [{"role": "user", "content": null}]}',
    "a lone surrogate": '{"format": "pocketlm conversation 1", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "a strange system prompt": '{"format": "pocketlm conversation 1", "messages": [], "system": 3}',
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_conversation_is_refused_in_one_line(name, tmp_path):
    path = tmp_path / "talk.json"
    path.write_text(DAMAGED[name])
    with pytest.raises(FileError) as error:
        transcript.load(path)
    assert "\n" not in str(error.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError):
        transcript.load(path)


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"XDG_DATA_HOME": "/d"}, "/d/pocketlm"),
        ("linux", {"XDG_DATA_HOME": "relative", "HOME": "/h"}, "/h/.local/share/pocketlm"),
        ("linux", {"HOME": "/h"}, "/h/.local/share/pocketlm"),
        ("darwin", {"HOME": "/h"}, "/h/Library/Application Support/pocketlm"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/pocketlm"),
        ("win32", {}, None),
    ],
)
def test_the_data_folder_is_where_each_system_wants_it(platform, environment, expected, monkeypatch):
    for name in ("XDG_DATA_HOME", "LOCALAPPDATA", "HOME", "USERPROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv("USERPROFILE" if name == "HOME" and os.name == "nt" else name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert transcript.data_folder() == (Path(expected) if expected else None)


def test_an_unknown_conversation_name_is_an_error_before_the_first_message():
    with pytest.raises(PocketlmError, match="there is no such conversation"):
        chat("Hello", resume="nothing")


@pytest.mark.parametrize(("program", "advice"), [("pocketlm", "pocketlm chats lists them"), ("friend", "/load lists them")])
def test_who_resumes_in_a_shell_what_is_not_there_reads_which_command_lists_them(program, advice):
    with pytest.raises(FileError, match=f"nothing: there is no such conversation; {advice}"):
        run(FakeModel(), sampling={}, resume="nothing", program=program)
