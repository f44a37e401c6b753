"""A batch on this machine: several sessions of one model at the same time, each with a thread.

In: lines. Out: what is to be written of each, as it is made. Knows no files.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pocketlm import __version__
from pocketlm.batch.lines import Answering, Line, Written
from pocketlm.cancel import Cancel
from pocketlm.serve.asking import sessions

if TYPE_CHECKING:
    from pocketlm.model import Model

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")
END: Any = object()
AHEAD = 64  # answers that wait for a slow disk before the threads wait, too


@dataclass(frozen=True)
class Settings:
    """How lines are answered: `slots` at the same time, with `defaults` for options that a line leaves out."""

    slots: int
    seed: int
    defaults: Mapping[str, Any] = field(default_factory=dict)


class Machine:
    """A model and its sessions. The NumPy backend gives slightly different numbers when a text is computed in other pieces, so
    there is one session with it, and every line starts with an empty cache.
    """

    def __init__(self, model: Model, settings: Settings):
        exact = model.backend != "numpy"
        self._answering = Answering(model, {**settings.defaults, "reuse_cache": exact}, settings.seed)
        self.sessions = sessions(model, settings.slots if exact else 1)
        self.made_of = (__version__, model.fingerprint, model.executor.arithmetic, model.n_ctx, model.template.name)

    def answers(self, lines: Iterable[Line]) -> Iterator[Written]:
        """The output for each line, in the order in which they are finished."""
        return spread(self.sessions, lines, lambda session, line, cancel: self._answering.answer(line, session, cancel))


def spread(sessions: Sequence[S], items: Iterable[T], work: Callable[[S, T, threading.Event], R | None]) -> Iterator[R]:
    """Call `work(session, item, cancel)` for every item, with one thread per session; results in the order they are finished.

    `work` returns None once it has seen `cancel`. The caller may stop iterating at any time: `cancel` is set, and the threads
    end within one forward pass. Raises what a thread raised.
    """
    waiting, lock, cancel = iter(items), threading.Lock(), Cancel()
    made: queue.Queue[tuple[R | None, BaseException | None]] = queue.Queue(AHEAD)

    def run(session: S) -> None:
        try:
            while not cancel.is_set():
                with lock:
                    item = next(waiting, END)
                if item is END or (result := work(session, item, cancel)) is None:
                    break
                made.put((result, None))
            made.put((None, None))
        except BaseException as error:
            made.put((None, error))

    threads = [threading.Thread(target=run, args=(session,), daemon=True) for session in sessions]
    for thread in threads:
        thread.start()
    running = len(threads)
    try:
        while running:
            result, error = made.get()
            if error is not None:
                raise error
            if result is None:
                running -= 1
            else:
                yield result
    finally:
        cancel.set()
        while any(thread.is_alive() for thread in threads):  # one may wait for room
            with suppress(queue.Empty):
                made.get(timeout=0.05)
