"""From a prompt to an answer: a Python generator of small records, one per token.

In: a session, the prompt's ids, a sampler, a stream decoder. Out: `Piece` records. Knows when to stop: an end token, a stop
string, a limit, a cancellation, a full context. Does not know what a turn is: where the context is full it asks for a
shorter prompt (`make_room`) and goes on with it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Generator, Sequence, Set
from dataclasses import dataclass
from math import nan
from numbers import Integral
from threading import Event
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from pocketlm.cancel import Cancel
from pocketlm.errors import UsageError
from pocketlm.runtime.drafts import Drafts
from pocketlm.runtime.sampling import Sampler
from pocketlm.runtime.session import Session, forgotten


@dataclass(frozen=True)
class Piece:
    """What one token adds. The texts of all pieces together are the answer; each may be empty.

    The last record has `finish_reason`, id -1, the text held back until then, the counts and the times; in the others
    these are None and 0. An end token gets no record of its own.
    """

    text: str
    id: int
    logprob: float  # natural logarithm, under the plain softmax of the model's logits (see `sampling.Sampler`)
    finish_reason: str | None = None  # "stop": an end token or stop string; "length": max_tokens or a full context; "cancelled"
    prompt_tokens: int = 0
    cached_tokens: int = 0  # how many of the prompt's tokens were in the cache already
    generated_tokens: int = 0  # the records before this one
    prompt_seconds: float = 0.0  # until the first logits
    generation_seconds: float = 0.0  # from there to the end, what the caller does between records included
    note: str = ""  # what a user should know about this answer, such as that the context was full
    drafted_tokens: int = 0  # tokens that were looked up in the text so far and tried (see `drafts`)
    accepted_tokens: int = 0  # how many of them were the ones that were drawn
    dropped_turns: int = 0  # of a conversation (`Model.chat`): how many of its oldest turns the model did not see
    top_logprobs: tuple[tuple[int, float], ...] = ()  # ids and logprobs of the likeliest tokens here, where that was asked for
    stop_string: str = ""  # the one that ended the answer

    @property
    def tokens_per_second(self) -> float:
        """Speed of the tokens after the first, which is drawn from the prompt's logits and counts there; 0 without any."""
        n = self.generated_tokens - 1
        return n / self.generation_seconds if n > 0 and self.generation_seconds > 0 else 0.0


def _one_more(text: str, id: int, logprob: float) -> Piece:
    """Piece(text, id, logprob), in a quarter of the time: the other fields are what the class says."""
    piece = object.__new__(Piece)
    piece.__dict__.update(text=text, id=id, logprob=logprob)
    return piece


class Decoder(Protocol):
    """A tokenizer's stream decoder: text as soon as it is certain."""

    def push(self, id: int) -> str: ...
    def flush(self) -> str: ...


class NoText:
    """The decoder of a model that has no tokenizer: ids stand for no text."""

    def push(self, id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def generate(
    session: Session,
    ids: Sequence[int],
    sampler: Sampler,
    decoder: Decoder,
    *,
    max_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    end_ids: Set[int] = frozenset(),
    ignore_eos: bool = False,
    cancel: Event | None = None,
    make_room: Callable[[], Sequence[int] | None] | None = None,
    reuse_cache: bool = True,
    shift: bool = False,
    keep: int | None = None,
    draft: bool = True,
    is_over: Callable[[], bool] | None = None,
    apart: bool = False,
) -> Generator[Piece, None, None]:
    """The answer to the prompt `ids`, token by token, the last record saying how it ended.

    `max_tokens` None: until the context is full. Text that may be the beginning of a `stop` string is held back until that
    is decided; the string completed first ends the answer and is not part of it. `ignore_eos` goes on past `end_ids`.
    `cancel` is looked at after every token and between two passes of the prompt; passes in a row (see `Engine.draw`), 50 ms of
    them at most, end early where it is a `Cancel`. `shift`: see `Session.advance`.

    When the context is full, `make_room()` is called until the prompt it returns is short enough to go on with (whole
    turns dropped, say); when it returns None, or nothing shorter, the answer ends with "length" and a note. With `keep`, the
    tokens at the beginning that have to stay, the older half of the others goes instead, and the answer goes on.

    `is_over()` is asked before every pass, and at `max_tokens`, whether the answer is whole as it is, with what was drawn last.

    `apart`: the sampler may ask other sessions of the same model (see `Session.append`).

    With `draft`, what the text so far foretells is verified in one pass where that pays (see `drafts`); the answer is the same.

    Raises UsageError for an empty prompt, an id outside the vocabulary, an empty stop string, a negative max_tokens or a
    switch that is neither True nor False, PocketlmError for a prompt longer than the context: with the first record, before
    anything is computed. PocketlmError where another answer of the same session has begun, or the session has ended, since
    the last record.
    """
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if not all(isinstance(s, str) and s for s in stops):
        raise UsageError(f"stop is {stop!r}; every stop string needs at least one character")
    if max_tokens is not None and (not isinstance(max_tokens, Integral) or max_tokens < 0):
        raise UsageError(f"max_tokens is {max_tokens!r}; it must be a whole number from 0 up")
    for name, value in {"ignore_eos": ignore_eos, "reuse_cache": reuse_cache, "draft": draft}.items():
        if not isinstance(value, (bool, np.bool_)):  # "off" would be on
            raise UsageError(f"{name} is {value!r:.60}; it must be True or False")
    cancelled = cancel.is_set if cancel is not None else lambda: False
    if isinstance(cancel, Cancel):
        cancel.hear(session.engine.end_row)
    matcher = StopStrings(stops) if stops else None
    ends = frozenset() if ignore_eos else end_ids
    n_ctx, push = session.n_ctx, decoder.push
    prompt = list(map(int, ids))
    n_prompt, n_generated, stopped = len(prompt), 0, False

    claim = session.claim(cancelled)
    session.check_ids(prompt)
    tokens = array("i", prompt)  # and, growing, the answer; as samplers in compiled code read it

    def interrupted() -> bool:
        session.check(claim)
        return cancelled()

    prompted = started = perf_counter()

    def draw_first(logits: np.ndarray) -> list[tuple[int, float]]:
        nonlocal prompted
        if not n_generated:
            prompted = perf_counter()
        return [sampler(logits, tokens)] if max_tokens != 0 else []

    drafts = Drafts(session.odds) if draft and session.executor.same_bits else None
    inside: Any = sampler if hasattr(sampler, "prepare") else None
    tried: list[int] = []

    def draw(rows: np.ndarray) -> list[tuple[int, float]]:
        """Tokens as long as they are the draft's, and one more: exactly those that would have been drawn one by one."""
        drawn, n = list[tuple[int, float]](), len(tokens)
        for logits in rows:
            drawn.append(sampler(logits, tokens))
            id = drawn[-1][0]
            if len(drawn) > len(tried) or id != tried[len(drawn) - 1] or id in ends or n_generated + len(drawn) == max_tokens:
                break
            tokens.append(id)  # the next row's penalties
        del tokens[n:]
        return drawn

    how = {"cancelled": interrupted, "use": draw_first, "apart": apart}
    drawn, n_cached, note = None, 0, ""
    if claim is not None:
        with session.held(claim):
            drawn, n_cached = session.advance(tokens, reuse_cache=reuse_cache, shift=shift, **how)
            note = session.note
    prompted = prompted if drawn is not None else perf_counter()
    reason, at = "cancelled", 0  # at: which of the drawn tokens comes next
    while drawn is not None and not cancelled():
        if not drawn:  # there is nothing to draw any more
            reason = "length"
            break
        id, logprob = drawn[at]
        at += 1
        if id in ends:
            reason = "stop"
            break
        tokens.append(id)
        n_generated += 1
        shown = push(id)
        if matcher is not None:
            shown, stopped = matcher.push(shown)
        yield _one_more(shown, id, logprob)
        if stopped:
            reason = "stop"
            break
        if n_generated == max_tokens or cancelled():
            if is_over is not None and not cancelled() and is_over():  # nothing was cut off
                reason = "stop"
                break
            drawn, at = [], 0
            continue
        if at < len(drawn):
            continue
        if is_over is not None and is_over():
            reason = "stop"
            break
        at = 0
        with session.lock.here:  # as `held`, for every token
            session.check(claim)
            if (room := n_ctx - len(session.ids)) > 0:
                tried = drafts.after(tokens, room - 1, session.company) if drafts else []
                if tried or inside is None:
                    drawn = session.append(id, tried, draw, apart)
                else:
                    most = room if max_tokens is None else min(room, max_tokens - n_generated)
                    most = drafts.may_pay_after(session.company, most) if drafts else most
                    drawn = session.draw(id, inside, tokens, most, ends)
                if drafts and tried:
                    drafts.passed(tried, len(drawn))
                continue
        prompt = _shorter_prompt(make_room, len(tokens) - n_generated, n_ctx - n_generated)
        if prompt is not None:
            tokens = array("i", prompt) + tokens[-n_generated:]
            note = f"the context of {n_ctx} tokens is full: the prompt was cut from {n_prompt} to {len(prompt)} tokens"
        elif keep is not None:
            del tokens[keep : keep + max(1, (n_ctx - keep) // 2)]
            n_slid = n_prompt + n_generated - len(tokens)
            note = f"the context of {n_ctx} tokens is full: {forgotten(n_slid)}"
        else:
            reason, note = "length", f"the context of {n_ctx} tokens is full; {session.how_to_grow}begin a new conversation"
            break
        with session.held(claim):
            drawn, _ = session.advance(tokens, shift=True, **how)
            note += f"; {session.note}" if session.note else ""

    rest = "" if stopped else decoder.flush()
    if matcher is not None and not stopped:
        rest, stopped = matcher.push(rest)
        rest += matcher.held
        reason = "stop" if stopped else reason
    seconds = prompted - started, perf_counter() - prompted
    tries = (drafts.drafted, drafts.accepted) if drafts else (0, 0)
    found = matcher.found if matcher is not None else ""
    yield Piece(rest, -1, nan, reason, n_prompt, n_cached, n_generated, *seconds, note, *tries, stop_string=found)


def _shorter_prompt(make_room: Callable[[], Sequence[int] | None] | None, length: int, room: int) -> list[int] | None:
    """The first prompt from `make_room` that fits into `room` positions; None when it cannot get that short."""
    while make_room is not None and (ids := make_room()) is not None and 0 < len(ids) < length:
        if len(ids) <= room:
            return list(map(int, ids))
        length = len(ids)
    return None


class StopStrings:
    """Finds the first completed of several strings in a text that comes in parts."""

    def __init__(self, stops: Sequence[str]):
        self.held = ""  # text not given out yet: the longest beginning of a stop string that the text so far ends with
        self.found = ""  # the stop string that was completed
        self._stops, self._firsts, self._longest = stops, {stop[0] for stop in stops}, max(map(len, stops), default=0)

    def push(self, text: str) -> tuple[str, bool]:
        """What of the text may be shown now, and whether a stop string is complete; then nothing after it counts."""
        window = self.held + text
        if places := [(at + len(stop), at) for stop in self._stops if (at := window.find(stop)) >= 0]:
            end, begin = min(places)  # of those that end first the longest
            self.held, self.found = "", window[begin:end]
            return window[:begin], True
        begin = max(0, len(window) - self._longest + 1)
        while begin < len(window) and not (window[begin] in self._firsts and self._may_begin(window[begin:])):
            begin += 1
        self.held = window[begin:]
        return window[:begin], False

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
