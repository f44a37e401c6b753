"""The chat through pipes: what it reads, answers, keeps and says; a fake model, no terminal."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chat_fake import FakeModel, chat

from pocketlm.chat import console, slash_commands
from pocketlm.chat.repl import run
from pocketlm.terminal_text import without_controls

DRIVER = str(Path(__file__).with_name("chat_fake.py"))
pytestmark = pytest.mark.usefixtures("home")


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
        ("/temp 0,5", "temperature: 0.5"),
        ("/TEMP 1.5", "temperature: 1.5"),
        ("/temp\t1.5", "temperature: 1.5"),
        ("/system\\\nBe brief.", "system: Be brief."),
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
