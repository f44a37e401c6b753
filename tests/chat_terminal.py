"""A terminal of the tests: a pseudo-terminal with a program in it, and the screen that a person would see."""

import json
import os
import time
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect", reason="pexpect drives the pseudo-terminal")
pyte = pytest.importorskip("pyte", reason="pyte is the terminal that is looked at")
if not hasattr(pexpect, "spawn"):
    pytest.skip("there is no pseudo-terminal on this system", allow_module_level=True)

DRIVER = str(Path(__file__).with_name("chat_fake.py"))
ENTER, ALT_ENTER, UP, TAB = "\r", "\x1b\r", "\x1b[A", "\t"
CTRL_C, CTRL_D, CTRL_R, CTRL_Z = "\x03", "\x04", "\x12", "\x1a"


class Terminal:
    """A program in a terminal of `size` (rows, columns), and what stands on its screen."""

    def __init__(self, command: list[str], home: Path, size: tuple[int, int] = (24, 80), **environment: str):
        self.home = home
        known = {**os.environ, "TERM": "xterm-256color", "XDG_DATA_HOME": str(home), "PYTHONUTF8": "1", **environment}
        if "NO_COLOR" not in environment:
            known.pop("NO_COLOR", None)
        self.child = pexpect.spawn(command[0], command[1:], env=known, encoding="utf-8", dimensions=size, timeout=60)
        self.screen = pyte.HistoryScreen(size[1], size[0], history=1000)
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

    def type(self, keys: str, wanted: str = "") -> None:
        """Type, and wait for what is wanted then."""
        self.child.send(keys)
        self.wait(wanted)

    def leave(self, keys: str = CTRL_D) -> int:
        """Type what ends the program; its exit status."""
        self.type(keys)
        return self.ended()

    def conversations(self) -> list[dict]:
        """What this user's programs have kept, the oldest first."""
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.home.glob("pocketlm/chats/[!.]*"))]

    def ended(self) -> int:
        end = time.monotonic() + 60
        while self.child.isalive() and time.monotonic() < end:
            self.read()
        self.read()
        assert not self.child.isalive(), f"not ended:\n{self.text()}"
        self.child.close()
        return self.child.exitstatus
