"""The chat through pipes: what it reads, answers, keeps and says; a fake model, no terminal."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from chat_fake import FakeModel

from pocketlm.chat import console, slash_commands, transcript
from pocketlm.chat.repl import run
from pocketlm.errors import FileError, PocketlmError
from pocketlm.terminal_text import without_controls

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
DRIVER = str(Path(__file__).with_name("chat_fake.py"))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def chat(*lines: str, model=None, **options):
    """(answers, notes, status, model) of a chat in which each of these lines is a message or a command."""
    model = model or FakeModel()
    stdout, stderr = io.StringIO(), io.StringIO()
    given = {"sampling": {}, "save": False, "lines": True, **options}
    status = run(model, **given, stdin=io.StringIO("".join(line + "\n" for line in lines)), stdout=stdout, stderr=stderr)
    return stdout.getvalue(), stderr.getvalue(), status, model


def test_piped_lines_are_answered_and_the_end_of_input_ends_the_chat():
    assert chat("Hello", "", "Bye")[:3] == ("You said: Hello\nYou said: Bye\n", "", 0)


def test_the_conversation_grows_by_a_question_and_an_answer():
    model = chat("Hello", "Bye", system="Be brief.")[3]
    assert model.asked[1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "You said: Hello"},
        {"role": "user", "content": "Bye"},
    ]


def test_commands_in_a_pipe_answer_on_standard_error():
    answers, notes, status, model = chat("/max_tokens 2", "Hello", "/quit", "never")
    assert (answers, notes, status) == ("You said:\n", "max_tokens: 2\n", 0)
    assert model.sampling["max_tokens"] == 2
    assert len(model.asked) == 1


def test_a_program_sees_no_colours_prompts_or_banner():
    child = subprocess.run(
        [sys.executable, DRIVER], input=b"/max_tokens 50\nHello\n/quit\n", capture_output=True, timeout=60, check=True
    )
    end = os.linesep.encode()
    assert child.stdout == b"You said: Hello" + end
    assert child.stderr == b"max_tokens: 50" + end


def test_a_reader_that_has_seen_enough_ends_the_chat_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    child = subprocess.run([sys.executable, DRIVER], input=b"Hello\n" * 20, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (child.returncode, child.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("encoding", "sent", "expected"),
    [
        ("ascii", "héllo".encode(), b"You said: h??llo"),
        ("latin-1", b"h\xe9llo", b"You said: h\xe9llo"),
        ("utf-8", b"h\xffllo", "You said: h\ufffdllo".encode()),
    ],
)
def test_other_encodings_lose_letters_but_never_the_chat(encoding, sent, expected):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = [sys.executable, DRIVER]
    child = subprocess.run(command, input=sent + b"\n", capture_output=True, timeout=60, check=True, env=environment)
    assert child.stdout.strip() == expected
    note = f"some letters are lost: what comes is not {encoding.upper()}"
    assert child.stderr.decode().strip() == ("" if encoding == "latin-1" else note)


def test_the_pipe_of_a_windows_console_is_in_its_encoding(monkeypatch):
    """Whole lines are, also where some of their bytes would be UTF-8."""
    monkeypatch.setattr(console, "_console_page", lambda: 866)
    decode = lambda page, data, errors, final: (data.decode(f"cp{page}", errors), len(data))  # noqa: E731
    monkeypatch.setattr(console.codecs, "code_page_decode", decode, raising=False)
    stdin = io.TextIOWrapper(io.BytesIO("Привет\r\n".encode("cp866") + "Привет\n".encode()), encoding="utf-8")
    shown, notes = io.StringIO(), io.StringIO()
    run(FakeModel(), sampling={}, lines=True, stdin=stdin, stdout=shown, stderr=notes)
    assert (shown.getvalue(), notes.getvalue()) == ("You said: Привет\n" * 2, "")


def test_a_byte_order_mark_is_no_part_of_the_first_message():
    assert chat("\ufeffHello")[0] == "You said: Hello\n"


def test_a_backslash_at_the_end_continues_the_message():
    assert chat("one\\", "two\\", "three")[3].asked[0][-1]["content"] == "one\ntwo\nthree"
    assert chat("one\\")[3].asked[0][-1]["content"] == "one"


def test_two_slashes_send_a_line_with_a_slash():
    assert chat("//usr/bin")[3].asked[0][-1]["content"] == "/usr/bin"


def test_an_error_is_one_line_and_the_question_is_taken_back():
    answers, notes, status, model = chat("Hello", "fail", "Bye")
    assert notes == "pocketlm: the prompt has 101 tokens but the context holds 100\n"
    assert answers == "You said: Hello\nYou said: Bye\n"
    assert status == 1
    assert [message["content"] for message in model.asked[-1]] == ["Hello", "You said: Hello", "Bye"]


def test_a_template_that_failed_is_reported_once():
    assert chat("template", "template")[1] == "the model's chat template cannot be used (x): chatml takes its place\n"


def test_a_model_cannot_take_over_the_terminal():
    assert chat("escape")[0] == "You said: ]0;title[2Jred31m\ttab\nline\n"
    assert without_controls("".join(map(chr, range(256)))) == "\t\n" + "".join(map(chr, [*range(32, 127), *range(160, 256)]))


# ---- commands ------------------------------------------------------------------------------------------------------------

REQUIRED = (
    "help quit reset system temp top_k top_p min_p repeat_penalty max_tokens seed stop think stats undo retry more save load "
    "threads backend"
)


def test_the_table_holds_every_command_and_help_shows_each():
    assert list(slash_commands.COMMANDS) == REQUIRED.split()
    notes = chat("/help")[1]
    assert [line.split()[0] for line in notes.splitlines()[:-1]] == [f"/{name}" for name in REQUIRED.split()]


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("/tmep 1", "pocketlm: /tmep is no command, did you mean /temp?; /help lists them, //… sends a line with a slash"),
        ("/xyzzy", "pocketlm: /xyzzy is no command; /help lists them, //… sends a line with a slash"),
        ("/temp", "temperature: 0.7"),
        ("/temp 0", "temperature: 0.0"),
        ("/TEMP 1.5", "temperature: 1.5"),
        ("/temp -1", "pocketlm: temperature is -1.0; it must be a number from 0 up (0: always the likeliest token)"),
        ("/temp nan", "pocketlm: temperature is nan; it must be a number from 0 up (0: always the likeliest token)"),
        ("/temp hot", "pocketlm: 'hot' is no number"),
        ("/top_k 5", "top_k: 5"),
        ("/top_k 5.5", "pocketlm: '5.5' is no whole number"),
        ("/top_p 2", "pocketlm: top_p is 2.0; it must be over 0 and at most 1 (1: off)"),
        ("/min_p 0.1", "min_p: 0.1"),
        ("/repeat_penalty 1", "repeat_penalty: 1.0"),
        ("/max_tokens 0", "pocketlm: max_tokens is 0; it must be from 1 to 1000000"),
        ("/max_tokens", "max_tokens: 1024"),
        ("/seed 7", "seed: 7"),
        ("/seed off", "seed: None"),
        ("/stop", "stop: (only where the model ends its turn)"),
        ("/stop a\\nb", "stop: 'a\\nb'"),
        ("/system", "system: (none)"),
        ("/system Be brief.", "system: Be brief."),
        ("/stats maybe", "pocketlm: /stats maybe: expected on, off or nothing"),
        ("/threads 3", "threads: 3"),
        ("/threads 0", "pocketlm: threads 0: expected 1 to 64"),
        ("/backend numpy", "backend: numpy"),
        ("/backend cuda", "pocketlm: backend cuda: expected one of auto, numpy"),
        ("/backend nunpy", "pocketlm: backend nunpy: expected one of auto, numpy, did you mean numpy?"),
        ("/stats of", "pocketlm: /stats of: expected on, off or nothing, did you mean off?"),
        ("/seed of", "pocketlm: 'of' is no whole number, did you mean off?"),
        ("/quit now?", "pocketlm: /quit now?: nothing can stand behind /quit"),
        ("/undo 2", "pocketlm: /undo 2: nothing can stand behind /undo"),
        ("/more", "there is no answer to continue yet"),
        ("/undo", "there is no question to take back"),
        ("/retry", "there is no question to take back"),
        ("/reset", "a new conversation"),
        ("/load nothing", "pocketlm: nothing: there is no such conversation; /load lists them"),
    ],
)
def test_a_command_answers_in_one_line(line, note):
    assert chat(line)[1] == note + "\n"


def test_what_commands_set_reaches_the_model():
    model = chat("/temp 0.5", "/top_k 3", "/seed 9", "/stop END", "/stop x", "Hello", sampling={"top_p": 0.9})[3]
    assert model.sampling == {"max_tokens": 1024, "top_p": 0.9, "temperature": 0.5, "top_k": 3, "seed": 9, "stop": ("END", "x")}
    assert chat("/stop END", "/stop off", "Hello")[3].sampling["stop"] == ()


def test_retry_says_what_is_asked_again():
    notes = chat("one", "/retry")[1]
    assert "asked again: one\n" in notes
    assert "taken back" not in notes


def test_undo_takes_the_last_turn_back():
    model = chat("one", "two", "/undo", "three")[3]
    assert [message["content"] for message in model.asked[-1]] == ["one", "You said: one", "three"]


def test_retry_asks_again():
    model = chat("one", "two", "/retry")[3]
    assert model.asked[-1] == model.asked[-2]


def test_reset_forgets_all_but_the_system_prompt():
    model = chat("/system Be brief.", "one", "/reset", "two")[3]
    assert model.asked[-1] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two"}]


def test_stats_shows_speed_and_context():
    notes = chat("Hello", "/stats")[1]
    assert "4.0 tokens/s · 3 tokens · context 10/100 (10%)" in notes
    assert "prompt: 4 new tokens, 8 from the cache, 40 tokens/s" in notes
    notes = chat("/stats on", "/max_tokens 1", "Hello")[1]
    assert notes.endswith("0.0 tokens/s · 1 token · context 10/100 (10%) · cut off, /more continues\n")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/te", ["/temp"]),
        ("/s", ["/system", "/seed", "/stop", "/stats", "/save"]),
        ("/backend n", ["native", "numpy"]),
        ("hello", []),
        ("/nothing x", []),
    ],
)
def test_tab_completes_commands(line, words):
    assert slash_commands.complete(line) == words


# ---- what is kept -----------------------------------------------------------------------------------------------------


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
