"""Slots: the sessions of a model that answer at the same time, and the queue of those who wait for one.

In: the ids that a request begins with. Out: a slot, for the holder alone until it is given back. First come, first served;
the length of the queue is limited. Everything here happens in one event loop. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocketlm.conversation import Conversation


class QueueFull(Exception):
    """Too many wait already. `retry_after`: seconds after which it may be worth trying again."""

    def __init__(self, retry_after: int):
        self.retry_after = retry_after
        super().__init__(f"too many requests are waiting; try again in {retry_after} s")


@dataclass
class Slot:
    """One session. `used`: when it was given back last; `taken`: when it was taken, 0 while it is free."""

    session: Conversation
    used: float = 0.0
    taken: float = field(default=0.0, repr=False)


class Slots:
    """The sessions, and the queue for them; `limit`: how many may wait."""

    def __init__(self, sessions: Sequence[Conversation], limit: int):
        self.all = [Slot(session) for session in sessions]
        self._free = list(self.all)
        self._waiting: deque[asyncio.Future[Slot]] = deque()
        self._limit = limit
        self._seconds = 1.0  # that a holder keeps a slot, averaged over the last few

    @property
    def busy(self) -> int:
        """How many are held."""
        return len(self.all) - len(self._free)

    @property
    def waiting(self) -> int:
        """How many wait for one."""
        return sum(not future.done() for future in self._waiting)

    async def take(self, ids: list[int], seconds: float) -> Slot:
        """A slot, preferably one whose cache holds the beginning of `ids`. Raises QueueFull at once if too many wait already,
        TimeoutError if none becomes free within `seconds`.
        """
        if self._free:  # then nobody waits
            slot = max(self._free, key=lambda slot: (_remembered(slot, ids), -slot.used))
            self._free.remove(slot)
        else:
            if self.waiting >= self._limit:
                raise QueueFull(max(1, math.ceil(self._seconds * (self.waiting + 1) / len(self.all))))
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            clock = asyncio.get_running_loop().call_later(seconds, _give_up, future)
            try:
                slot = await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled() and future.exception() is None:
                    self.give_back(future.result())  # it was given one at the very moment when he left
                raise
            finally:
                clock.cancel()
        slot.taken = time.monotonic()
        return slot

    def stop(self) -> None:
        """Refuse everybody who waits."""
        for future in self._waiting:
            _give_up(future)

    def give_back(self, slot: Slot) -> None:
        """Give the slot to the next in the queue, or make it free."""
        slot.used = time.monotonic()
        if slot.taken:
            self._seconds += 0.2 * (slot.used - slot.taken - self._seconds)
            slot.taken = 0.0
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(slot)
                return
        self._free.append(slot)


def _give_up(future: asyncio.Future[Slot]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())


def _remembered(slot: Slot, ids: list[int]) -> int:
    """How many of the first ids the slot has in its cache; 0 if using it would throw away more than that."""
    same = slot.session.remembered(ids)
    return same if 2 * same >= len(slot.session.state.ids) else 0
