"""How a chat is ended from outside: SIGTERM, SIGHUP (a window was closed), and on Windows the console's close event.

In: how to save the conversation, and how to leave a line editor. Out: the exception `Terminated` in the main thread, at a
moment when nothing is half done. Windows ends the process right after a close event, so there the handler of the event saves
the conversation. Knows no conversation and no terminal.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from pocketlm.signals import handled

SIGNALS = ("SIGTERM", "SIGHUP")
CLOSE_EVENTS = (2, 5, 6)  # of a Windows console: its window is closed, the user logs off, the system shuts down


class Terminated(SystemExit):
    """The program was told to end. A SystemExit, because a line editor's event loop lets only that and Ctrl-C through."""

    def __init__(self, number: int):
        self.status = 128 + number  # as shells count
        super().__init__(self.status)


class Endings:
    """Handles signals and close events during a `with` block. `keep` saves; it is called in any thread. `leave` raises the
    error it is given in a waiting line editor; it returns whether there is one."""

    def __init__(self, keep: Callable[[], object], leave: Callable[[BaseException], bool]):
        self._keep, self._leave = keep, leave
        self._held = 0
        self.ended: Terminated | None = None  # how, once that is so
        self._waiting: Terminated | None = None
        self._handled = ExitStack()
        self._routine: Any = None  # what Windows calls has to stay alive

    def __enter__(self) -> Endings:
        if sys.platform == "win32":
            self._watch_console(True)
        numbers = (getattr(signal, name) for name in SIGNALS if hasattr(signal, name))
        ours = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # nohup has had it ignored
        self._handled.enter_context(handled(ours, self._received))
        return self

    def __exit__(self, *_: object) -> None:
        self._handled.close()
        if sys.platform == "win32":
            self._watch_console(False)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Postpone: what would end the program in the block does so after it."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if not self._held and self._waiting is not None:
            raise self._waiting

    def check(self) -> None:
        """Raise `ended` if the program was told to end: a line editor may still return a line after that."""
        if self.ended is not None:
            raise self.ended

    def _received(self, number: int, frame: object) -> None:
        if self.ended is not None:  # a closed window sends more than one
            return
        self.ended = Terminated(number)
        if self._held:
            self._waiting = self.ended
        elif not self._leave(self.ended):
            raise self.ended

    def console_event(self, event: int) -> bool:
        """The handler of a Windows console event, called in a thread of the system's; False: not handled."""
        if event not in CLOSE_EVENTS:
            return False
        self._keep()
        return True

    def _watch_console(self, on: bool) -> None:
        if sys.platform == "win32":
            import ctypes
            from ctypes import wintypes

            if on:
                self._routine = ctypes.WINFUNCTYPE(wintypes.BOOL, wintypes.DWORD)(self.console_event)
            set_handler = ctypes.windll.kernel32.SetConsoleCtrlHandler
            set_handler.argtypes = [ctypes.c_void_p, wintypes.BOOL]
            set_handler(ctypes.cast(self._routine, ctypes.c_void_p), on)
