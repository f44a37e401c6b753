"""Who may ask: checks of every request before anything of it is read but its head.

In: the head of a request, and a `Policy`. Out: nothing, or the ApiError that refuses it. Refused are requests that a page of
another site makes a visitor's browser send (CSRF), also by way of a host name of its own that resolves to this computer (DNS
rebinding); programs without the key; bodies that are too large. Knows no model.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from pocketlm.serve.errors import ApiError

MAX_BODY = 4 << 20
PUBLIC = {"/", "/health", "/v1/health", "/models", "/v1/models", "/page/enter"}  # without a key
TOKEN = "x-pocketlm-token"
_LOCAL_NAMES = re.compile(r"[a-z0-9.-]+\.(local|internal|lan|home\.arpa)")
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?")
_HEADERS = re.compile(r"[\w, -]*", re.ASCII)
_SAFE = {
    b"x-content-type-options": b"nosniff", b"referrer-policy": b"no-referrer", b"cross-origin-resource-policy": b"same-origin",
    b"x-frame-options": b"DENY", b"cache-control": b"no-store",
}  # fmt: skip

ASGI = Callable[[Any, Any, Any], Awaitable[None]]


@dataclass
class Policy:
    """`host`: where the server listens; `key`: what programs must send, "" for none; `origins`: other sites whose pages may
    ask; `token`: what the server's own page sends.
    """

    host: str = "127.0.0.1"
    key: str = ""
    origins: tuple[str, ...] = ()
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    def check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Raises ApiError if the request is refused. `headers`: by their names in lower case."""
        self._check_host(headers.get("host", ""))
        self._check_origin(path, headers)
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the Content-Type must be application/json")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "the body must not be compressed")
        if "transfer-encoding" in headers and "content-length" in headers:
            # a proxy in front may go by the other, and take the end of the body for another's request (RFC 9112, 6.1)
            raise ApiError(400, "the body has two lengths", closes=True)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > MAX_BODY:
            raise ApiError(413, f"the body may have {MAX_BODY} bytes")
        if method != "OPTIONS":
            self._check_key(path, headers)

    def _check_host(self, host: str) -> None:
        """The Host header must be a name that only this computer, or its network, can give to the server: no stranger's."""
        found = _HOST.fullmatch(host.lower())
        name = found["name"] if found else ""
        found_by_any = bool(self.key) and not is_loopback(self.host)  # a page that is led here by its own name lacks the key
        if not name or not (found_by_any or self._is_own(name)):
            raise ApiError(403, "the Host header names another computer; a proxy in front has to send localhost there")

    def _is_own(self, name: str) -> bool:
        if name in ("localhost", self.host.lower()) or name.endswith(".localhost"):
            return True
        try:
            address = ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return not is_loopback(self.host) and (name == socket.gethostname().lower() or bool(_LOCAL_NAMES.fullmatch(name)))
        return address.is_loopback or not is_loopback(self.host)

    def _check_origin(self, path: str, headers: Mapping[str, str]) -> None:
        """Pages of other sites may send no request, but may link to the page here."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if origin is not None:
            if origin != f"http://{headers['host'].lower()}" and origin not in self.origins:
                raise ApiError(403, "pages of that origin may not ask here; see --cors")
        elif site not in ("none", "same-origin") and not (path == "/" and headers.get("sec-fetch-mode") == "navigate"):
            raise ApiError(403, "pages of other sites may not ask here")

    def _check_key(self, path: str, headers: Mapping[str, str]) -> None:
        has_token = same(headers.get(TOKEN, ""), self.token)
        if path.startswith("/page/") and path not in PUBLIC and not has_token:
            raise ApiError(401, "open the page by the address that the server printed when it started")
        if self.key and path not in PUBLIC and not has_token:
            scheme, _, bearer = headers.get("authorization", "").partition(" ")
            given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            if not same(given, self.key):
                raise ApiError(401, "the key is missing or wrong; send Authorization: Bearer KEY")

    def cors(self, headers: Mapping[str, str]) -> dict[bytes, bytes]:
        """The response headers (CORS) for a request from an origin in `origins`."""
        origin = headers.get("origin", "")
        if origin not in self.origins:
            return {}
        return {b"access-control-allow-origin": origin.encode("latin-1"), b"vary": b"Origin",
                b"cross-origin-resource-policy": b"cross-origin"}  # fmt: skip

    def preflight(self, headers: Mapping[str, str]) -> dict[str, str]:
        """The response headers for a preflight request (CORS). Any request header is allowed: OpenAI's client sends some of its
        own, and none has a meaning here that it would not have without a browser.
        """
        if headers.get("origin", "") not in self.origins:
            return {}
        names = headers.get("access-control-request-headers", "")
        return {"access-control-allow-methods": "GET, POST", "access-control-max-age": "600",
                "access-control-allow-headers": names if _HEADERS.fullmatch(names) else ""}  # fmt: skip


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this computer alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def same(a: str, b: str) -> bool:
    """Whether two secrets are equal, compared in constant time."""
    return hmac.compare_digest(a.encode("utf-8", "replace"), b.encode("utf-8", "replace"))


class Guard:
    """An ASGI application that passes the requests that the policy allows on to another."""

    def __init__(self, app: ASGI, policy: Policy):
        self._app, self._policy = app, policy

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1"), value.decode("latin-1"))
        extra = {**_SAFE, **self._policy.cors(headers)}

        async def send_safely(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *((n, v) for n, v in extra.items() if n not in given)]
            await send(message)

        app: Any = self._app
        try:
            self._policy.check(scope["method"], scope["path"], headers)
            if scope["method"] == "OPTIONS":
                app = Response(status_code=204, headers=self._policy.preflight(headers))
        except ApiError as refused:
            app = refused.response()
        await app(scope, receive, send_safely)
