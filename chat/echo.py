"""Turns a terminal's echo off while an answer comes: what is typed meanwhile waits for the next prompt, unseen and untouched.

In: the standard input of a chat. Knows neither answers nor prompts. On Windows and with pipes nothing happens.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from pocketlm.signals import handled

if sys.platform != "win32":
    import termios

_LOCAL = 3  # the place of a terminal's local modes


@contextmanager
def without_echo(stdin: TextIO) -> Iterator[None]:
    """The terminal shows nothing of what is typed in the block. Ctrl-Z gives it back to the shell as it was.

    For the main thread only, which alone may handle signals.
    """
    if sys.platform == "win32" or not _echo(stdin, False):
        yield
        return

    def suspended(signum: int, frame: Any) -> None:
        _echo(stdin, True)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)  # it stops here
        signal.signal(signal.SIGTSTP, suspended)
        _echo(stdin, False)

    stops = [signal.SIGTSTP] if signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL else []
    try:
        with handled(stops, suspended):
            yield
    finally:
        _echo(stdin, True)


def _echo(stdin: TextIO, wanted: bool) -> bool:
    """Switch the echo, and the terminal's own editing of lines, which would swallow Ctrl-D and what is longer than 4095 bytes.
    Without them, it marks what is pasted. Whether that changed anything. Only in the foreground: the system stops other
    programs that try.
    """
    if sys.platform == "win32":
        return False
    with suppress(OSError, ValueError, termios.error):
        terminal = stdin.fileno()
        modes = termios.tcgetattr(terminal)
        if bool(modes[_LOCAL] & termios.ECHO) != wanted and os.tcgetpgrp(terminal) == os.getpgrp():
            modes[_LOCAL] ^= termios.ECHO | termios.ICANON
            termios.tcsetattr(terminal, termios.TCSANOW, modes)
            with suppress(OSError):  # standard input is for reading, and may be for nothing else
                os.write(terminal, b"\x1b[?2004l" if wanted else b"\x1b[?2004h")
            return True
    return False
