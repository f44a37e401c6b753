"""Answers requests for a server: waits for a slot, and hands the model's pieces to the event loop.

In: an `Ask`. Out: lists of `(number of the answer, Piece)`. A reader that is slow, or leaves, holds nobody else up. Knows no
HTTP and no JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pocketlm.asynchronous import Handover
from pocketlm.errors import PocketlmError, UsageError
from pocketlm.serve.asking import Asking, Prompts, pieces, size
from pocketlm.serve.errors import ApiError
from pocketlm.serve.fields import Ask
from pocketlm.serve.slots import QueueFull, Slot, Slots

if TYPE_CHECKING:
    from pocketlm.model import Model
    from pocketlm.runtime.generator import Piece

T = TypeVar("T")
ENCODING = 4  # texts that are made into ids at the same time; of long ones, which take memory, one
LONG = 1 << 16  # characters
SELDOM = 0.25  # seconds between two looks at an answer of which nobody sees the parts
STOPPING = "the server is stopping"
GONE = "the client hung up"
Gone = Callable[[], Awaitable[bool]]


@dataclass
class Counters:
    """What happened since the start; times in seconds."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    refused: int = 0  # the queue was full
    left: int = 0  # clients that hung up before the end


class Answerer:
    """A model with its sessions as slots. `waiting`: how many requests may wait for one; `seconds`: how long a request may
    wait, and how long its answer may take.
    """

    def __init__(self, model: Model, sessions: Sequence[Any], waiting: int, seconds: float):
        self.model, self.seconds = model, seconds
        self.slots = Slots(sessions, waiting)
        self.counters = Counters()
        self.n_ctx = sessions[0].n_ctx
        self.stopping = False
        self.running: set[Answer] = set()
        self._encoding = {False: asyncio.Semaphore(ENCODING), True: asyncio.Semaphore(1)}  # by whether it is long
        self.asking = Asking(model, self.n_ctx)
        self._preparing: asyncio.Future[None] | None = None  # kept: a loop does not hold its tasks

    # ---- prompts

    async def encode(self, ask: Ask, gone: Gone | None = None) -> Prompts:
        """`Asking.encode`, in a thread."""
        return await self.aside(lambda: self.asking.encode(ask), size(ask), gone)

    async def aside(self, work: Callable[[], T], n: int, gone: Gone | None = None) -> T:
        """Run `work` on a text of `n` characters in a thread, at most ENCODING at once, one if it is long: that must block
        neither the event loop nor short ones. Raises ApiError where the client is `gone` before its turn has come.
        """
        async with self._encoding[n > LONG]:
            if gone is not None and await gone():
                raise ApiError(400, GONE)
            made = Handover()
            made.start(lambda cancel: [work()])
            return await anext(made)

    # ---- answers

    async def begin(self, ask: Ask, prompts: Prompts) -> Answer:
        """Wait for a slot, and begin to answer. Raises ApiError: 429 if too many wait, 503 if no slot becomes free in time."""
        if self.stopping:
            raise ApiError(503, STOPPING, retry_after=5)
        try:
            slot = await self.slots.take(prompts.ids[0], self.seconds)
        except QueueFull as full:
            self.counters.refused += 1
            raise ApiError(429, str(full), retry_after=full.retry_after) from None
        except TimeoutError:
            late = f"no slot became free in {self.seconds:g} s"
            raise ApiError(503, STOPPING if self.stopping else late, retry_after=10) from None
        self.counters.requests += 1
        return Answer(self, ask, prompts, slot)  # from here on the slot is given back by its thread: nothing may come between

    def prepare(self, system: str, forms: bool) -> None:
        """Do in the background what the first answers would wait for: compute the beginning that all conversations share, which
        slots copy from each other, and with `forms` the tables of the vocabulary that constrained answers need.
        """
        first = [{"role": "system", "content": system}] * bool(system)
        ask = Ask(True, messages=[*first, {"role": "user", "content": "."}], options={"max_tokens": 0})
        self._preparing = asyncio.ensure_future(self._prepare(ask, forms))

    async def _prepare(self, ask: Ask, forms: bool) -> None:
        with suppress(ApiError, PocketlmError, QueueFull, TimeoutError):  # who asks is told
            prompts = await self.encode(ask)
            answer = Answer(self, ask, prompts, await self.slots.take(prompts.ids[0], self.seconds))
            while await answer.several(SELDOM):
                pass
            if forms:
                await self.aside(lambda: self.model.guide({"json_object": True}), 0)

    def count(self, piece: Piece) -> None:
        """Add up the figures in the last piece of an answer."""
        counters = self.counters
        counters.prompt_tokens += piece.prompt_tokens - piece.cached_tokens
        counters.cached_tokens += piece.cached_tokens
        counters.generated_tokens += piece.generated_tokens
        counters.prompt_seconds += piece.prompt_seconds
        counters.generation_seconds += piece.generation_seconds

    def stop(self) -> None:
        """Refuse new requests, and end the answers within one forward pass."""
        self.stopping = True
        for answer in list(self.running):
            answer.cancel()
        self.slots.stop()


class Answer:
    """The answers to one request, as they are generated: `(number, Piece)`, several at a time.

    The slot is given back as soon as the thread that computes is done; the reader has to call `close`, but does not hold the
    slot until then. After `answerer.seconds` the answer ends where it is. Raises ApiError: 503 if the server stops or has no
    more threads, 500 if the model fails.
    """

    def __init__(self, answerer: Answerer, ask: Ask, prompts: Prompts, slot: Slot):
        self._answerer, self._slot = answerer, slot
        self._handover = Handover(ahead=None)  # an answer is no longer than the context: a slow reader holds no slot
        self._complete = self._stopped = False
        self._clock = asyncio.get_running_loop().call_later(answerer.seconds, self._handover.cancel.set)
        answerer.running.add(self)
        try:
            others = [other.session for other in answerer.slots.all]
            self._handover.start(lambda cancel: pieces(ask, prompts, slot.session, cancel, others), self._ended)
        except RuntimeError as error:  # no more threads can be had
            self._ended()
            raise ApiError(503, f"the server is overloaded ({error})", retry_after=10) from None

    def _ended(self) -> None:
        self._clock.cancel()
        self._answerer.running.discard(self)
        self._answerer.slots.give_back(self._slot)

    def cancel(self) -> None:
        """End it within one forward pass."""
        self._handover.cancel.set()

    def close(self) -> None:
        """The reader is done, or has left. To be called exactly once."""
        self._handover.close()
        self._answerer.counters.left += not self._complete

    async def several(self, pause: float) -> list[tuple[int, Piece]]:
        """The pieces since the last call, as `Handover.several`; [] at the end."""
        try:
            found = await self._handover.several(pause)
        except PocketlmError as error:  # a UsageError: what the client asked for leads no further
            self._complete = True
            raise ApiError(400 if isinstance(error, UsageError) else 500, str(error)) from None
        for at, (_, piece) in enumerate(found):
            if piece.finish_reason:
                self._answerer.count(piece)
                if piece.finish_reason == "cancelled" and self._answerer.stopping:
                    self._stopped, found = True, found[:at]  # what had come is told first
                    break
        self._complete |= self._stopped or not found
        if self._stopped and not found:
            raise ApiError(503, STOPPING, retry_after=5)
        return found


def metrics(answerer: Answerer) -> str:
    """What the server has done, as Prometheus reads it (text format 0.0.4)."""
    c, slots = answerer.counters, answerer.slots
    rows = [
        ("requests_total", "counter", "Requests that were given a slot.", c.requests),
        ("requests_refused_total", "counter", "Requests that were refused because too many waited.", c.refused),
        ("requests_abandoned_total", "counter", "Requests whose client hung up before the end.", c.left),
        ("prompt_tokens_total", "counter", "Tokens of prompts that were computed.", c.prompt_tokens),
        ("cached_tokens_total", "counter", "Tokens of prompts that a slot still had.", c.cached_tokens),
        ("tokens_predicted_total", "counter", "Tokens of answers.", c.generated_tokens),
        ("prompt_seconds_total", "counter", "Seconds until first tokens.", c.prompt_seconds),
        ("tokens_predicted_seconds_total", "counter", "Seconds from first tokens to last ones.", c.generation_seconds),
        ("slots", "gauge", "Requests that can be answered at the same time.", len(slots.all)),
        ("requests_processing", "gauge", "Requests that are being answered.", slots.busy),
        ("requests_deferred", "gauge", "Requests that wait for a slot.", slots.waiting),
    ]
    text = "# HELP pocketlm_{0} {2}\n# TYPE pocketlm_{0} {1}\npocketlm_{0} {3}\n"
    return "".join(text.format(*row) for row in rows)
