"""`generate` in a pipe and at a terminal: what it continues, and what it says when there is nothing to continue."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

GENERATE = [sys.executable, "-m", "pocketlm", "generate"]
OPTIONS = ["-n", "6", "--temp", "0", "--ignore-eos"]
USAGE = "pocketlm: generate: give the text to continue with -p TEXT or -f FILE, or through a pipe\n"


def generate(*words: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    given = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    return subprocess.run([*GENERATE, *words], capture_output=True, timeout=120, **given)


def test_the_text_of_a_pipe_is_continued(tiny: str, tmp_path: Path):
    """As the shell's `$(…)` gives it: without the line break that `echo` adds. `-f` takes a file, or `-`, as it is."""
    given = generate(tiny, "-p", "Once upon", *OPTIONS)
    assert given.returncode == 0, given.stderr
    assert len(given.stdout) > 1
    for piped in (b"Once upon\n", b"Once upon\r\n", b"Once upon"):
        for words in ((), ("-p", "-")):
            done = generate(tiny, *words, *OPTIONS, stdin=piped)
            assert (done.returncode, done.stdout) == (0, given.stdout)
    (tmp_path / "prompt.txt").write_bytes(b"Once upon\n")
    exact = generate(tiny, "-p", "Once upon\n", *OPTIONS).stdout
    assert generate(tiny, "-f", str(tmp_path / "prompt.txt"), *OPTIONS).stdout == exact
    assert generate(tiny, "-f", "-", *OPTIONS, stdin=b"Once upon\n").stdout == exact
    assert exact != given.stdout


@pytest.mark.parametrize("stdin", [None, b""], ids=["no input", "an empty pipe"])
def test_nothing_to_continue_is_one_line_of_usage(tiny: str, stdin: bytes | None):
    done = generate(tiny, stdin=stdin)
    assert (done.returncode, done.stdout, done.stderr.decode().replace("\r\n", "\n")) == (2, b"", USAGE)


def test_at_a_terminal_a_prompt_is_asked_for_at_once(tiny: str):
    pexpect = pytest.importorskip("pexpect", reason="a terminal to run it in")
    child = pexpect.spawn(GENERATE[0], [*GENERATE[1:], tiny], timeout=60, encoding="utf-8")
    child.expect(pexpect.EOF)
    child.close()
    assert (child.before.replace("\r\n", "\n"), child.exitstatus) == (USAGE, 2)
