"""A batch on this machine: several sessions of one model at the same time, each with a thread.

In: lines. Out: what is to be written of each, as it is made. Knows no files.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pocketlm.batch.lines import Answering, Line, Written
from pocketlm.errors import FileError

if TYPE_CHECKING:
    from pocketlm.model import Model

AHEAD = 64  # answers that wait for a slow disk before the threads wait, too


@dataclass(frozen=True)
class Settings:
    """How lines are answered: `slots` at the same time, with `defaults` for what a line does not say."""

    slots: int
    seed: int
    defaults: Mapping[str, Any] = field(default_factory=dict)


class Machine:
    """A model and its sessions: as many as asked for, or as there is memory for, but for one at least.

    The NumPy backend promises closeness, not bits: there every line has the cache for itself, from its beginning on.
    """

    def __init__(self, model: Model, settings: Settings):
        exact = model.backend != "numpy"
        self._answering = Answering(model, {**settings.defaults, "reuse_cache": exact}, settings.seed)
        self.sessions = [model.session()]
        try:
            while exact and len(self.sessions) < settings.slots:
                self.sessions.append(model.session())
        except FileError:
            pass
        self.made_of = (model.fingerprint, model.executor.arithmetic, model.n_ctx, model.template.name)

    def answers(self, lines: Iterable[Line]) -> Iterator[Written]:
        """What is to be written of each line, in the order in which it is made. The caller may stop at any time: what is being
        computed then ends within a pass. Raises what a thread raised.
        """
        waiting, lock, cancel = iter(lines), threading.Lock(), threading.Event()
        made: queue.Queue[Written | BaseException | None] = queue.Queue(AHEAD)

        def work(session: Any) -> None:
            try:
                while not cancel.is_set():
                    with lock:
                        line = next(waiting, None)
                    if line is None or (written := self._answering.answer(line, session, cancel)) is None:
                        break
                    made.put(written)
                made.put(None)
            except BaseException as error:
                made.put(error)

        threads = [threading.Thread(target=work, args=(session,), daemon=True) for session in self.sessions]
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running:
                written = made.get()
                if isinstance(written, BaseException):
                    raise written
                if written is None:
                    running -= 1
                else:
                    yield written
        finally:
            cancel.set()
            while any(thread.is_alive() for thread in threads):  # one may wait for room
                try:
                    made.get(timeout=0.05)
                except queue.Empty:
                    continue
