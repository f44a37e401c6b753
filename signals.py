"""Signal handlers for the length of a `with` statement. Knows nothing of what is done meanwhile."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def handled(numbers: Iterable[int], handler: Any) -> Iterator[None]:
    """In the block these signals go to `handler`. Outside the main thread, which alone may set handlers, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
