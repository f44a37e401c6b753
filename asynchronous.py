"""Streams for coroutines: what a thread makes piece by piece, handed to an event loop.

In: something to iterate over in a thread of its own. Out: an asynchronous iterator of the same. Knows no models.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from pocketlm.cancel import Cancel

T = TypeVar("T")
AHEAD = 1000  # pieces that wait for a slow reader before the thread waits, too


class _Post:
    """Callbacks that threads hand to an event loop. The loop is woken once for all callbacks that arrive before it runs them:
    every wake-up costs the calling thread its turn with the interpreter, and eight threads would wake it eight times a token.
    """

    def __init__(self) -> None:
        self._told: deque[Callable[[], object]] = deque()
        self._woken = False

    def tell(self, loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
        """Have `function` called in the loop; from any thread. Raises RuntimeError if the loop is closed."""
        self._told.append(function)
        if not self._woken:
            self._woken = True
            try:
                loop.call_soon_threadsafe(self._deliver, loop)
            except RuntimeError:
                self._woken = False
                raise

    def _deliver(self, loop: asyncio.AbstractEventLoop) -> None:
        self._woken = False  # first: what comes from here on wakes again
        try:
            while self._told:
                self._told.popleft()()
        finally:
            if self._told:  # one raised: the others are still to be called
                loop.call_soon(self._deliver, loop)


_posts: WeakKeyDictionary[asyncio.AbstractEventLoop, _Post] = WeakKeyDictionary()


class Handover:
    """A queue from one thread to one event loop. The thread waits while `ahead` parts are unread; None: it never waits."""

    def __init__(self, ahead: int | None = AHEAD):
        self.cancel = Cancel()
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Event()
        self._post = _posts.setdefault(self._loop, _Post())
        self._parts: deque[Any] = deque()
        self._wanted = False  # whether the reader waits for a part, and wants to be woken for it
        self._looked = -math.inf  # when the reader was given parts last, by the loop's clock
        self._pace = math.inf  # seconds that each of them took to come
        self._room = threading.Semaphore(ahead) if ahead else None
        self._error: BaseException | None = None
        self._ended = False

    def start(self, make: Callable[[threading.Event], Iterable[Any]], ended: Callable[[], object] = lambda: None) -> None:
        """Iterate over `make(cancel)` in a daemon thread. `ended` is called in the loop once the thread is done, before the
        reader sees the end.
        """
        threading.Thread(target=self._work, args=(make, ended), daemon=True, name="pocketlm-stream").start()

    def _work(self, make: Callable[[threading.Event], Iterable[Any]], ended: Callable[[], object]) -> None:
        try:
            for part in make(self.cancel):
                if self._room is not None:
                    self._room.acquire()
                if self.cancel.is_set() and self._room is not None:
                    break  # nobody reads any more
                self._parts.append(part)
                if self._wanted:
                    self._wanted = False
                    self._call(self._arrived.set)
        except BaseException as error:
            self._error = error
        self._call(lambda: self._end(ended))

    def _end(self, ended: Callable[[], object]) -> None:
        ended()  # first: who has read the whole answer asks the next question at once, and finds the slot free
        self._ended = True
        self._arrived.set()

    def _call(self, function: Callable[[], object]) -> None:
        try:
            self._post.tell(self._loop, function)
        except RuntimeError:  # the loop is closed: nobody is there to be told
            self.cancel.set()

    def __aiter__(self) -> Handover:
        return self

    async def __anext__(self) -> Any:
        """The next part. Raises what the thread raised."""
        if not self._parts and not await self._some():
            raise StopAsyncIteration
        return self._next()

    def _next(self) -> Any:
        if self._room is not None:
            self._room.release()
        return self._parts.popleft()

    async def several(self, pause: float) -> list[Any]:
        """Wait for at least one part and return all that are there; [] at the end. Raises what the thread raised.

        Parts that arrive within `pause` seconds are returned together, at multiples of `pause`, so that readers with the same
        pause wake the loop once: each time it runs, the threads lose the interpreter. Slow streams are not held back.
        """
        if not self._ended and self._pace < 2 * pause and self._loop.time() < self._looked + pause:
            clock = self._loop.call_at((self._looked // pause + 1) * pause, self._arrived.set)
            try:
                await self._arrived.wait()  # or the end
            finally:
                clock.cancel()
            self._arrived.clear()
        parts = list[Any]()
        if self._parts or await self._some():
            while self._parts:
                parts.append(self._next())
        now = self._loop.time()
        self._looked, self._pace = now, (now - self._looked) / max(1, len(parts))
        return parts

    async def _some(self) -> bool:
        """Wait for a part or the end; whether there is a part."""
        while True:
            self._wanted = True  # first: what comes from here on wakes
            if self._parts or self._ended:
                self._wanted = False
                break
            await self._arrived.wait()
            self._arrived.clear()
        if not self._parts and self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # else its traceback holds it, and with it all that the thread had made, until cycles are collected
        return bool(self._parts)

    def close(self) -> None:
        """The thread stops at its next part."""
        self.cancel.set()
        if self._room is not None:
            self._room.release()


async def in_thread(make: Callable[[threading.Event], Iterable[T]], ahead: int | None = AHEAD) -> AsyncGenerator[T, None]:
    """Iterate over `make(cancel)` in a thread of its own. When the reader stops early, `cancel` is set."""
    handover = Handover(ahead)
    handover.start(make)
    try:
        async for part in handover:
            yield part
    finally:
        handover.close()
