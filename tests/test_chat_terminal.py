"""The chat in a real pseudo-terminal: what a person sees and which keys do what."""

import subprocess
import sys
import time

import pytest
from chat_terminal import ALT_ENTER, CTRL_C, CTRL_D, CTRL_R, CTRL_Z, DRIVER, ENTER, TAB, UP


def test_three_turns_an_interrupted_answer_resizing_and_history(terminal):
    shown = terminal()
    shown.prompt(1)
    assert "Fake 1M" in shown.text()
    assert "1 M parameters · 2 MB · numpy · 2 threads · context 100" in shown.text()
    shown.type("Hello" + ENTER, "You said: Hello\n")
    shown.wait("4.0 tokens/s · 3 tokens · context 10/100 (10%)")
    shown.prompt(2)

    shown.type("slow" + ENTER, "word3")
    shown.type(CTRL_C, "(stopped)")
    shown.prompt(3)

    shown.child.setwinsize(40, 60)
    shown.screen.resize(40, 60)
    shown.type("How wide am I", "> How wide am I")
    shown.type(ENTER, "You said: How wide am I\n")
    shown.prompt(4)

    shown.type(UP)
    shown.wait("> How wide am I", 2)
    shown.type(UP + UP)
    shown.wait("> Hello", 2)
    shown.type(ENTER)
    shown.wait("You said: Hello\n", 2)
    shown.prompt(4)

    assert shown.leave() == 0
    assert "Traceback" not in shown.text()


def test_ctrl_c_clears_the_line_and_twice_says_how_to_leave(terminal):
    shown = terminal()
    shown.prompt(1)
    shown.type("half a thought", "half a thought")
    shown.type(CTRL_C)
    shown.prompt(2)
    assert "Ctrl-D leaves" not in shown.text().replace("· Ctrl-D leaves", "")
    shown.type(CTRL_C, "\nCtrl-D leaves")
    shown.type("Hello" + ENTER, "You said: Hello\n")
    assert shown.leave("/quit" + ENTER) == 0


# A shell's part of Ctrl-Z. What SIGSTOP stops is whoever's who sent that.
SHELL = """
import os, signal, sys
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
if not (job := os.fork()):
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpgrp())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
while os.WIFSTOPPED(status := os.waitpid(job, os.WUNTRACED)[1]):
    if os.WSTOPSIG(status) == signal.SIGTSTP:
        os.tcsetpgrp(0, os.getpgrp())
        print("the shell heard:", input("suspended\\n"))
        os.tcsetpgrp(0, job)
        os.killpg(job, signal.SIGCONT)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_ctrl_z_suspends_it_and_it_comes_back(terminal):
    shown = terminal(command=(sys.executable, "-c", SHELL, DRIVER))
    shown.prompt(1)
    shown.type("half a line", "> half a line")
    shown.type(CTRL_Z, "suspended")
    shown.type("fg" + ENTER, "the shell heard: fg\n> half a line")
    shown.type(" and the rest" + ENTER, "You said: half a line and the rest\n")
    assert shown.leave() == 0


def test_what_is_typed_while_an_answer_comes_waits_for_the_next_prompt(terminal):
    shown = terminal()
    shown.prompt(1)
    shown.type("/max_tokens 60" + ENTER)
    shown.prompt(2)
    shown.type("slow" + ENTER, "word3")
    shown.type("meanwhile" + ENTER, "You said: meanwhile\n")
    shown.prompt(4)
    assert shown.text().count("meanwhile") == 2, shown.text()  # at the prompt, and in the answer
    assert "> meanwhile\n" in shown.text()
    assert shown.leave() == 0


def test_what_is_pasted_while_an_answer_comes_is_one_message_and_whole(terminal):
    shown = terminal(size=(24, 200))
    shown.prompt(1)
    shown.type("slow" + ENTER)
    shown.wait("word3")
    assert shown.raw.count("\x1b[?2004h") > shown.raw.count("\x1b[?2004l"), "the terminal is to mark what is pasted"
    text = "\n".join(f"line {n:04} of a long text" for n in range(300))  # longer than what a terminal edits by itself
    shown.type("\x1b[200~" + text.replace("\n", "\r") + "\x1b[201~")
    (shown.home / "enough").touch()  # the answer ends
    shown.wait("line 0299 of a long text")
    shown.type(ENTER)
    shown.wait("You said: line 0000")
    shown.wait("tokens/s", 2)
    shown.type(CTRL_D)
    assert shown.ended() == 0
    [conversation] = shown.conversations()
    assert [m["content"] for m in conversation["messages"] if m["role"] == "user"] == ["slow", text]


def test_ctrl_d_while_an_answer_comes_leaves_behind_it(terminal):
    shown = terminal()
    shown.prompt(1)
    shown.type("slow" + ENTER)
    shown.wait("word3")
    shown.type(CTRL_D)
    shown.wait("word9")
    (shown.home / "enough").touch()
    assert shown.ended() == 0


def test_ctrl_z_in_an_answer_gives_the_shell_its_echo_back(terminal):
    shown = terminal(command=(sys.executable, "-c", SHELL, DRIVER))
    shown.prompt(1)
    shown.type("slow" + ENTER, "word3")
    shown.type(CTRL_Z, "suspended")
    shown.type("what the shell shows", "what the shell shows")
    shown.type(ENTER, "the shell heard: what the shell shows")
    shown.wait("word", shown.text().count("word") + 3)
    shown.type("unseen")
    shown.wait("word", shown.text().count("word") + 3)
    (shown.home / "enough").touch()  # the answer ends
    shown.wait("> unseen")
    assert shown.text().count("unseen") == 1, shown.text()
    shown.type(CTRL_C)
    shown.prompt(3)
    assert shown.leave() == 0


def test_a_terminal_that_does_not_say_where_its_cursor_is_gets_no_warning():
    """prompt_toolkit has one ready, two seconds after the first prompt."""
    asks = """
from pocketlm.chat.console import _editor
print(_editor(lambda line: (), None).app.renderer.cpr_not_supported_callback)
"""
    made = subprocess.run([sys.executable, "-c", asks], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    assert made.stdout == "None\n"


def test_an_emoji_that_comes_in_two_halves_is_one_character():
    """As Windows' consoles deliver it."""
    asks = r"""
import asyncio
from pocketlm.chat.console import _editor
async def typed():
    session = _editor(lambda line: (), None)
    for buffer in (session.default_buffer, session.search_buffer):
        buffer.insert_text("and so on")
        buffer.cursor_position = 3
        for key in " \ud83d\ude00\ud83d\udc4d\ud83c\udffd!\ud83d":
            buffer.insert_text(key)
        print(ascii(buffer.text), buffer.cursor_position)
asyncio.run(typed())
"""
    made = subprocess.run([sys.executable, "-c", asks], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    assert made.stdout.splitlines() == [r"'and \U0001f600\U0001f44d\U0001f3fd!\ud83d so on' 9"] * 2


def test_ctrl_c_while_the_line_editor_is_imported_does_no_harm(terminal):
    """Of modules that were imported in part some cannot be imported again, such as asyncio."""
    driver = f"""
import importlib.abc, os, runpy, signal, sys
class Interrupts(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "asyncio.events":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
sys.argv = [{DRIVER!r}]
sys.path.insert(0, os.path.dirname({DRIVER!r}))
runpy.run_path({DRIVER!r}, run_name="__main__")
"""
    shown = terminal(command=(sys.executable, "-c", driver))
    shown.prompt(1)
    shown.type("Hello" + ENTER, "You said: Hello\n")
    assert shown.leave() == 0


def test_one_message_may_have_several_lines(terminal):
    shown = terminal()
    shown.prompt(1)
    shown.type("one" + ALT_ENTER + "two\\" + ENTER + "three" + ENTER, "You said: one\ntwo\nthree\n")
    shown.prompt(2)
    shown.type("\x1b[200~pasted\nblock\n\x1b[201~" + ENTER)  # how a terminal marks what is pasted
    shown.wait("You said: pasted\nblock\n")
    shown.leave()


def test_tab_completes_a_command(terminal):
    shown = terminal()
    shown.prompt(1)
    shown.type("/max" + TAB, "> /max_tokens")
    shown.type(" 7" + ENTER, "max_tokens: 7")
    shown.leave()


def test_the_next_chat_resumes_and_remembers_what_was_typed(terminal):
    first = terminal()
    first.prompt(1)
    first.type("Remember me" + ENTER, "You said: Remember me\n")
    first.prompt(2)
    first.leave()
    second = terminal("--resume")
    second.wait("resumed: 1 turn with Fake 1M")
    second.wait("You said: Remember me")
    second.prompt(2)
    second.type(UP)
    second.wait("> Remember me", 2)
    second.leave(CTRL_C + CTRL_D)


def test_enter_takes_what_was_searched(terminal):
    shown = terminal()
    shown.prompt(1)
    for n, text in enumerate(("Hello there", "Bye"), 2):
        shown.type(text + ENTER, f"You said: {text}\n")
        shown.prompt(n)
    shown.type(CTRL_R + "Hel", "I-search backward: Hel")
    shown.type(ENTER)
    shown.wait("> Hello there", 2)
    shown.type("! " + ENTER, "You said: ! Hello there\n")
    shown.prompt(4)
    assert shown.leave() == 0


def test_no_save_keeps_no_history(terminal, tmp_path):
    shown = terminal("--no-save")
    shown.prompt(1)
    shown.type("secret" + ENTER, "You said: secret\n")
    shown.leave()
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.skipif(sys.platform == "win32", reason="ulimit stands for a full disk")
def test_a_full_disk_is_one_line_and_the_chat_goes_on(terminal, tmp_path):
    shown = terminal(command=("sh", "-c", 'ulimit -f 0; exec "$0" "$@"', sys.executable, DRIVER))
    shown.prompt(1)
    for n, text in enumerate(("one", "two"), 2):
        shown.type(text + ENTER, f"You said: {text}\n")
        shown.prompt(n)
    shown.type(UP)
    shown.wait("> two", 2)
    assert shown.leave(CTRL_C + CTRL_D) == 0
    assert shown.text().count("cannot be saved") == 1
    assert "xception" not in shown.text()


def test_a_model_cannot_steer_the_terminal(terminal):
    shown = terminal()
    shown.prompt(1)
    before = len(shown.raw)
    shown.type("escape" + ENTER, "red31m")
    assert "\x1b]0;" not in shown.raw[before:]
    assert "\x1b[2J" not in shown.raw[before:]
    shown.leave()


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_who_wants_no_colours_sees_none(terminal, environment):
    shown = terminal(**environment)
    shown.wait("Fake 1M")
    shown.wait("\n>")
    shown.type("Hello" + (ENTER if "NO_COLOR" in environment else "\n"), "You said: Hello\n")
    shown.wait("tokens/s")
    assert "\x1b[1m" not in shown.raw
    assert "\x1b[2m" not in shown.raw
    if "TERM" in environment:
        assert "\x1b" not in shown.raw
    shown.leave()


def test_a_conversation_with_smollm2(terminal, smollm2_path):
    command = (sys.executable, "-m", "pocketlm", "chat", str(smollm2_path))
    shown = terminal("--ignore-eos", "--max-tokens", "12", command=command)
    shown.prompt(1)
    assert "135 M parameters" in shown.text()
    for n, question in enumerate(("Hello", "Tell me a story.", "Thank you!"), 1):
        shown.type(question + ENTER)
        shown.wait("12 tokens", n, 120)
        shown.prompt(n + 1)
    shown.type("/max_tokens 4000" + ENTER, "max_tokens: 4000")
    shown.type("Count." + ENTER, "Count.\n")
    time.sleep(1)
    shown.type(CTRL_C)
    shown.wait("(stopped)", seconds=120)
    shown.type("/max_tokens 12" + ENTER, "max_tokens: 12\n")
    shown.type("Hello again" + ENTER)
    shown.wait("12 tokens", 4, 120)
    assert shown.leave() == 0
    assert "Traceback" not in shown.text()
