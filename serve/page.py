"""The page to chat in: its file, and what it asks of the server beside answers: who the model is, and saved conversations.

In: an `Answerer`, a `Policy`, the texts of a persona. Out: routes. All but the page itself and `enter` want the page's token,
which `guard` checks. Conversations are the files of `pocketlm chat`. Knows no model but its name.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pocketlm.chat import saved, states, transcript
from pocketlm.cli_options import SAMPLING
from pocketlm.errors import PocketlmError
from pocketlm.runtime.sampling_options import SamplingOptions
from pocketlm.serve.answering import Answerer
from pocketlm.serve.app import read_json
from pocketlm.serve.errors import ApiError
from pocketlm.serve.guard import Policy, same

FILE = "page.html"
LISTED = 300  # conversations that the page shows, the last ones
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,99}")
_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


class Page:
    """`persona`: title, system prompt and greeting. `model_id`: identifies this model's conversations; "": its fingerprint."""

    def __init__(
        self, answerer: Answerer, policy: Policy, persona: Mapping[str, str], model_id: str, defaults: Mapping[str, Any]
    ):  # fmt: skip
        self._answerer, self._policy, self._persona, self._defaults = answerer, policy, persona, defaults
        self._model, self._model_id = answerer.model, model_id
        self._codes: set[str] = set()
        self._html = Path(__file__).with_name(FILE).read_bytes()
        self._headers = {"content-security-policy": content_security_policy(self._html)}

    def routes(self) -> list[Route]:
        return [
            Route("/", self.html),
            Route("/page/enter", self.enter, methods=["POST"]),
            Route("/page/facts", self.facts),
            Route("/page/chats", self.chats),
            Route("/page/chats", self.save, methods=["POST"]),
            Route("/page/chats/{name}", self.chat),
            Route("/page/chats/{name}", self.save, methods=["POST"]),
            Route("/page/chats/{name}/delete", self.delete, methods=["POST"]),
        ]

    def one_time_code(self) -> str:
        """A code in place of the token, valid once: others can see a browser's command line, and with it the address."""
        code = secrets.token_urlsafe(24)
        self._codes.add(code)
        return code

    async def html(self, request: Request) -> Response:
        return Response(self._html, media_type="text/html; charset=utf-8", headers=self._headers)

    async def enter(self, request: Request) -> Response:
        """The token, for who has a one-time code or the token itself from the address of the page."""
        code = (await read_json(request)).get("code")
        if isinstance(code, str):
            once = next((known for known in self._codes if same(known, code)), None)
            self._codes.discard(once or "")
            if once or same(code, self._policy.token):
                return JSONResponse({"token": self._policy.token})
        raise ApiError(401, "open the page by the address that the server printed when it started")

    async def facts(self, request: Request) -> Response:
        model = self._model
        options = SamplingOptions(**{**model.chat_defaults, **{n: v for n, v in self._defaults.items() if n in _SETTINGS}})
        settings: dict[str, Any] = {name: getattr(options, name) for name in _SETTINGS}
        settings["max_tokens"] = self._defaults.get("max_tokens")
        return JSONResponse({
            "name": model.name, **self._persona, "backend": model.backend, "parameters": model.n_parameters,
            "context": self._answerer.n_ctx, "settings": settings,
        })  # fmt: skip

    # ---- conversations

    async def chats(self, request: Request) -> Response:
        return JSONResponse({"chats": await asyncio.to_thread(self._listed)})

    def _listed(self) -> list[dict[str, Any]]:
        rows, own = [], self._id()
        try:
            known = saved.paths()
        except PocketlmError:  # there is no home
            return []
        for path in known[:LISTED]:
            try:
                conversation, changed = transcript.load(path), path.stat().st_mtime
            except (PocketlmError, OSError):
                continue
            if _NAME.fullmatch(path.stem):
                first = conversation.messages[0]["content"] if conversation.messages else ""
                rows.append({
                    "name": path.stem, "model": conversation.model, "own": conversation.model_id == own, "changed": changed,
                    "turns": conversation.n_turns, "words": " ".join(first.split())[:80],
                })  # fmt: skip
        return rows

    def _id(self) -> str:
        return self._model_id or self._model.fingerprint

    async def chat(self, request: Request) -> Response:
        path = self._path(request)
        record = transcript.Record()
        conversation = await _asked(lambda: record.load(path), path)
        return JSONResponse({"name": path.stem, "revision": record.revision, "system": conversation.system,
                             "messages": conversation.messages, "branches": conversation.branches,
                             "model": conversation.model})  # fmt: skip

    async def save(self, request: Request) -> Response:
        """Save a conversation: a new one, or one that the client knows at `revision`. If somebody has changed that since, it is
        left alone, and this one is saved under a new name, which the response tells.
        """
        body = await read_json(request)
        path = self._path(request) if "name" in request.path_params else None
        conversation = _conversation(body)
        if not conversation.messages:
            raise ApiError(400, "messages is empty: there is nothing to save", param="messages")
        revision = _revision(body)
        if path is not None and not revision:
            raise ApiError(400, "revision must be what the conversation was read or written with", param="revision")

        def write() -> dict[str, Any]:
            conversation.model, conversation.model_id = self._model.name, self._id()
            record = transcript.Record() if path is None else transcript.Record.at(path, revision)
            same_file = record.save(conversation)
            assert record.path is not None
            states.forget(record.path)  # it may hold words that are gone now
            return {"name": record.path.stem, "revision": record.revision, "moved": not same_file}

        return JSONResponse(await _asked(write))

    async def delete(self, request: Request) -> Response:
        """Delete a conversation; with a `revision`, only if it has not changed since."""
        path, revision = self._path(request), _revision(await read_json(request))

        def delete() -> None:
            if revision:
                return transcript.Record.at(path, revision).discard()
            transcript.load(path)  # never another file than a conversation
            saved.delete(path)

        await _asked(delete, path)
        return JSONResponse({"deleted": path.stem})

    @staticmethod
    def _path(request: Request) -> Path:
        name = request.path_params["name"]
        if not _NAME.fullmatch(name):
            raise ApiError(404, "there is no such conversation")
        try:
            return transcript.chats_folder() / f"{name}.json"
        except PocketlmError as error:
            raise ApiError(404, str(error)) from None


_SETTINGS = tuple(keyword for keyword, _, _ in SAMPLING.values())  # of the sampler, which the page can change


def _revision(body: dict[str, Any]) -> str:
    """The revision of a conversation that a request names; "" where that is none."""
    revision = body.get("revision")
    return revision if isinstance(revision, str) and re.fullmatch("[0-9a-f]{64}", revision) else ""


async def _asked(work: Callable[[], Any], path: Path | None = None) -> Any:
    """Run `work` in a thread and return its result. Raises its errors as ApiError: 404 if no file is at `path`, else 503."""
    try:
        return await asyncio.to_thread(work)
    except (OSError, PocketlmError) as error:
        status = 503 if path is None or path.exists() else 404
        raise ApiError(status, getattr(error, "strerror", None) or str(error)) from None


def _conversation(body: dict[str, Any]) -> transcript.Conversation:
    """The conversation in a request. Raises ApiError."""
    found = transcript.checked(body)
    if found is None:
        raise ApiError(400, "messages must alternate between user and assistant, each with a text as content", param="messages")
    found.interactive = True
    return found


def content_security_policy(html: bytes) -> str:
    """The page may run its own script, use its own style, and send requests to its own server, and nothing else."""
    allowed = {"script": "", "style": ""}
    for kind, content in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        allowed[kind.decode()] += f" 'sha256-{digest}'"
    return (
        f"default-src 'none'; script-src{allowed['script']}; style-src{allowed['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
