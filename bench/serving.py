"""A server under many clients: `pocketlm serve` beside `python -m llama_cpp.server`, over HTTP, on the same file.

    python bench/serving.py [MODEL] [--clients 1,8,64] [--slots 8] [--tokens 128] [--rounds 3] [--threads 2]

A client asks one question of its own and reads the answer as a stream; all of a round ask one right after the other, before
any answer is read. The servers take turns; a figure is the median of the rounds. Prints a Markdown table: tokens per second of
all clients together, that beside one client, the time to the first token, half of the clients' and the last one's, and the
queue's order: by how many places a client's first token came earlier or later than its question, at most (slots begin together:
fewer places than slots mean nothing). Tokens are those of the server's usage, or pieces of text where it tells none, as
llama_cpp.server. A client without an answer ends the run; a server that is not installed, or does not start, is a line.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import io
import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

from pocketlm.bench.report import markdown_rows
from pocketlm.model import find_model

HEAD = ("server", "clients", "tokens/s", "beside one client", "first token, ms: half", "the last", "places out of order")
SUBJECTS = ("a lighthouse", "the tide", "a dragon", "an old clock", "bread", "the moon", "a train", "winter", "a pond", "snow")
STARTING = 120.0  # seconds until a server must answer
LONGEST = 600.0  # seconds until something of an answer comes
DONE = b"\ndata: [DONE]"  # the end of an answer; in the JSON of an event no line ends


class Answer(NamedTuple):
    """When it was asked for, seconds from there to its first piece of text and to its end, and how many tokens it has."""

    asked: float
    first: float
    whole: float
    tokens: int


class Round(NamedTuple):
    """Tokens per second of all clients together, each one's time to its first token, and places out of order, at most."""

    speed: float
    firsts: list[float]
    places: int


def ours(model: str, port: int, slots: int, threads: int) -> list[str]:
    return ["-m", "pocketlm", "serve", model, f"--port={port}", f"--slots={slots}", f"--threads={threads}", "--ctx=512"]


def llama(model: str, port: int, slots: int, threads: int) -> list[str]:
    """One request at a time, whatever the slots; unless told not to, it breaks off an answer when another request comes."""
    options = {"model": model, "port": port, "n_threads": threads, "n_threads_batch": threads, "n_ctx": 512, "n_batch": 512,
               "chat_format": "chatml", "verbose": False, "interrupt_requests": False}  # fmt: skip
    return ["-m", "llama_cpp.server", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


SERVERS: dict[str, tuple[str, Callable[[str, int, int, int], list[str]]]] = {  # packages that it needs, its command
    "pocketlm": ("uvicorn starlette", ours),
    "llama_cpp.server": ("llama_cpp fastapi starlette_context sse_starlette pydantic_settings uvicorn", llama),
}


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    """A server that answers, for the length of a `with` statement. Raises RuntimeError with its last line where it does not."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    tail: list[str] = []
    reader = threading.Thread(target=lambda: tail.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        until = time.monotonic() + STARTING
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    reader.join(60 if process.poll() is not None else 0)
                    raise RuntimeError((tail or ["no answer"])[-1].strip()) from None
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(30)


class Client(io.RawIOBase):
    """One question, to be answered in at most `tokens` tokens: it is sent. What comes is kept with its times, and understood
    when all have ended: clients that understand it at once, on the server's processors, take a part of what is measured.

    A raw stream of what has come, and a socket as http.client knows one.
    """

    def __init__(self, port: int, number: int, tokens: int):
        question = f"Tell me about {SUBJECTS[number % len(SUBJECTS)]}, number {number}, at length."
        body = json.dumps({"messages": [{"role": "user", "content": question}], "max_tokens": tokens, "stream": True,
                           "temperature": 0, "stream_options": {"include_usage": True}})  # fmt: skip
        head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n")  # fmt: skip
        self.socket = socket.create_connection(("127.0.0.1", port))
        self._came: deque[tuple[float, bytes]] = deque()
        self._end, self._why = b"", "no answer"
        self.asked = self._now = time.perf_counter()
        self.socket.sendall((head + body).encode())

    def receive(self) -> bool:
        """Keep what has come; whether more is to come."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError as error:
            data, self._why = b"", str(error)
        self._came.append((time.perf_counter(), data))
        self._end = self._end[-len(DONE) :] + data
        return bool(data) and DONE not in self._end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._now, data = self._came.popleft() if self._came else (self._now, b"")
        buffer[: len(data)] = data
        return len(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, 1 << 16)  # a line's time is that of the piece which ends it

    def answer(self) -> Answer | str:
        """What has come, or why it is no answer."""
        first, pieces, told = 0.0, 0, None
        reply = http.client.HTTPResponse(self)  # type: ignore[arg-type]  it asks a socket for nothing but a file
        try:
            reply.begin()
            if reply.status != 200:
                return f"{reply.status}: {reply.read(300).decode(errors='replace')}"
            for line in reply:
                if line.startswith(DONE[1:]):
                    whole = self._now - self.asked
                    return Answer(self.asked, first, whole, told if told and pieces else pieces) if pieces else "no answer"
                event = json.loads(line[6:]) if line.startswith(b"data: {") else {}
                told = (event.get("usage") or {}).get("completion_tokens", told)
                if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                    first = first or self._now - self.asked
                    pieces += 1
        except (http.client.HTTPException, ValueError):
            pass  # it is cut off
        return self._why


def receive(clients: Sequence[Client]) -> None:
    """Until all have what they are to have, or nothing comes any more."""
    with selectors.DefaultSelector() as waiting:
        for client in clients:
            waiting.register(client.socket, selectors.EVENT_READ, client)
        while waiting.get_map() and (ready := waiting.select(LONGEST)):
            for key, _ in ready:
                if not key.data.receive():
                    waiting.unregister(key.fileobj)
                    key.data.socket.close()


def together(port: int, clients: int, tokens: int, first: int = 0) -> Round:
    """All clients ask, the first one question number `first`, then all read. Raises SystemExit where one has no answer."""
    started = time.perf_counter()
    try:
        asked = [Client(port, first + number, tokens) for number in range(clients)]
    except OSError as error:
        raise SystemExit(f"{clients} of {clients} clients have no answer: {error}") from None
    receive(asked)
    seconds = time.perf_counter() - started
    ended = [client.answer() for client in asked]
    if lost := [why for why in ended if isinstance(why, str)]:
        raise SystemExit(f"{len(lost)} of {clients} clients have no answer: {lost[0]}")
    got = [answer for answer in ended if isinstance(answer, Answer)]
    order = sorted(range(clients), key=lambda i: got[i].asked + got[i].first)  # of first tokens; that of questions is 0, 1, …
    places = max(abs(place - number) for place, number in enumerate(order))
    return Round(sum(answer.tokens for answer in got) / seconds, [answer.first for answer in got], places)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--only", choices=SERVERS)
    arguments = parser.parse_args()
    clients = [*dict.fromkeys(map(int, arguments.clients.split(",")))]
    model = str(find_model(arguments.model))
    names = [name for name in SERVERS if arguments.only in (None, name)]
    found: dict[tuple[str, int], list[Round]] = {}
    for _ in range(arguments.rounds):
        for name in [*names]:
            port, (packages, command) = free_port(), SERVERS[name]
            try:
                if absent := [package for package in packages.split() if importlib.util.find_spec(package) is None]:
                    raise RuntimeError(f"{', '.join(absent)} not installed")
                with running(command(model, port, arguments.slots, arguments.threads), port):
                    # pages are read, kernels are there, every slot has its memory; asked once: a cache would have it
                    together(port, arguments.slots, 4)
                    for number in clients:
                        found.setdefault((name, number), []).append(together(port, number, arguments.tokens, 1000 * number))
            except RuntimeError as error:
                names.remove(name)
                print(f"{name} is left out: {error}", file=sys.stderr)
    rows = [[*HEAD]]
    for (name, number), rounds in found.items():
        speed = median(each.speed for each in rounds)
        alone = median(each.speed / one.speed for each, one in zip(rounds, found[name, clients[0]], strict=True))
        waits = (median(median(each.firsts) for each in rounds), median(max(each.firsts) for each in rounds))
        figures = (f"{speed:.0f}", f"{alone:.2f}", *(f"{1e3 * wait:.0f}" for wait in waits))
        rows.append([name, str(number), *figures, str(max(each.places for each in rounds))])
    print(*markdown_rows(rows), sep="\n")


if __name__ == "__main__":
    main()
