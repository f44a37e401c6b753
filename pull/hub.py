"""What a server that speaks as huggingface.co does says of a repository, and the one connection that all requests use.

In: the name of a repository, a quantisation. Out: a `Remote`: address, size, SHA-256, licence. Knows no files of this computer.

Requests go over https, to the hub's own host and those that it keeps files on, and a redirect to anywhere else is an error.
$HF_ENDPOINT names another hub, as for Hugging Face's own programs; only one on this computer may be spoken to without TLS.
Proxies are those of the environment.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from pocketlm.errors import PocketlmError, quoted

HUB = "https://huggingface.co"
FILE_HOSTS = (".huggingface.co", ".hf.co")  # where huggingface.co sends who wants a large file
SECONDS = 30  # that a server may say nothing
MOST_FACTS = 16 << 20  # bytes
MOST_BYTES = 1 << 40  # of a model
BROKEN = (OSError, http.client.HTTPException)  # what a connection ends with


@dataclass(frozen=True)
class Remote:
    """A file on a server. `licence`: as its page says, "" where it says none."""

    url: str
    file: str
    n_bytes: int
    sha256: str
    licence: str


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows what `_check` lets pass."""

    def __init__(self, hub: str):
        self._hub = hub

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check(newurl, self._hub)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        if (scheme := urlsplit(headers.get("location") or "").scheme) not in ("", "http", "https"):
            raise PocketlmError(f"the server sends to an address of another kind ({quoted(scheme, 20)}:)")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def endpoint() -> str:
    """The hub's address. Raises PocketlmError for one without TLS, unless it is on this computer."""
    hub = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    parts = urlsplit(hub)
    if not (parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1"))):
        raise PocketlmError(f"HF_ENDPOINT is {quoted(hub)}; it must begin with https://")
    return hub


def request(url: str, start: int = 0) -> Any:
    """An open response, from byte `start` on if the server can. Raises PocketlmError for what will not get better, one of
    BROKEN for what may.
    """
    hub = endpoint()
    _check(url, hub)
    opener = urllib.request.OpenerDirector()  # no file:, ftp: or data:, unlike urllib's own
    for handler in (
        urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(), _Redirects(hub),
        urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler(), urllib.request.UnknownHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    headers = {"User-Agent": "pocketlm", "Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(error, url) from None
    if response is None:
        raise PocketlmError(f"{quoted(url)} is no address that can be fetched")
    return response


def look_up(repository: str, quant: str) -> Remote:
    """The file of that quantisation, as the server has it now. Raises PocketlmError, or one of BROKEN."""
    hub = endpoint()
    with request(f"{hub}/api/models/{repository}?blobs=true") as response:
        data = response.read(MOST_FACTS)
    where = f"{urlsplit(hub).hostname} says of {repository}"
    try:
        facts = json.loads(data)
        revision, files = str(facts["sha"]), {str(row["rfilename"]): row for row in facts["siblings"]}
    except (ValueError, LookupError, TypeError, RecursionError):
        raise PocketlmError(f"{where} nothing that can be understood; try again later") from None
    ggufs = {name: row for name, row in files.items() if name.lower().endswith(".gguf") and name.isprintable()}
    ending = f"{quant}.gguf".lower()
    found = [name for name in ggufs if re.search(rf"(^|[-._/]){re.escape(ending)}$", name.lower())]
    if len(found) != 1 or not re.fullmatch("[0-9a-f]{40}", revision):
        names = ", ".join(quoted(name.rpartition("/")[2], 60) for name in sorted(ggufs)[:40]) or "no GGUF"
        raise PocketlmError(f"{repository} has {'no' if not found else 'more than one'} file for {quant}; it has {names}")
    row: Any = files[found[0]]
    try:
        n_bytes, sha256 = row["lfs"]["size"], row["lfs"]["sha256"]
        if type(n_bytes) is not int or not 0 < n_bytes < MOST_BYTES or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError
    except (ValueError, LookupError, TypeError):
        raise PocketlmError(f"{where} neither size nor SHA-256 of {quoted(found[0])}: it cannot be checked") from None
    return Remote(f"{hub}/{repository}/resolve/{revision}/{quote(found[0])}", found[0], n_bytes, sha256, _licence(facts))


def reason(error: BaseException) -> str:
    """Why a connection failed, in a few words."""
    inner = getattr(error, "reason", error)
    if isinstance(inner, TimeoutError):
        return f"nothing came for {SECONDS} seconds"
    return quoted(getattr(inner, "strerror", None) or str(inner) or type(inner).__name__)


def _licence(facts: dict[str, Any]) -> str:
    card = facts.get("cardData")
    said = card.get("license") if isinstance(card, dict) else None
    tags = [tag[8:] for tag in facts.get("tags") or [] if isinstance(tag, str) and tag.startswith("license:")]
    return quoted(said if isinstance(said, str) else next(iter(tags), ""), 60)


def _check(url: str, hub: str) -> None:
    """Raises PocketlmError for an address that is not the hub's, or one of its hosts' for files."""
    to, own = urlsplit(url), urlsplit(hub)
    same = to.hostname == own.hostname
    if to.scheme != "https" and not (to.scheme == own.scheme == "http" and same):
        raise PocketlmError(f"the server sends to an address without TLS ({quoted(to.scheme, 20)}://{quoted(to.hostname)})")
    if not (same or (to.hostname or "").endswith(FILE_HOSTS)):
        raise PocketlmError(f"the server sends to another host ({quoted(to.hostname)})")


def _refusal(error: urllib.error.HTTPError, url: str) -> Exception:
    host, code = urlsplit(error.url or url).hostname, error.code
    if code in (401, 403):
        return PocketlmError(f"{host} wants a person to accept this model's terms first ({code}): fetch it with the browser")
    if code in (408, 429) or code >= 500:
        return OSError(f"{host} answers with {code}")
    if code in (404, 410):
        return PocketlmError(f"{host} has no such model ({code}); a newer pocketlm may know where it is now")
    return PocketlmError(f"{host} refuses ({code}); try again later")
