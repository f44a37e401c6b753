"""The event that cancels an answer, with callbacks. Knows nothing of answers."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Cancel(threading.Event):
    """An event that also calls back. A worker that computes polls it; one that sleeps is woken by its callback."""

    def __init__(self) -> None:
        super().__init__()
        self._hearers: set[Callable[[], object]] = set()

    def hear(self, hearer: Callable[[], object]) -> None:
        """Have `hearer` called by `set`, in the thread that sets it. An event that is set already calls nobody."""
        self._hearers.add(hearer)

    def set(self) -> None:
        super().set()
        for hearer in list(self._hearers):
            hearer()
