"""Turns a request into token ids, and these into pieces of text. Shared by the server and by batches; starts no threads.

In: an `Ask` and a session. Out: pieces, or an ApiError that says what is wrong with the request. Knows no HTTP and no JSON.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pocketlm.chat.thinking import Splitter
from pocketlm.conversation import Turns, prompt_ids, prompt_room
from pocketlm.errors import FileError, PocketlmError, UsageError
from pocketlm.serve.errors import ApiError
from pocketlm.serve.fields import Ask

if TYPE_CHECKING:
    from pocketlm.conversation import Conversation
    from pocketlm.model import Model
    from pocketlm.runtime.generator import Piece


@dataclass
class Prompts:
    """A request's prompts as ids. `dropped_turns`: how many of the conversation's oldest turns were left out to make it fit."""

    ids: list[list[int]]
    stop: list[str] = field(default_factory=list)
    dropped_turns: int = 0
    parts: Callable[[], Splitter] | None = None  # makes what tells thought from answer; None: they are not told apart


class Asking:
    """Encodes requests to `model` as ids, for sessions of `n_ctx` positions."""

    def __init__(self, model: Model, n_ctx: int):
        self._model, self._n_ctx = model, n_ctx
        self._longest = max(map(len, model.tokenizer.all_bytes()))

    def encode(self, ask: Ask) -> Prompts:
        """The prompts as ids. Raises ApiError 400 for what the tokenizer cannot encode or the context cannot hold."""
        try:
            has_form = self._model.guide(dict(ask.options)) is not None  # made here, outside of every slot, and remembered
        except UsageError as error:
            raise ApiError(400, str(error)) from None
        # a form begins with the first token: there is nothing that the model could think before
        tokenizer, template = self._model.tokenizer, self._model.template.with_thinking(False if has_form else ask.thinking)
        texts = [message["content"] for message in ask.messages]
        texts += [part for prompt in ask.prompts for part in _parts(prompt) if isinstance(part, str)]
        most = self._n_ctx * self._longest  # bytes that the context can hold at all: longer texts need not be encoded
        if not ask.fit and sum(map(len, texts)) > most:
            raise self._too_long(sum(map(len, texts)) // self._longest)
        try:
            if not ask.is_chat:
                ids = [self._ids(prompt, ask.llama_cpp) for prompt in ask.prompts]
                prompts = Prompts(ids)
                bias = ask.options.get("logit_bias") or {}
                for text in [text for text in bias if isinstance(text, str)]:
                    bias |= dict.fromkeys(tokenizer.encode(text), bias.pop(text))
            else:
                messages = ask.messages
                if ask.fit:
                    messages = [{**message, "content": tokenizer.encodable(message["content"])} for message in messages]
                turns = Turns(messages, template, tokenizer)
                if ask.fit:
                    turns.drop_beyond(most)
                    ids = turns.fit(prompt_room(self._n_ctx, ask.options.get("max_tokens")))
                else:
                    ids = turns.encode()
                prompts = Prompts([ids], list(template.stop), turns.dropped)
                if ask.thoughts_apart and not has_form:
                    last = ask.messages[-1]
                    begun = last["content"] if last["role"] == "assistant" else ""
                    prompts.parts = lambda: Splitter(template.tags, begun or template.thought_opening)
        except PocketlmError as error:
            raise ApiError(400, str(error)) from None
        for ids in prompts.ids:
            if len(ids) >= self._n_ctx:
                raise self._too_long(len(ids))
            if not all(0 <= id < tokenizer.n_vocab for id in ids):
                raise ApiError(400, f"prompt holds an id that is no token; they go from 0 to {tokenizer.n_vocab - 1}")
        return prompts

    def _ids(self, prompt: str | list[int | str], with_markers: bool) -> list[int]:
        """`with_markers`: control tokens that the texts spell, such as the begin-of-text token, are encoded as such."""
        tokenizer, ids = self._model.tokenizer, list[int]()
        for part in _parts(prompt):
            ids += [part] if isinstance(part, int) else tokenizer.encode(part, special=with_markers)
        bos = tokenizer.bos_id
        if isinstance(_parts(prompt)[0], str) and tokenizer.adds_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids or prompt_ids("", tokenizer)

    def text(self, ask: Ask) -> str:
        """The conversation as the template writes it. Raises ApiError 400."""
        try:
            return Turns(ask.messages, self._model.template.with_thinking(ask.thinking), self._model.tokenizer).text()
        except PocketlmError as error:
            raise ApiError(400, str(error)) from None

    def _too_long(self, n: int) -> ApiError:
        message = f"the prompt of {n} tokens or more exceeds the available context size of {self._n_ctx}"
        # clients look for the message and the type, which are llama.cpp's, or for the code, which is OpenAI's
        told = {"code": "context_length_exceeded", "n_prompt_tokens": n, "n_ctx": self._n_ctx}
        return ApiError(400, message, "exceed_context_size_error", **told)


def size(ask: Ask) -> int:
    """How many characters and ids the texts of a request have."""
    parts = [part for prompt in ask.prompts for part in _parts(prompt)]
    return sum(len(message["content"]) for message in ask.messages) + sum(len(x) if isinstance(x, str) else 1 for x in parts)


def _parts(prompt: str | list[int | str]) -> list[int | str]:
    return [prompt] if isinstance(prompt, str) else prompt


def sessions(model: Model, n: int) -> list[Conversation]:
    """`n` sessions to answer at the same time, or as many as there is memory for: at least the model's own, which has its."""
    made = [model.own_session]
    with suppress(FileError):
        while len(made) < n:
            made.append(model.session())
    return made


def pieces(
    ask: Ask, prompts: Prompts, session: Conversation, cancel: threading.Event, others: Sequence[Conversation] = ()
) -> Iterator[tuple[int, Piece]]:  # fmt: skip
    """`(number of the answer, Piece)`, one answer after the other. `others`: sessions to copy the keys and values of a common
    beginning from. Raises PocketlmError.
    """
    options, number = {**ask.options, "logprobs": ask.logprobs}, 0
    options["stop"] = [*prompts.stop, *options.get("stop", ())]
    for ids in prompts.ids:
        if options.get("reuse_cache", True):
            session.borrow(others, ids)
        for i in range(ask.n):
            seed = options.get("seed")
            own = {**options, "seed": None if seed is None else seed + i}  # or all n were the same
            for piece in session.generate(ids, cancel=cancel, **own):
                yield number, piece
            number += 1
