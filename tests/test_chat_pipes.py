"""Pipes: one question, one answer; a text is one message; scripts with slash commands go on as they did."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from chat_fake import FakeModel

from pocketlm.chat import slash_commands
from pocketlm.chat.repl import run
from pocketlm.cli import main
from pocketlm.errors import PocketlmError

DRIVER = [sys.executable, str(Path(__file__).with_name("chat_fake.py"))]
POCKETLM = [sys.executable, "-m", "pocketlm", "chat"]
pytestmark = pytest.mark.usefixtures("home")


def piped(text, *arguments, command=DRIVER):
    known = {**os.environ, "PYTHONIOENCODING": "utf-8"}  # Windows' own depends on the country
    done = subprocess.run([*command, *arguments], input=text.encode(), capture_output=True, timeout=300, env=known)
    stdout, stderr = (data.decode().replace("\r\n", "\n") for data in (done.stdout, done.stderr))  # as Windows ends lines
    return stdout, stderr, done.returncode


@pytest.mark.parametrize(
    ("text", "arguments", "answers"),
    [
        ("Summarise:\na\nb", [], "You said: Summarise:\na\nb\n"),
        ("Summarise:\r\na\r\n\r\n", [], "You said: Summarise:\na\n"),
        ("ends in a backslash\\\nmore", [], "You said: ends in a backslash\\\nmore\n"),
        ("", ["Hello"], "You said: Hello\n"),
        ("a\nb\n", ["Summarise:"], "You said: Summarise:\na\nb\n"),
        ("/quit\n", ["What does this say?"], "You said: What does this say?\n/quit\n"),
        ("", ["/quit"], "You said: /quit\n"),
        ("a\nb\n", ["--lines"], "You said: a\nYou said: b\n"),
        ("Hello\nBye\n/quit\nnever\n", [], "You said: Hello\nYou said: Bye\n"),
        ("/max_tokens 2\nHello\n", [], "You said:\n"),
        ("/usr/bin/python\nis a path", [], "You said: /usr/bin/python\nis a path\n"),
        ("//quit\nis text", [], "You said: //quit\nis text\n"),
        ("\n \n", [], ""),
        ("", [], ""),
    ],
)
def test_what_is_one_message_and_what_is_many(text, arguments, answers, home):
    stdout, stderr, status = piped(text, *arguments)
    assert (stdout, status) == (answers, 0)
    assert stderr in ("", "max_tokens: 2\n")
    assert not (home / "pocketlm").exists()


def test_a_mistyped_command_is_no_message():
    assert piped("/tmep 0.5\nHello\n") == (
        "You said: Hello\n",
        "pocketlm: /tmep is no command, did you mean /temp?; /help lists them, //… sends a line with a slash\n",
        1,
    )


def test_the_script_of_a_small_runtime_works_as_before(tiny):
    """`/max_tokens` and `/quit` around questions, an answer each on standard output."""
    script = "/max_tokens 10\nHello\nAnd now?\n/quit\n"
    lines = piped(script, tiny, "--temp", "0", command=POCKETLM)
    assert lines == piped(script, tiny, "--temp", "0", "--lines", command=POCKETLM)
    assert lines[1:] == ("max_tokens: 10\n", 0)
    assert piped("Hello\n/quit\n", tiny, "--no-save", "--max-tokens", "5", command=POCKETLM)[1:] == ("", 0)


def test_a_script_that_waits_for_each_answer_may_begin_with_a_command():
    with subprocess.Popen(DRIVER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for line, answer in ((b"/temp 0\nHello\n", b"You said: Hello\n"), (b"Bye\n", b"You said: Bye\n")):
            child.stdin.write(line)
            child.stdin.flush()
            assert child.stdout.readline().replace(b"\r\n", b"\n") == answer
        child.stdin.close()
    assert child.returncode == 0


def test_a_question_at_a_terminal_is_answered_and_nothing_else_is_said(terminal):
    shown = terminal("Hello there")
    assert shown.ended() == 0
    assert shown.text().strip() == "You said: Hello there"
    assert shown.conversations() == []


def test_a_question_that_cannot_be_answered_is_status_1():
    assert piped("", "fail") == ("", "pocketlm: the prompt has 101 tokens but the context holds 100\n", 1)


def test_one_shot_answers_are_those_of_a_conversation(tiny, capsys):
    words = ["chat", tiny, "--temp", "0", "--max-tokens", "9"]
    assert main([*words, "Hello"]) == 0
    answer = capsys.readouterr()
    assert piped("Hello\n/quit\n", *words[1:], command=POCKETLM) == (answer.out, "", 0)
    assert main([words[0], *words[2:], tiny, "Hello"]) == 0  # before Python 3.12, argparse loses them behind options
    assert capsys.readouterr().out == answer.out
    assert answer.err == ""


def test_a_question_may_go_on_with_a_conversation(home):
    assert piped("My name is Ada\n/quit\n", "--save")[2] == 0
    (path,) = (home / "pocketlm" / "chats").glob("*.json")
    before = path.read_bytes()
    stdout, stderr, status = piped("", f"--resume={path.stem}", "Who am I?")
    assert (stdout, status) == ("You said: Who am I?\n", 0)
    assert stderr == f"resumed: 1 turn with Fake 1M, {path.stem}\n"
    assert path.read_bytes() == before


def test_an_endless_pipe_is_refused_and_not_stored(monkeypatch):
    from pocketlm.chat import console

    monkeypatch.setattr(console, "MAX_PIPED", 1000)

    class Endless(io.StringIO):
        def readline(self, size=-1):
            return "y" * size

    with pytest.raises(PocketlmError, match="more than 1,000 characters"):
        run(FakeModel(), sampling={}, stdin=Endless(), stdout=io.StringIO(), stderr=io.StringIO())


def test_the_help_says_how_pipes_are_read(capsys):
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "A pipe in which a line is a slash command is read line by line" in text
    for word in ("QUESTION", "--resume [NAME]", "--lines", "--save"):
        assert word in text


@pytest.mark.parametrize("name", slash_commands.COMMANDS)
def test_every_command_is_recognised_in_a_pipe(name):
    assert slash_commands.is_command(f"/{name}\n")
    assert slash_commands.is_command(f"/{name.upper()} 1\r\n")
    assert not slash_commands.is_command(f"//{name}")
    assert not slash_commands.is_command(f"text /{name}")


def test_a_pipe_into_a_terminal_is_wrapped_and_has_no_prompt(terminal, tmp_path):
    (tmp_path / "text").write_text("word " * 40)
    shown = terminal(command=("sh", "-c", f"{' '.join(DRIVER)} < {tmp_path}/text"))
    assert shown.ended() == 0
    assert os.get_terminal_size(shown.child.child_fd).columns == 80 if not shown.child.closed else True
    assert [len(line) for line in shown.text().splitlines() if line][:2] == [79, 79]


def test_a_model_behind_resume_is_the_model(tiny, capsys):
    assert main(["chat", "--temp", "0", "--max-tokens", "3", "--resume", tiny]) == 0
    assert "there is no saved conversation with this model yet" in capsys.readouterr().err


def test_a_question_without_a_model_says_how_it_is_asked(capsys):
    assert main(["chat", "How are you?"]) == 1
    error = 'there is no such model; to ask the one that comes with pocketlm: chat small-talk "…"'
    assert capsys.readouterr().err == f"pocketlm: How are you?: {error}\n"
