"""A program that was opened with a double click has a window, and the window its title."""

import os
import subprocess
import sys

import pytest

from pocketlm.build.terminal import MARK

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has consoles, no pseudo-terminals: test_pack_windows.py")
PROGRAM = "import sys; from pocketlm.build import terminal; "


def run(code, **environment):
    """(what the program wrote, its exit status) with a terminal as its output."""
    ours, theirs = os.openpty()
    kept = {key: value for key, value in os.environ.items() if key not in (MARK, "DISPLAY", "WAYLAND_DISPLAY")}
    try:
        done = subprocess.run([sys.executable, "-c", PROGRAM + code], stdout=theirs, env={**kept, **environment})
        os.write(theirs, b"end")
        shown = b""
        while not shown.endswith(b"end"):
            shown += os.read(ours, 65536)
    finally:
        os.close(ours)
        os.close(theirs)
    return shown.removesuffix(b"end").decode(), done.returncode


def test_a_window_of_its_own_has_the_conversations_title():
    assert run(r"terminal.name_window('Ada Ёлка\x1b]0;x\x07')", **{MARK: "1"}) == ("\x1b]2;Ada Ёлка]0;x\x07", 0)
    assert run("terminal.name_window('')", **{MARK: "1"}) == ("", 0)


def test_a_shells_window_keeps_its_title():
    assert run("terminal.name_window('Ada')") == ("", 0)


def test_nothing_but_a_window_is_told_a_title():
    command = [sys.executable, "-c", PROGRAM + "terminal.name_window('Ada')"]
    assert subprocess.run(command, env={**os.environ, MARK: "1"}, capture_output=True, check=True).stdout == b""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux' file managers start programs without a terminal")
def test_a_double_click_opens_a_terminal_once(tmp_path):
    told, emulator = tmp_path / "told", tmp_path / "xterm"
    os.mkfifo(told)  # whoever reads it waits for the terminal, however long that takes
    emulator.write_text(f'#!/bin/sh\necho "$@" "${MARK}" "$LD_LIBRARY_PATH" "$_PYI_X" >{told}\n')
    emulator.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if key not in (MARK, "WAYLAND_DISPLAY")}
    given = {"DISPLAY": ":0", "PATH": str(tmp_path), "LD_LIBRARY_PATH_ORIG": "/theirs", "_PYI_X": "x"}
    nothing = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def double_click(**more):
        code = "terminal.forget_loader(); sys.exit(terminal.open_one('/a/friend', ['x y']) + 10)"
        return subprocess.run([sys.executable, "-c", PROGRAM + code], env={**kept, **given, **more}, **nothing).returncode

    assert double_click() == 11
    assert told.read_text() == "-e /a/friend x y 1 /theirs \n"
    assert double_click(**{MARK: "1"}) == 10  # in the terminal that it has opened
    assert double_click(PATH="/nowhere") == 10
