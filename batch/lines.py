"""One line of a file of prompts, and the line that is written for it: the answer, or what is wrong with the prompt.

In: a line of JSON, a session. Out: a line of JSON, which depends only on the line, the model and the settings. Knows no files,
no threads and no other machines.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pocketlm.errors import PocketlmError
from pocketlm.serve import fields
from pocketlm.serve.asking import Asking, pieces
from pocketlm.serve.errors import ApiError
from pocketlm.serve.guard import MAX_BODY
from pocketlm.serve.shapes import Shape, one_line

if TYPE_CHECKING:
    from pocketlm.conversation import Conversation
    from pocketlm.model import Model
    from pocketlm.runtime.generator import Piece

STREAMED = ("stream", "stream_options")  # fields of a request that a file has no use for


class Line(NamedTuple):
    """`number`: in the file, from 1 on. `data`: without the line feed; None if it is longer than a request may be."""

    number: int
    data: bytes | None


class Written(NamedTuple):
    """The output for line `number`, with its line feed, and how many tokens were generated."""

    number: int
    data: bytes
    tokens: int = 0


class Answering:
    """Answers lines. `defaults`: options that a line leaves out. A line without a seed gets a hash of `seed` and its text."""

    def __init__(self, model: Model, defaults: Mapping[str, Any], seed: int):
        self._defaults = {False: dict(defaults), True: {**model.chat_defaults, **defaults}}  # by whether it is a chat
        self._seed = b"%d\n" % seed
        self._asking = Asking(model, model.n_ctx)
        self._token_bytes = model.tokenizer.token_bytes

    def answer(self, line: Line, session: Conversation, cancel: threading.Event) -> Written | None:
        """The output for a line; None if `cancel` was set before it was finished."""
        named: dict[str, Any] = {"line": line.number}
        try:
            body = _body(line)
            named |= _name(body)
            _check(body)
            return self._answer(line, body, named, session, cancel)
        except ApiError as error:
            return Written(line.number, _json({**named, **error.content}))
        except PocketlmError as error:
            return Written(line.number, _json({**named, **ApiError(500, str(error)).content}))

    def _answer(
        self, line: Line, body: dict[str, Any], named: dict[str, Any], session: Conversation, cancel: threading.Event
    ) -> Written | None:
        is_chat = body.get("messages") is not None
        ask = fields.read(body, is_chat, self._defaults[is_chat])
        if ask.options.get("seed") is None:
            digest = hashlib.blake2b(self._seed + (line.data or b""), digest_size=6).digest()
            ask.options["seed"] = int.from_bytes(digest, "little")
        prompts = self._asking.encode(ask)
        answers: dict[int, list[Piece]] = {}
        for number, piece in pieces(ask, prompts, session, cancel):
            answers.setdefault(number, []).append(piece)
        if any(parts[-1].finish_reason == "cancelled" for parts in answers.values()):
            return None
        whole = Shape(ask, "", self._token_bytes).whole([*answers.values()], prompts.dropped_turns, prompts.parts)
        told = {name: whole[name] for name in ("choices", "usage", "dropped_turns") if name in whole}
        del told["usage"]["prompt_tokens_details"]  # what was in the cache depends on which lines came before
        return Written(line.number, _json({**named, **told}), told["usage"]["completion_tokens"])


def _body(line: Line) -> dict[str, Any]:
    """The line's fields. Raises ApiError."""
    if line.data is None:
        raise ApiError(413, f"a line may have {MAX_BODY} bytes")
    return fields.parse(line.data, "the line")


def _name(body: dict[str, Any]) -> dict[str, Any]:
    """Remove the line's own `id` from `body`; {"id": …} for the output. Raises ApiError."""
    name = body.pop("id", None)
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise ApiError(400, "id must be a text or a whole number", param="id")
    return {} if name is None else {"id": name}


def _check(body: dict[str, Any]) -> None:
    """Remove the fields about streaming. Raises ApiError if the line asks for a stream, or has no prompt."""
    for field in STREAMED:
        if body.get(field):
            raise ApiError(400, f"{field} is not supported: answers are written when they are whole", param=field)
        body.pop(field, None)
    if body.get("messages") is None and body.get("prompt") is None:
        advice = "; what OpenAI's batches have as body is a line here" if isinstance(body.get("body"), dict) else ""
        raise ApiError(400, f"messages or prompt is missing{advice}")


def _json(content: Any) -> bytes:
    return one_line(json.dumps(content, ensure_ascii=False)) + b"\n"
