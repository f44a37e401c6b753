"""The chat in a real pseudo-terminal: what a person sees and which keys do what."""

import os
import sys
import time
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect", reason="pexpect drives the pseudo-terminal")
pyte = pytest.importorskip("pyte", reason="pyte is the terminal that is looked at")
if not hasattr(pexpect, "spawn"):
    pytest.skip("there is no pseudo-terminal on this system", allow_module_level=True)

DRIVER = str(Path(__file__).with_name("chat_fake.py"))
ENTER, ALT_ENTER, CTRL_C, CTRL_D, UP, TAB = "\r", "\x1b\r", "\x03", "\x04", "\x1b[A", "\t"


class Terminal:
    """A program in a terminal of 80 × 24, and what stands on its screen."""

    def __init__(self, command: list[str], home: Path, **environment: str):
        known = {**os.environ, "TERM": "xterm-256color", "XDG_DATA_HOME": str(home), "PYTHONUTF8": "1", **environment}
        if "NO_COLOR" not in environment:
            known.pop("NO_COLOR", None)
        self.child = pexpect.spawn(command[0], command[1:], env=known, encoding="utf-8", dimensions=(24, 80), timeout=60)
        self.screen = pyte.HistoryScreen(80, 24, history=1000)
        self.screen.write_process_input = self.child.send  # answers the question where the cursor is
        self.stream = pyte.Stream(self.screen)
        self.raw = ""

    def read(self, seconds: float = 0.05) -> None:
        try:
            text = self.child.read_nonblocking(65536, seconds)
        except (pexpect.TIMEOUT, pexpect.EOF):
            return
        self.raw += text
        self.stream.feed(text)

    def text(self) -> str:
        """Everything that was written, what has left the screen at the top included."""
        above = ["".join(line[column].data for column in range(self.screen.columns)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display])

    def wait(self, wanted: str, times: int = 1, seconds: float = 60) -> None:
        """Until `wanted` stands on the screen this often."""
        end = time.monotonic() + seconds
        while self.text().count(wanted) < times:
            self.read()
            assert time.monotonic() < end, f"no {wanted!r} ({times}×) in:\n{self.text()}"

    def prompt(self, n: int) -> None:
        """Until the n-th prompt waits for input: the last line that is not empty is a prompt of its own."""
        end = time.monotonic() + 60
        while True:
            self.read()
            lines = [line for line in self.text().splitlines() if line]
            if sum(line.startswith(">") for line in lines) >= n and lines[-1] == ">":
                return
            assert time.monotonic() < end, f"no prompt {n} in:\n{self.text()}"

    def type(self, keys: str) -> None:
        self.child.send(keys)

    def ended(self) -> int:
        end = time.monotonic() + 60
        while self.child.isalive() and time.monotonic() < end:
            self.read()
        self.read()
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def terminal(tmp_path):
    opened = []

    def open_terminal(*arguments: str, command: tuple[str, ...] = (sys.executable, DRIVER), **environment: str) -> Terminal:
        opened.append(Terminal([*command, *arguments], tmp_path, **environment))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.child.close(force=True)


def test_three_turns_an_interrupted_answer_resizing_and_history(terminal):
    shown = terminal()
    shown.prompt(1)
    assert "Fake 1M" in shown.text()
    assert "1 M parameters · 2 MB · numpy · 2 threads · context 100" in shown.text()
    shown.type("Hello" + ENTER)
    shown.wait("You said: Hello\n")
    shown.wait("6.0 tokens/s · 3 tokens · context 10/100 (10%)")
    shown.prompt(2)

    shown.type("slow" + ENTER)
    shown.wait("word3")
    shown.type(CTRL_C)
    shown.wait("(stopped)")
    shown.prompt(3)

    shown.child.setwinsize(40, 60)
    shown.screen.resize(40, 60)
    shown.type("How wide am I")
    shown.wait("> How wide am I")
    shown.type(ENTER)
    shown.wait("You said: How wide am I\n")
    shown.prompt(4)

    shown.type(UP)
    shown.wait("> How wide am I", 2)
    shown.type(UP + UP)
    shown.wait("> Hello", 2)
    shown.type(ENTER)
    shown.wait("You said: Hello\n", 2)
    shown.prompt(5)

    shown.type(CTRL_D)
    assert shown.ended() == 0
    assert "Traceback" not in shown.text()


def test_ctrl_c_clears_the_line_and_twice_says_how_to_leave(terminal):
    shown = terminal()
    shown.prompt(1)
    shown.type("half a thought")
    shown.wait("half a thought")
    shown.type(CTRL_C)
    shown.prompt(2)
    assert "Ctrl-D leaves" not in shown.text().replace("· Ctrl-D leaves", "")
    shown.type(CTRL_C)
    shown.wait("\nCtrl-D leaves")
    shown.type("Hello" + ENTER)
    shown.wait("You said: Hello\n")
    shown.type("/quit" + ENTER)
    assert shown.ended() == 0


def test_one_message_may_have_several_lines(terminal):
    shown = terminal()
    shown.prompt(1)
    shown.type("one" + ALT_ENTER + "two\\" + ENTER + "three" + ENTER)
    shown.wait("You said: one\ntwo\nthree\n")
    shown.prompt(2)
    shown.type("\x1b[200~pasted\nblock\n\x1b[201~" + ENTER)  # how a terminal marks what is pasted
    shown.wait("You said: pasted\nblock\n")
    shown.type(CTRL_D)
    shown.ended()


def test_tab_completes_a_command(terminal):
    shown = terminal()
    shown.prompt(1)
    shown.type("/max" + TAB)
    shown.wait("> /max_tokens")
    shown.type(" 7" + ENTER)
    shown.wait("max_tokens: 7")
    shown.type(CTRL_D)
    shown.ended()


def test_the_next_chat_resumes_and_remembers_what_was_typed(terminal):
    first = terminal()
    first.prompt(1)
    first.type("Remember me" + ENTER)
    first.wait("You said: Remember me\n")
    first.prompt(2)
    first.type(CTRL_D)
    first.ended()
    second = terminal("--resume")
    second.wait("resumed: 1 turn with Fake 1M")
    second.wait("You said: Remember me")
    second.type(UP)
    second.wait("> Remember me", 2)
    second.type(CTRL_C + CTRL_D)
    second.ended()


def test_no_save_keeps_no_history(terminal, tmp_path):
    shown = terminal("--no-save")
    shown.prompt(1)
    shown.type("secret" + ENTER)
    shown.wait("You said: secret\n")
    shown.type(CTRL_D)
    shown.ended()
    assert list(tmp_path.rglob("*")) == []


def test_a_model_cannot_steer_the_terminal(terminal):
    shown = terminal()
    shown.prompt(1)
    before = len(shown.raw)
    shown.type("escape" + ENTER)
    shown.wait("red31m")
    assert "\x1b]0;" not in shown.raw[before:]
    assert "\x1b[2J" not in shown.raw[before:]
    shown.type(CTRL_D)
    shown.ended()


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_who_wants_no_colours_sees_none(terminal, environment):
    shown = terminal(**environment)
    shown.wait("Fake 1M")
    shown.wait("\n>")
    shown.type("Hello" + (ENTER if "NO_COLOR" in environment else "\n"))
    shown.wait("You said: Hello\n")
    shown.wait("tokens/s")
    assert "\x1b[1m" not in shown.raw
    assert "\x1b[2m" not in shown.raw
    if "TERM" in environment:
        assert "\x1b" not in shown.raw
    shown.type(CTRL_D)
    shown.ended()


def test_a_conversation_with_smollm2(terminal, smollm2_path):
    command = (sys.executable, "-m", "pocketlm", "chat", str(smollm2_path))
    shown = terminal("--ignore-eos", "--max-tokens", "12", command=command)
    shown.prompt(1)
    assert "135 M parameters" in shown.text()
    for n, question in enumerate(("Hello", "Tell me a story.", "Thank you!"), 1):
        shown.type(question + ENTER)
        shown.wait("12 tokens", n, 120)
        shown.prompt(n + 1)
    shown.type("/max_tokens 4000" + ENTER)
    shown.wait("max_tokens: 4000")
    shown.type("Count." + ENTER)
    shown.wait("Count.\n")
    time.sleep(1)
    shown.type(CTRL_C)
    shown.wait("(stopped)", seconds=120)
    shown.type("/max_tokens 12" + ENTER)
    shown.wait("max_tokens: 12\n")
    shown.type("Hello again" + ENTER)
    shown.wait("12 tokens", 4, 120)
    shown.type(CTRL_D)
    assert shown.ended() == 0
    assert "Traceback" not in shown.text()
