"""A server under many clients: `pocketlm serve` beside `python -m llama_cpp.server`, over HTTP, on the same file.

    python bench/serving.py [MODEL] [--clients 1,8,64] [--slots 8] [--tokens 128] [--rounds 3] [--threads 2]

A client asks one question of its own and reads the answer as a stream; all of a round begin together. The servers take turns;
a figure is the median of the rounds. Prints a Markdown table: tokens per second of all clients together, that beside one
client, and the time to the first token, half of the clients' and 95 %. A client without an answer ends the run. Pieces of
text are counted as tokens: a character that takes several is one piece.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median, quantiles
from typing import NamedTuple

from pocketlm.model import find_model

HEAD = ("server", "clients", "tokens/s", "beside one client", "first token, ms: half", "95 %")
SUBJECTS = ("a lighthouse", "the tide", "a dragon", "an old clock", "bread", "the moon", "a train", "winter", "a pond", "snow")
STARTING = 120.0  # seconds until a server must answer
LONGEST = 600.0  # seconds for one answer


class Answer(NamedTuple):
    """Seconds from the request to its first piece of text and to its end, and how many tokens it has."""

    first: float
    whole: float
    tokens: int


def ours(model: str, port: int, slots: int, threads: int) -> list[str]:
    return ["-m", "pocketlm", "serve", model, f"--port={port}", f"--slots={slots}", f"--threads={threads}", "--ctx=512"]


def llama(model: str, port: int, slots: int, threads: int) -> list[str]:
    """One request at a time, whatever the slots; unless told not to, it breaks off an answer when another request comes."""
    options = {"model": model, "port": port, "n_threads": threads, "n_threads_batch": threads, "n_ctx": 512, "n_batch": 512,
               "chat_format": "chatml", "verbose": False, "interrupt_requests": False}  # fmt: skip
    return ["-m", "llama_cpp.server", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


SERVERS: dict[str, tuple[str, Callable[[str, int, int, int], list[str]]]] = {  # package that it needs, its command
    "pocketlm": ("uvicorn", ours),
    "llama_cpp.server": ("starlette_context", llama),
}


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    """A server that answers, for the length of a `with` statement. Raises SystemExit with its last line where it does not."""
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
                    raise SystemExit(f"{' '.join(command[1:3])}: {(tail or ['no answer'])[-1].strip()}") from None
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(30)


def ask(port: int, number: int, tokens: int) -> Answer:
    """One question, answered in at most `tokens` tokens."""
    question = f"Tell me about {SUBJECTS[number % len(SUBJECTS)]}, number {number}, at length."
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": tokens, "stream": True, "temperature": 0}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LONGEST)
    started, first, n = time.perf_counter(), 0.0, 0
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    if reply.status != 200:
        raise RuntimeError(f"{reply.status}: {reply.read(300).decode(errors='replace')}")
    for line in reply:
        if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
            first = first or time.perf_counter() - started
            n += 1
    connection.close()
    return Answer(first, time.perf_counter() - started, n)


def together(port: int, clients: int, tokens: int) -> tuple[float, list[float]]:
    """Tokens per second of all clients together, and each one's time to its first token."""

    def client(number: int) -> Answer | str:
        """The answer, or why there is none."""
        try:
            answer = ask(port, 1000 * clients + number, tokens)  # asked by nobody before: no prompt is in a cache
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            return f"client {number}: {error}"
        return answer if answer.tokens else f"client {number}: no answer"

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        ended = [*pool.map(client, range(clients))]
    seconds = time.perf_counter() - started
    if lost := [why for why in ended if isinstance(why, str)]:
        raise SystemExit(f"{len(lost)} of {clients} clients have no answer; {lost[0]}")
    got = [answer for answer in ended if isinstance(answer, Answer)]
    return sum(answer.tokens for answer in got) / seconds, [answer.first for answer in got]


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
    clients = [int(number) for number in arguments.clients.split(",")]
    model = str(find_model(arguments.model))
    names = [n for n in SERVERS if arguments.only in (None, n) and importlib.util.find_spec(SERVERS[n][0])]
    found: dict[tuple[str, int], list[tuple[float, list[float]]]] = {}
    for _ in range(arguments.rounds):
        for name in names:
            port = free_port()
            with running(SERVERS[name][1](model, port, arguments.slots, arguments.threads), port):
                ask(port, 0, 4)  # pages are read, kernels are there
                for number in clients:
                    found.setdefault((name, number), []).append(together(port, number, arguments.tokens))
    rows = [HEAD, ("---", *["--:"] * 5)]
    for (name, number), rounds in found.items():
        speed = median(each for each, _ in rounds)
        alone = median(each / one for (each, _), (one, _) in zip(rounds, found[name, clients[0]], strict=True))
        half, most = [], []
        for _, firsts in rounds:
            cuts = quantiles([*firsts, *firsts], n=20)  # twice, for one client has but one
            half.append(cuts[9])
            most.append(cuts[18])
        figures = (f"{speed:.0f}", f"{alone:.2f}", *(f"{1e3 * median(column):.0f}" for column in (half, most)))
        rows.append((name, str(number), *figures))
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
