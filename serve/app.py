"""The addresses of the server and what each of them does.

In: a model's `Answerer`, a `Policy`, the page. Out: an ASGI application. Knows HTTP, and of the model only how to ask it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pocketlm.errors import PocketlmError
from pocketlm.serve import fields
from pocketlm.serve.answering import GONE, SELDOM, Answer, Answerer, metrics
from pocketlm.serve.asking import Prompts, size
from pocketlm.serve.errors import ApiError
from pocketlm.serve.fields import Ask
from pocketlm.serve.guard import MAX_BODY, Guard, Policy
from pocketlm.serve.llama_cpp import OwnShape, properties, slots
from pocketlm.serve.shapes import Shape, finish_reason, one_line

if TYPE_CHECKING:
    from pocketlm.chat.thinking import Splitter
    from pocketlm.runtime.generator import Piece

LARGE_BODY = 64 << 10
LARGE_BODIES = 64 << 20  # of all connections together, while they come; smaller ones take their place from nobody
READ_SECONDS = 30.0  # that a body may take to come
PAUSE = 0.002  # seconds between two looks at an answer that is streamed, for each answer that is being made
PING_SECONDS = 15.0  # after which a stream says that it is still there
MOST_IDS = 1 << 20
CHAT = ("/chat/completions", "/v1/chat/completions")
OWN = ("/completion", "/completions")  # llama.cpp's, who has OpenAI's under /v1 alone
MARK = "\0"  # where a text will stand; nothing that comes after it in an event is a text
_coming: dict[int, int] = {}  # bytes so far of each large body that is on its way
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def application(answerer: Answerer, policy: Policy, defaults: dict[str, Any], page: list[Route]) -> Guard:
    """The whole ASGI application. `defaults`: options for what a request leaves out; `page`: the routes of the page."""
    api = Api(answerer, defaults)
    routes = [
        *(Route(path, api.health) for path in ("/health", "/v1/health")),
        *(Route(path, api.models) for path in ("/models", "/v1/models")),
        Route("/v1/models/{name:path}", api.model),
        Route("/metrics", api.metrics),
        *(Route(path, partial(api.answer, is_chat=True), methods=["POST"]) for path in CHAT),
        Route("/v1/completions", partial(api.answer, is_chat=False), methods=["POST"]),
        *(Route(path, partial(api.answer, is_chat=False, llama_cpp=True), methods=["POST"]) for path in OWN),
        Route("/props", api.props),
        Route("/slots", api.slots),
        Route("/apply-template", api.apply_template, methods=["POST"]),
        *(Route(f"{path}/input_tokens", api.count, methods=["POST"]) for path in CHAT),
        *(Route(path, api.tokenize, methods=["POST"]) for path in ("/tokenize", "/v1/tokenize")),
        *(Route(path, api.detokenize, methods=["POST"]) for path in ("/detokenize", "/v1/detokenize")),
        *page,
    ]
    handlers: dict[Any, Callable[..., Any]] = {ApiError: _api_error, HTTPException: _http_error, Exception: _defect}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Guard(app, policy)


async def _api_error(request: Request, error: ApiError) -> Response:
    return error.response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    nothing = f"there is nothing at {request.url.path[:100]}; programs ask /v1/chat/completions or /v1/completions"
    messages = {404: nothing, 405: "this address wants another method"}
    message = messages.get(error.status_code, "refused")
    response = ApiError(error.status_code, message, "invalid_request_error").response()
    response.headers.update(error.headers or {})
    return response


async def _defect(request: Request, error: Exception) -> Response:
    return ApiError(500, "the server has a defect; its terminal shows which").response()


async def read_json(request: Request) -> dict[str, Any]:
    """The body. Raises ApiError where it is too large, too slow or no JSON object."""
    try:
        return fields.parse(await asyncio.wait_for(_body(request), READ_SECONDS))
    except (TimeoutError, asyncio.TimeoutError):
        raise ApiError(408, f"the body did not come in {READ_SECONDS:g} s") from None
    except ClientDisconnect:
        raise ApiError(400, GONE) from None


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise ApiError(413, f"the body may have {MAX_BODY} bytes")
            if len(body) > LARGE_BODY:
                _coming[id(body)] = len(body)
                if sum([*_coming.values()]) > LARGE_BODIES:
                    raise ApiError(429, "too many large bodies come at the same time", retry_after=1, closes=True)
        return bytes(body)
    finally:
        _coming.pop(id(body), None)


class Api:
    """The endpoints for programs."""

    def __init__(self, answerer: Answerer, defaults: dict[str, Any]):
        self._answerer, self._model, self._defaults = answerer, answerer.model, defaults
        self._facts = self._read_facts()  # now: the file may be moved while it serves

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(metrics(self._answerer), media_type="text/plain; version=0.0.4")

    def _read_facts(self) -> dict[str, Any]:
        model, tokenizer = self._model, self._model.tokenizer
        meta = {"vocab_type": type(tokenizer).__name__,
                "n_vocab": tokenizer.n_vocab, "n_ctx": self._answerer.n_ctx, "n_ctx_train": model.hyper.n_ctx,
                "n_embd": model.hyper.n_embd, "n_params": model.n_parameters, "size": model.file_bytes}  # fmt: skip
        return {"id": model.name, "object": "model", "created": int(model.path.stat().st_mtime), "owned_by": "pocketlm",
                "meta": meta}  # fmt: skip

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._facts]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self._model.name:
            raise ApiError(404, f"the model here is {self._model.name}")
        return JSONResponse(self._facts)

    async def tokenize(self, request: Request) -> Response:
        body = await read_json(request)
        flags = ("add_special", "parse_special", "with_pieces")
        content = _field(body, "content", lambda value: isinstance(value, str), "a text")
        special, parsed, pieces = (_field(body, name, lambda value: isinstance(value, bool), "true or false") for name in flags)
        tokenizer = self._model.tokenizer
        bos = bool(special) and tokenizer.adds_bos

        def tokens() -> str:
            ids = tokenizer.encode(content or "", special=parsed is not False, bos=bos)
            return ",".join(_JSON.encode(_piece(id, tokenizer.token_bytes(id))) for id in ids) if pieces else f"{ids}"[1:-1]

        try:  # millions of them as one JSON would keep everybody waiting for seconds
            written = await self._answerer.aside(tokens, len(content or ""), request.is_disconnected)
            return Response(f'{{"tokens":[{written}]}}', media_type="application/json")
        except PocketlmError as error:
            raise ApiError(400, str(error)) from None

    async def detokenize(self, request: Request) -> Response:
        tokens = _field(await read_json(request), "tokens", lambda value: isinstance(value, list), "a list of ids") or []
        n = self._model.tokenizer.n_vocab
        if len(tokens) > MOST_IDS or not all(type(id) is int and 0 <= id < n for id in tokens):
            raise ApiError(400, f"tokens must be a list of ids from 0 to {n - 1}", param="tokens")
        decode = partial(self._model.tokenizer.decode, tokens, special=True)
        text = await self._answerer.aside(decode, len(tokens), request.is_disconnected)
        return JSONResponse({"content": text})

    async def answer(self, request: Request, is_chat: bool, llama_cpp: bool = False) -> Response:
        ask = await self._read(request, is_chat, llama_cpp)
        prompts = await self._answerer.encode(ask, request.is_disconnected)
        own = OwnShape(ask, prompts, self._answerer) if llama_cpp else None
        shape = own or Shape(ask, self._model.name, self._model.tokenizer.token_bytes)
        return Answering(self._answerer, ask, prompts, shape)

    async def _read(self, request: Request, is_chat: bool, llama_cpp: bool = False) -> Ask:
        defaults = {**self._model.chat_defaults, **self._defaults} if is_chat else self._defaults
        return fields.read(await read_json(request), is_chat, defaults, llama_cpp)

    async def props(self, request: Request) -> Response:
        return JSONResponse(properties(self._answerer, self._defaults))

    async def slots(self, request: Request) -> Response:
        return JSONResponse(slots(self._answerer))

    async def apply_template(self, request: Request) -> Response:
        ask = await self._read(request, is_chat=True)
        text = await self._answerer.aside(lambda: self._answerer.asking.text(ask), size(ask), request.is_disconnected)
        return JSONResponse({"prompt": text})

    async def count(self, request: Request) -> Response:
        prompts = await self._answerer.encode(await self._read(request, is_chat=True), request.is_disconnected)
        return JSONResponse({"input_tokens": len(prompts.ids[0])})


def _field(body: dict[str, Any], name: str, fits: Callable[[Any], bool], kind: str) -> Any:
    value = body.get(name)
    if value is not None and not fits(value):
        raise ApiError(400, f"{name} must be {kind}", param=name)
    return value


def _piece(id: int, data: bytes) -> dict[str, Any]:
    """A token as llama.cpp lists it: its text, or its bytes where they are no UTF-8."""
    try:
        return {"id": id, "piece": data.decode()}
    except UnicodeDecodeError:
        return {"id": id, "piece": [*data]}


class Answering(Response):
    """The response to a question: one object, or a stream of events. When the client hangs up, the model stops, too."""

    def __init__(self, answerer: Answerer, ask: Ask, prompts: Prompts, shape: Shape):
        self._answerer, self._ask, self._prompts, self._shape = answerer, ask, prompts, shape

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        work = asyncio.ensure_future(self._respond(scope, receive, send))
        gone = asyncio.ensure_future(_hung_up(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if not work.cancelled() and (error := work.exception()) is not None:
            raise error

    async def _respond(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            answer = await self._answerer.begin(self._ask, self._prompts)
            try:
                if self._ask.stream:
                    return await self._stream(answer, send)
                response = JSONResponse(await self._whole(answer))
            finally:
                answer.close()
        except ApiError as error:
            response = error.response()
        await response(scope, receive, send)

    async def _whole(self, answer: Answer) -> Any:
        answers: dict[int, list[Piece]] = {}  # by their numbers, in the order in which they are made
        while parts := await answer.several(SELDOM):
            for number, piece in parts:
                answers.setdefault(number, []).append(piece)
        prompts = self._prompts
        return self._shape.whole([*answers.values()], prompts.dropped_turns, prompts.parts)

    async def _stream(self, answer: Answer, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
                   (b"x-accel-buffering", b"no")]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        loop, said = asyncio.get_running_loop(), 0.0

        async def say(event: bytes) -> None:
            nonlocal said
            said = loop.time()
            await send({"type": "http.response.body", "body": event, "more_body": True})

        async def ping() -> None:
            """Send a comment when nothing was sent for a while, lest a long prompt look like a dead connection."""
            while True:
                await asyncio.sleep(said + PING_SECONDS - loop.time())
                if loop.time() >= said + PING_SECONDS:
                    await say(b":\n\n")

        said = loop.time()
        pinging = asyncio.ensure_future(ping())  # one task for all pieces: a timeout for each costs more than sending it
        events = _Events(self._ask, self._prompts, self._shape)
        try:
            # a model of a thousand tokens per second makes more events than a loop can send one by one
            while parts := await answer.several(PAUSE * len(self._answerer.running)):
                if said_now := b"".join(event for number, piece in parts for event in events.of(number, piece)):
                    await say(said_now)
            if self._ask.include_usage:
                await say(events.usage())
        except ApiError as error:  # the head is sent: an event must say it
            await say(_event(error.content))
        finally:
            pinging.cancel()
        await send({"type": "http.response.body", "body": self._shape.done, "more_body": False})


class _Events:
    """Makes the events of a stream, piece by piece."""

    def __init__(self, ask: Ask, prompts: Prompts, shape: Shape):
        self._ask, self._prompts, self._shape = ask, prompts, shape
        self._opened = set[int]()
        self._lasts: list[Piece] = []
        self._held: list[Piece] = []  # pieces without text, until the next that has some
        self._splitter: Splitter | None = None
        self._frames: dict[tuple[int, bool], list[bytes]] = {}

    def of(self, number: int, piece: Piece) -> Iterator[bytes]:
        """The events of one piece."""
        ask, shape = self._ask, self._shape
        if number not in self._opened:
            self._opened.add(number)
            self._held = []
            self._splitter = self._prompts.parts and self._prompts.parts()
            if (opening := shape.opening(number)) is not None:
                yield _event(opening)
        self._held.append(piece)
        splitter = self._splitter
        parts = [(False, piece.text)] * bool(piece.text) if splitter is None else [*splitter.push(piece.text)]
        if piece.finish_reason and splitter is not None:
            parts += splitter.flush()
        if shape.each_token:
            parts = [(False, piece.text)] * (piece.id >= 0)
        elif not parts and piece.finish_reason and ask.logprobs and len(self._held) > 1:
            parts = [(False, "")]
        for is_thought, text in parts:
            if ask.logprobs or shape.each_token:
                yield _event(shape.delta(number, text, self._held, is_thought))
            else:
                before, after = self._frame(number, is_thought)
                yield before + one_line(_JSON.encode(text)) + after
            self._held = []
        if finish_reason(piece):
            self._lasts.append(piece)
            yield _event(shape.end(number, piece, self._prompts.dropped_turns))

    def _frame(self, number: int, is_thought: bool) -> list[bytes]:
        """What stands before and after the text in an event that differs from others in its text alone; made once."""
        if (frame := self._frames.get((number, is_thought))) is None:
            event = _event(self._shape.delta(number, MARK, (), is_thought))
            frame = self._frames[number, is_thought] = event.rsplit(_JSON.encode(MARK).encode(), 1)
        return frame

    def usage(self) -> bytes:
        """The event about all of them."""
        return _event(self._shape.usage(self._lasts))


def _event(content: Any) -> bytes:
    return b"data: " + one_line(_JSON.encode(content)) + b"\n\n"


async def _hung_up(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
