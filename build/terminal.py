"""A console for a program that was opened with a double click.

In: how the process was started. Out: whether its console closes with it; a terminal that was opened for it; a window title; an
environment without the boot loader's variables. Knows nothing about the conversation.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from pocketlm.terminal_text import without_controls

MARK = "POCKETLM_OWN_TERMINAL"  # set in the terminal that was opened here, so that there is only one
_TERMINALS = (  # how each is told which command to run
    ("xdg-terminal-exec",), ("x-terminal-emulator", "-e"), ("gnome-terminal", "--"), ("kgx", "--"), ("konsole", "-e"),
    ("xfce4-terminal", "-x"), ("kitty",), ("alacritty", "-e"), ("foot",), ("xterm", "-e"),
)  # fmt: skip


def is_own() -> bool:
    """Whether the console belongs to this program alone, and closes when it ends."""
    if sys.platform == "win32":
        import ctypes

        # the boot loader and this process; a shell would be a third
        return 0 < ctypes.windll.kernel32.GetConsoleProcessList((ctypes.c_uint32 * 4)(), 4) <= 2
    return MARK in os.environ


def wait_for_key() -> None:
    """Keep the console until Enter is pressed."""
    with suppress(EOFError, KeyboardInterrupt, OSError):
        input("Press Enter to close this window. ")


def name_window(title: str) -> None:
    """Set the title of a console that belongs to this program alone, which else shows a path."""
    title = without_controls(title)
    if not title or sys.stdout is None or not is_own():
        return
    if sys.platform == "win32":
        import ctypes

        ctypes.windll.kernel32.SetConsoleTitleW(title)
    elif sys.stdout.isatty():
        os.write(sys.stdout.fileno(), f"\x1b]2;{title}\x07".encode())  # past the filter of control characters


def open_one(program: str, arguments: Sequence[str]) -> bool:
    """If a Linux file manager has started the program without a terminal, start it again in one; whether that was done."""
    if sys.platform != "linux" or not _started_by_file_manager():
        return False
    import shutil
    import subprocess

    for terminal, *how in _TERMINALS:
        path = shutil.which(terminal)
        if path is None:
            continue
        try:
            subprocess.Popen([path, *how, program, *arguments], env={**os.environ, MARK: "1"}, start_new_session=True)
            return True
        except OSError:
            continue
    return False


def _started_by_file_manager() -> bool:
    """Whether there is a desktop, no terminal at any of the standard streams, and no input."""
    desktop = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not desktop or MARK in os.environ:
        return False
    try:
        if any(os.isatty(number) for number in (0, 1, 2)):
            return False
        return os.path.samestat(os.fstat(0), os.stat(os.devnull))
    except OSError:
        return False


def forget_loader() -> None:
    """Remove the boot loader's variables from the environment: a terminal or browser that is started from here must not load
    this program's libraries.
    """
    original = os.environ.get("LD_LIBRARY_PATH_ORIG")
    for key in [key for key in os.environ if key.startswith(("_PYI", "_MEIPASS", "LD_LIBRARY_PATH"))]:
        del os.environ[key]
    if original:
        os.environ["LD_LIBRARY_PATH"] = original
