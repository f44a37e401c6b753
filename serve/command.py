"""`pocketlm serve`: its arguments, and what it says when the server runs."""

from __future__ import annotations

import argparse
import os
import re
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from pocketlm.cli_options import answer_keywords, is_packed, model_arguments, open_model, sampling_arguments
from pocketlm.errors import UsageError, whole_number
from pocketlm.terminal_text import print

PORT = 8642
QUEUE = 16  # requests that may wait, for each slot
SECONDS = 600.0
FOR_TERMINALS = ("www-browser", "links", "elinks", "lynx", "w3m")
# seconds that a thread may go on in Python while others wait to: in Python's own 5 ms, a pass of eight answers is half through
TURN = 0.0005


def arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser, optional=True)
    group = parser.add_argument_group("the server")
    group.add_argument(
        "--host", default="127.0.0.1", type=lambda host: host.strip("[]"), metavar="ADDRESS",
        help="where to listen (default: this computer alone)",
    )  # fmt: skip
    group.add_argument("--port", type=int, default=PORT, metavar="N", help=f"default {PORT}; 0: any that is free")
    group.add_argument("--slots", type=int, default=8, metavar="N", help="answers at the same time (default 8)")
    group.add_argument("--timeout", type=float, default=SECONDS, metavar="S", help="longest wait and answer, in seconds")
    group.add_argument("--api-key", metavar="KEY", help="programs must send it; also from $POCKETLM_API_KEY")
    group.add_argument("--open", action="store_true", help="let everybody in the network ask, without a key")
    group.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="let the pages of a site ask: https://…")
    group.add_argument("--browser", action=argparse.BooleanOptionalAction, default=False, help="open the page")
    group.add_argument("--install-service", action="store_true", help="print a systemd unit that does all this, and end")
    group.add_argument("--system", default="", metavar="TEXT", help="what the page tells the model before a conversation")
    group.add_argument("--title", default="", metavar="TEXT", help="what the page calls the model")
    group.add_argument("--greeting", default="", metavar="TEXT", help="what the page says first")
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    sampling_arguments(parser)
    parser.add_argument("--model-id", default="", help=argparse.SUPPRESS)  # of packed programs: whose conversations these are


def run(arguments: argparse.Namespace) -> int:
    """Serve until it is stopped; the exit status."""
    from pocketlm.serve import left_out

    left_out.stand_in()
    from pocketlm.serve.answering import Answerer
    from pocketlm.serve.app import application
    from pocketlm.serve.asking import sessions
    from pocketlm.serve.page import Page
    from pocketlm.serve.server import Server, listen

    policy = _policy(arguments)
    whole_number("--slots", arguments.slots, 1, 256)
    whole_number("--port", arguments.port, 0, 65535)
    if not arguments.timeout > 0:
        raise UsageError(f"--timeout {arguments.timeout}: expected more than 0 seconds")
    defaults = answer_keywords(arguments)
    if arguments.install_service:
        return _service(arguments)
    socket = listen(arguments.host, arguments.port)  # before a model is opened for nothing
    with socket, open_model(arguments) as model:
        found = sessions(model, arguments.slots)
        if len(found) < arguments.slots:
            told = f"there is memory for {len(found)} of {arguments.slots} slots; --ctx makes them smaller"
            print(f"{arguments.program}: {told}", file=sys.stderr)
        answerer = Answerer(model, found, QUEUE * arguments.slots, arguments.timeout)
        persona = {name: getattr(arguments, name) for name in ("title", "system", "greeting")}
        page = Page(answerer, policy, persona, arguments.model_id, defaults)
        server = Server(application(answerer, policy, defaults, page.routes()), socket, answerer.stop)
        port = socket.getsockname()[1]

        def begun() -> None:
            _begun(arguments, policy, page, port)
            answerer.prepare(arguments.system, forms=not arguments.low_memory)

        before = sys.getswitchinterval()
        sys.setswitchinterval(TURN)
        try:
            server.serve_until_stopped(begun)
        finally:
            sys.setswitchinterval(before)
    print(f"{arguments.program}: stopped", file=sys.stderr)
    return 0


def _service(arguments: argparse.Namespace) -> int:
    if is_packed():
        raise UsageError("--install-service is for pocketlm serve, not for a packed program")
    if sys.platform != "linux":
        raise UsageError("--install-service prints a unit for systemd, which is Linux's: ask on the computer that will serve")
    from pocketlm.serve import service

    with open_model(arguments) as model:
        print(service.unit(arguments, sys.argv[1:], model), end="")
    print(service.how_to(arguments), file=sys.stderr)
    return 0


def _policy(arguments: argparse.Namespace) -> Any:
    from pocketlm.serve.guard import Policy, is_loopback

    key = arguments.api_key or os.environ.get("POCKETLM_API_KEY", "")
    if not re.fullmatch(r"[!-~]*", key):
        raise UsageError("--api-key: expected letters, digits and signs of ASCII, no spaces; a request cannot send others")
    if not is_loopback(arguments.host) and not key and not arguments.open:
        raise UsageError(
            f"--host {arguments.host}: other computers could ask; give a key with --api-key KEY, or say --open to let everybody"
        )
    if "*" in arguments.cors or not all(origin.startswith(("http://", "https://")) for origin in arguments.cors):
        raise UsageError("--cors ORIGIN: name each site, as in --cors https://example.org")
    token = os.environ.get("POCKETLM_PAGE_TOKEN", "")
    if token and not re.fullmatch(r"[\w-]{16,200}", token, re.ASCII):
        raise UsageError("POCKETLM_PAGE_TOKEN: expected 16 to 200 letters, digits, - or _")
    kept = {"token": token} if token else {}  # else a new one with every start
    return Policy(arguments.host, key, tuple(origin.rstrip("/").lower() for origin in arguments.cors), **kept)


def _begun(arguments: argparse.Namespace, policy: Any, page: Any, port: int) -> None:
    from pocketlm.serve.server import address_for_others

    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    shown = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    address = f"http://{shown}:{port}"
    print(f"page      {address}/#{policy.token}", file=sys.stderr)
    print(f"programs  {address}/v1" + ("  (with the key)" if policy.key else ""), file=sys.stderr)
    if shown != host and (other := address_for_others(arguments.host)):
        print(f"others    http://{other}:{port} in place of {address}", file=sys.stderr)
    print("Ctrl-C stops it", file=sys.stderr, flush=True)
    if arguments.browser:
        # in a thread: webbrowser waits for some until they end
        threading.Thread(target=_open_page, args=(f"{address}/#{page.one_time_code()}",), daemon=True).start()


def _open_page(url: str) -> None:
    """Open a browser, but none that runs in the terminal, which is the server's."""
    import webbrowser

    with suppress(webbrowser.Error):  # there is none
        browser = webbrowser.get()
        if Path(getattr(browser, "name", "")).name not in FOR_TERMINALS:  # Python 3.10's for macOS has no name
            browser.open(url)
