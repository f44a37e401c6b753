"""An event that answers are cancelled with, which is heard at once. Knows nothing of answers."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Cancel(threading.Event):
    """Whoever is at work looks at an event now and then; `hear` names what is to be called when this one is set."""

    def __init__(self) -> None:
        super().__init__()
        self._hearers: set[Callable[[], object]] = set()

    def hear(self, hearer: Callable[[], object]) -> None:
        """To be called by `set`, in its thread; who comes after that looks himself."""
        self._hearers.add(hearer)

    def set(self) -> None:
        super().set()
        for hearer in list(self._hearers):
            hearer()
