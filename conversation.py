"""A text or a conversation that a model goes on with: a state of its own beside others', on weights that all share.

In: prompts, ids, messages. Out: streams of pieces, logits. Knows tokenizer, template and sampling options, no kernels.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from pocketlm.constrain import OPTIONS
from pocketlm.errors import PocketlmError, UsageError, did_you_mean, whole_number
from pocketlm.runtime.ids import given_ids, in_common
from pocketlm.runtime.session import Session, forgotten
from pocketlm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pocketlm.chat.templates import Template
    from pocketlm.runtime.generator import Piece
    from pocketlm.runtime.sampling import Sampler

FEWEST_BORROWED = 8  # tokens: fewer are computed as fast as the locks are had
ANSWER_ROOM = 256  # tokens kept free for an answer when old turns have to go


class Conversation:
    """What `Model.session` returns. It can be used in a `with` statement; `close` gives its cache back, as does forgetting it.

    Any thread may use it, at the same time as others use other ones: what they want computed is merged into passes, and each
    text is the same as alone. One conversation has one stream at a time: a stream that is still open when another begins, or
    when `logits`, `load` or `close` is called, raises PocketlmError at its next piece.
    """

    def __init__(self, model: Any, state: Session):  # a pocketlm.model.Model, which imports this module
        self._model, self.state = model, state
        self._turns: Turns | None = None  # of the last question

    def __repr__(self) -> str:
        return f"<Conversation with {self._model.name!r}: {self.context_used} of {self.n_ctx} tokens>"

    @property
    def n_ctx(self) -> int:
        """Positions that the cache has."""
        return self.state.n_ctx

    @property
    def context_used(self) -> int:
        """Positions of the cache that are filled."""
        return min(len(self.state.ids), self.state.cache.length)

    def fork(self) -> Conversation:
        """A conversation that goes on from here by itself, with a cache of its own that holds the same. FileError where there
        is no memory for it.
        """
        model = self._model
        with model.changing.here:
            model.check_room(self.n_ctx)
            other = model.adopt(Conversation(model, self.state.fork()))
        other._turns = self._turns
        return other

    def remembered(self, ids: list[int]) -> int:
        """How many of the first ids are in the cache."""
        return in_common(self.state.ids, ids)

    def borrow(self, others: Sequence[Conversation], ids: list[int]) -> None:
        """Copy the longest prefix of a prompt that one of `others`, of the same model and context, has cached, if it is longer
        than this one's. The answer is the same, bit for bit.
        """
        best = max((other for other in others if other is not self), key=lambda other: other.remembered(ids), default=self)
        if best.remembered(ids) >= self.remembered(ids) + FEWEST_BORROWED:
            self._turns = None
            self.state.borrow(best.state, ids)

    def save(self, path: str | Path, *, exactly: bool = False) -> None:
        """Write what the cache holds to a file, which `load` goes on from. Raises FileError; an older file stays as it is.

        `exactly`: only what has the bits that it would have if it were computed again, for a `load` that asks for the same.
        """
        from pocketlm.runtime.state_file import write_state

        with self.state.settled() as (ids, cache):
            write_state(path, ids[: self.state.n_exact] if exactly else ids, cache, self._computed_by(exactly))

    def _computed_by(self, exactly: bool) -> str:
        executor = self._model.executor
        return f"{self._model.fingerprint} {executor.arithmetic}" if exactly else self._model.fingerprint

    def load(self, path: str | Path, *, exactly: bool = False) -> None:
        """Go on from a saved file in place of what is in the cache. Raises FileError where the file is damaged, is another
        model's, or does not fit into the context.
        """
        from pocketlm.runtime.state_file import check_state, read_state

        by = "another model, " + ("backend or instruction set, or without `exactly`" if exactly else "or with `exactly`")
        header = check_state(path, self.state.cache, self._computed_by(exactly), by)
        self._turns = None
        self.state.fill(lambda cache: read_state(path, header, cache), exactly)

    def close(self) -> None:
        """Give the cache's memory back. A second call does nothing."""
        self.state.close("this session is closed; ask the model for another one")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError("a session is neither copied nor pickled: fork it, or save it to a file and load that elsewhere")

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits of every position, float32 (len(ids), n_vocab), computed from an empty cache."""
        return self.state.all_logits(ids)

    def generate(
        self, prompt: str | Sequence[int], *, max_tokens: int | None = None, stop: str | Sequence[str] = (),
        ignore_eos: bool = False, reuse_cache: bool = True, cancel: threading.Event | None = None, draft: bool = True,
        **sampling: Any,
    ) -> Iterator[Piece]:  # fmt: skip
        """Continue a text or a list of ids; yields a `Piece` a token and a last one with the finish reason.

        A model without a tokenizer takes ids only, and its pieces have ids and empty texts.
        `sampling` are the fields of `runtime.sampling.SamplingOptions`. A text gets the model's begin-of-text token
        where the model asks for one. `max_tokens` None: until an end token, a stop string or the end of the context.
        `draft`: what the text so far foretells is verified in one pass where that pays; the answer is the same without.
        Three more options: `top_logprobs` (how many of the likeliest each piece lists), `logprobs` (False: NaN in pieces, which
        saves time), and `process(logits, ids)`, which changes the logits, float32 (n_vocab,), in place before the choice, as
        `runtime.sampling.make_sampler` says; it may ask other sessions of the model.
        And four of which one may be given, for the form that the answer must have: `json_object`, `json_schema`, `choices`,
        `regex`, as `constrain.guides.take_form` describes them. An answer that `max_tokens` or the context cuts off is the
        beginning of such a text.
        """
        from pocketlm.runtime.generator import NoText

        model = self._model
        ids = prompt_ids(prompt, model.tokenizer) if isinstance(prompt, str) else given_ids(prompt)
        decoder = model._tokenizer.stream_decoder(continues=bool(ids)) if model._tokenizer else NoText()
        how = {"max_tokens": max_tokens, "reuse_cache": reuse_cache, "cancel": cancel, "draft": draft}
        return self._stream(ids, decoder, sampling, ignore_eos, stop=stop_strings(stop), **how)

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int | None = None, stop: str | Sequence[str] = (),
        ignore_eos: bool = False, reuse_cache: bool = True, cancel: threading.Event | None = None, draft: bool = True,
        **sampling: Any,
    ) -> Iterator[Piece]:  # fmt: skip
        """Answer the last of `messages`, each a {"role": "system" | "user" | "assistant", "content": text}.

        Where the last is the assistant's, that is the beginning of its answer, and the stream goes on with it.

        When the context is full, whole turns go, oldest first; the system prompt and the question just asked stay. The
        keys of the turns that stay are moved, which is the usual approximation, or computed again where positions are
        learned; the last piece's `note` says so. How many turns the model does not see is in the `dropped_turns` of the last
        piece, and of an empty first one where there are any. A base model (template "plain") has a text in place of turns,
        and loses the oldest part of it; unless `max_tokens` is None, also while it answers.
        Options of `sampling` that are not given come from `Model.chat_defaults`, else are as in `generate`.
        Raises PocketlmError when the system prompt and the question alone do not fit.
        """
        model, sampling = self._model, {**self._model.chat_defaults, **sampling}
        turns = self._turns = Turns(messages, model.template, model.tokenizer, self._turns)
        limit = prompt_room(self.n_ctx, max_tokens)
        keep, lost = None, 0
        if model.template.name == "plain":
            n_bos, ids = int(model.tokenizer.adds_bos), turns.encode()
            keep, lost = None if max_tokens is None else n_bos, max(0, len(ids) - limit)
            ids = ids[:n_bos] + ids[n_bos + lost :]
        else:
            ids = turns.fit(limit)
        stop = [*model.template.stop, *stop_strings(stop)]
        decoder = model.tokenizer.stream_decoder(continues=True)
        how = {"max_tokens": max_tokens, "reuse_cache": reuse_cache, "cancel": cancel, "draft": draft, "stop": stop}
        how |= {"make_room": turns.drop_oldest if keep is None else None, "shift": bool(lost or turns.dropped), "keep": keep}
        stream = self._stream(ids, decoder, sampling, ignore_eos, **how)
        return _announced(stream, turns, forgotten(lost) if lost else "")

    def agenerate(self, prompt: str | Sequence[int], **options: Any) -> AsyncGenerator[Piece, None]:
        """The pieces of `generate` for an `async for`, made in a thread. Who leaves the loop, or is cancelled, ends the answer
        within one pass; `cancel` is no option here.
        """
        return _in_thread(self.generate, prompt, options)

    def achat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> AsyncGenerator[Piece, None]:
        """The pieces of `chat`, in the same way."""
        return _in_thread(self.chat, messages, options)

    def _stream(self, ids: list[int], decoder: Any, sampling: dict[str, Any], ignore_eos: bool, **how: Any) -> Iterator[Piece]:
        """`how`: further keywords of `runtime.generator.generate`."""
        from pocketlm.runtime.generator import generate
        from pocketlm.runtime.sampling import make_sampler

        model = self._model
        _check_names(sampling, how)
        if (cancel := how["cancel"]) is not None and not callable(getattr(cancel, "is_set", None)):
            raise UsageError(f"cancel is {cancel!r:.60}; it must be a threading.Event")
        n_vocab, end_ids = model.hyper.n_vocab, model._end_ids
        if model._tokenizer is not None:
            # ids beyond the vocabulary are rows that fill a token table up; they mean nothing and are never drawn
            beyond = dict.fromkeys(range(model._tokenizer.n_vocab, n_vocab), -math.inf)
            bias = sampling.get("logit_bias") or {}
            if isinstance(bias, Mapping):  # make_sampler refuses the rest
                sampling["logit_bias"] = {**bias, **beyond} or None
        top_logprobs, logprobs = sampling.pop("top_logprobs", 0), sampling.pop("logprobs", True)
        if not isinstance(logprobs, bool):
            raise UsageError(f"logprobs is {logprobs!r:.60}; it must be True or False: top_logprobs says how many are listed")
        guide = model.guide(sampling)
        if guide is not None:
            if ignore_eos:
                raise UsageError("an answer that has a form ends with it: ignore_eos cannot be had")
            sampling["allowed"] = guide.allowed
        sampling["logprobs"] = logprobs or bool(top_logprobs)
        apart = sampling.get("process") is not None
        sampler = make_sampler(**sampling, n_vocab=n_vocab, selection=self.state.executor.new_selection(), exempt=end_ids)
        listed = Likeliest(sampler, top_logprobs, model._tokenizer.n_vocab if model._tokenizer else n_vocab)
        chosen = listed.sample if top_logprobs else sampler
        stream = generate(
            self.state, ids, guide.along(chosen) if guide else chosen, decoder, end_ids=end_ids, ignore_eos=ignore_eos,
            is_over=guide.is_over if guide else None, apart=apart, **how,
        )  # fmt: skip
        return listed.told(stream) if top_logprobs else stream


def _in_thread(make: Callable[..., Iterator[Piece]], what: Any, options: dict[str, Any]) -> AsyncGenerator[Piece, None]:
    from pocketlm.asynchronous import in_thread  # not above: asyncio takes a while to import

    if "cancel" in options:
        raise UsageError("cancel: there is no such option here; leave the loop, which ends the answer")
    return in_thread(lambda cancel: make(what, cancel=cancel, **options))


def stop_strings(stop: Any) -> list[Any]:
    """One string or several, or None, as a list; `generator.generate` looks at what is in it."""
    if stop is None:
        return []
    return list(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else [stop]


def _check_names(sampling: Mapping[str, Any], others: Iterable[str]) -> None:
    """UsageError for an option that there is none of, with the nearest one; `others`: those that are not of sampling."""
    from pocketlm.runtime.sampling_options import SamplingOptions

    known = {*(field.name for field in fields(SamplingOptions)), *OPTIONS, "logprobs", "top_logprobs", "process"}
    for name in sampling:
        if name not in known:
            known.update(others, ["ignore_eos"])
            raise UsageError(f"{name}: there is no such option{did_you_mean(name, sorted(known))}")


def prompt_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text to go on with; the model's begin-of-text token in front where it asks for one, or where there is
    nothing else.
    """
    ids = tokenizer.encode(text, bos=tokenizer.adds_bos)
    return ids or [id for id in (tokenizer.bos_id, tokenizer.eos_id) if id is not None][:1]


def prompt_room(n_ctx: int, max_tokens: int | None) -> int:
    """How many tokens of a conversation a context holds beside the answer, which may have `max_tokens`."""
    wanted = int(max_tokens) if isinstance(max_tokens, Integral) and max_tokens else ANSWER_ROOM  # the rest is refused later
    return n_ctx - min(wanted, ANSWER_ROOM, n_ctx // 4)


class Likeliest:
    """Lists with each piece the tokens that were likeliest at its place, of the first `n_vocab`. Raises UsageError."""

    MOST = 100

    def __init__(self, sampler: Sampler, n: int, n_vocab: int):
        self._sampler, self._n, self._n_vocab = sampler, whole_number("top_logprobs", n, 0, self.MOST), n_vocab
        self._seen: deque[tuple[int, tuple[tuple[int, float], ...]]] = deque()

    def sample(self, logits: np.ndarray, ids: Sequence[int]) -> tuple[int, float]:
        """What the sampler says, and what else it could have said."""
        from pocketlm.runtime.sampling import top_k

        id, logprob = self._sampler(logits, ids)
        total = float(logits[id]) - logprob
        likeliest = top_k(logits[: self._n_vocab], self._n).tolist()
        self._seen.append((id, tuple((i, float(logits[i]) - total) for i in likeliest)))
        return id, logprob

    def told(self, stream: Iterator[Piece]) -> Iterator[Piece]:
        """The pieces of the stream, each with its list."""
        for piece in stream:
            while piece.id >= 0 and self._seen:
                id, likeliest = self._seen.popleft()
                if id == piece.id:
                    piece = replace(piece, top_logprobs=likeliest)
                    break
            yield piece


def _announced(stream: Iterator[Piece], turns: Turns, note: str) -> Iterator[Piece]:
    """The stream, its last piece with the number of dropped turns; if some are dropped already, an empty piece comes first."""
    from pocketlm.runtime.generator import Piece

    if turns.dropped or note:
        yield Piece("", -1, math.nan, note=note, dropped_turns=turns.dropped)
    for piece in stream:
        yield replace(piece, dropped_turns=turns.dropped) if piece.finish_reason else piece


class Turns:
    """A conversation that can lose its oldest turns: a user's message with all that follows until the next one. Where the
    last message is the assistant's, its text is the beginning of the answer.

    `before`: the same for the conversation as it was. Turns that had to go then are not looked at again where the new one
    goes on from it, so that a question costs what the turns cost that fit, not what the whole conversation would.
    """

    def __init__(
        self, messages: Sequence[Mapping[str, str]], template: Template, tokenizer: Tokenizer, before: Turns | None = None
    ):
        from pocketlm.chat.templates import continued

        if not isinstance(messages, Iterable):
            raise UsageError(f"the messages are {messages!r:.60}; they must be a list of dicts")
        self._template, self._tokenizer = template, tokenizer
        self._messages = [dict(message) if isinstance(message, Mapping) else message for message in messages]
        last = self._messages[-1] if self._messages else {}
        opening = last.get("content") if isinstance(last, Mapping) and last.get("role") == "assistant" else ""
        opening = opening if isinstance(opening, str) else ""  # whatever else it is, the template refuses it
        self._begun = template.begun(opening)
        self._opening = continued(self._begun, tokenizer)
        if opening:
            self._messages.pop()
        if not self._messages:
            raise PocketlmError("there are no messages to answer")
        self._starts = [i for i, m in enumerate(self._messages) if isinstance(m, Mapping) and m.get("role") == "user"]
        self.dropped = before.dropped if before and before._goes_on_in(self) else 0  # turns that had to go

    def _goes_on_in(self, other: Turns) -> bool:
        same_kind = (self._template, self._tokenizer) == (other._template, other._tokenizer)
        return same_kind and self._messages == other._messages[: len(self._messages)]

    def encode(self) -> list[int]:
        """The ids of what is left."""
        return self._template.encode(self._left(self.dropped), self._tokenizer) + self._opening

    def text(self) -> str:
        """What `encode` gives the ids of."""
        return self._template.render(self._left(self.dropped)) + self._begun

    def _left(self, dropped: int) -> list[dict[str, str]]:
        if not dropped:
            return self._messages
        return self._messages[: self._starts[0]] + self._messages[self._starts[dropped] :]

    def drop_beyond(self, n_chars: int) -> None:
        """Drop the oldest turns until the texts are no longer than that, or only the last question is left."""
        most, left = len(self._starts) - 1, sum(len(message["content"]) for message in self._left(self.dropped))
        while self.dropped < most and left > n_chars:
            left -= self._n_chars(self._starts[self.dropped], self._starts[self.dropped + 1])
            self.dropped += 1

    def fit(self, room: int) -> list[int]:
        """The ids without as many turns as have to go, oldest first, until they are at most `room`; the last question stays.

        How many that are is guessed by the texts' lengths, then counted: whoever resumes a conversation of a thousand turns
        does not wait for a thousand encodings of it.
        """
        ids, most = self.encode(), len(self._starts) - 1
        if len(ids) <= room or self.dropped >= most:
            return ids
        at_least, n_chars = self.dropped + 1, self._n_chars(self._starts[self.dropped])
        aim = n_chars * room / len(ids)
        while self.dropped < at_least or (self.dropped < most and n_chars > aim):
            n_chars -= self._n_chars(self._starts[self.dropped], self._starts[self.dropped + 1])
            self.dropped += 1
        ids = self.encode()
        while len(ids) > room and self.dropped < most:
            at_least = self.dropped = self.dropped + 1
            ids = self.encode()
        while self.dropped > at_least:
            self.dropped -= 1
            longer = self.encode()
            if len(longer) > room:
                self.dropped += 1
                break
            ids = longer
        return ids

    def _n_chars(self, start: int, stop: int | None = None) -> int:
        return sum(len(message["content"]) for message in self._messages[start:stop])

    def drop_oldest(self) -> list[int] | None:
        """The ids without one more turn; None when only the last question is left."""
        if self.dropped >= len(self._starts) - 1:
            return None
        self.dropped += 1
        return self.encode()
