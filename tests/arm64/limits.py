"""Models under hard limits of memory: each row of TABLE is one start of the program in a control group of its own.

    python tests/arm64/limits.py FOLDER [--first] [ROW...]

A start fills its context and then answers with eight tokens: `generate`, `chat` through a pipe, and a server, which is asked so
by two clients at once, and for its page. It may run, or end with one line; a kill or anything else is an error, and exit status
1. Prints the rows of the tables in PI.md: the anonymous memory at its highest, or what the line says. `--first`: with an empty
cache of compiled code each time, as on a fresh system. FOLDER keeps the made model of 1.3 billion weights (722 MB). ROW: only
these limits, in MB of 2^20 bytes. Linux, as root, with control groups of version 1 or 2.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pocketlm import tokenizer
from pocketlm.bench import shapes
from pocketlm.model import find_model

LARGE = "Llama-1.3B-Q4_0"
UNIT = 0  # the limit is what `--install-service` says
# MB, model, context, more options
TABLE = (
    (128, "smollm2", 256, ""), (168, "smollm2", 256, ""), (192, "smollm2", 1024, ""), (256, "smollm2", 4096, ""),
    (256, "smollm2", 3840, ""), (512, "smollm2", 4096, ""), (512, LARGE, 256, ""),
    (900, LARGE, 512, ""), (1024, LARGE, 1024, "--low-memory"), (1024, LARGE, 2048, ""), (1024, LARGE, 2048, "--kv q8"),
    (2048, LARGE, 2048, ""), (2048, "smollm2", 8192, ""),
)  # fmt: skip
TALKED = ((512, "smollm2", 4096, ""), (1024, LARGE, 1024, "--low-memory"), (2048, LARGE, 2048, ""))
SERVED = (
    (128, "smollm2", 256, "--slots 2"), (192, "smollm2", 512, "--slots 2"), (256, "smollm2", 1024, "--slots 2"),
    (512, "smollm2", 2048, "--slots 8"), (512, LARGE, 256, "--slots 2"), (1024, LARGE, 256, "--slots 2"),
    (1024, LARGE, 1024, "--slots 2"), (2048, LARGE, 2048, "--slots 2"), (2048, "smollm2", 4096, "--slots 8"),
    (UNIT, "smollm2", 1024, "--slots 2 --low-memory"),
)  # fmt: skip
CLIENTS = 2
GROUPS = Path("/sys/fs/cgroup")
ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


class Group:
    """A control group without swap; `kills`: how often the system ended a process in it."""

    def __init__(self, limit: int):
        self.is_second = (GROUPS / "cgroup.controllers").exists()
        self.folder = (GROUPS if self.is_second else GROUPS / "memory") / f"pocketlm-limits-{os.getpid()}"
        self.folder.mkdir(exist_ok=True)
        swap = ("memory.swap.max", 0) if self.is_second else ("memory.memsw.limit_in_bytes", limit)  # of version 1 the sum
        for name, value in (("memory.max" if self.is_second else "memory.limit_in_bytes", limit), swap):
            if (self.folder / name).exists():  # no swap, no such file
                (self.folder / name).write_text(str(value))

    def kills(self) -> int:
        text = (self.folder / ("memory.events" if self.is_second else "memory.oom_control")).read_text()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))


def anonymous(process: int) -> int:
    """Bytes that this process has of its own."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("RssAnon")), 0)


class Start:
    """A start of the program in a group of its own, and the most anonymous memory that it had so far."""

    def __init__(self, limit: int, words: str, cache: str | None, asked: Path = Path(os.devnull)):
        self.group, self.highest = Group(limit << 20), 0
        self.kills = -self.group.kills()
        self.errors = tempfile.TemporaryFile("a+")  # noqa: SIM115 - `__exit__` closes it
        environment = os.environ | ({"POCKETLM_CACHE": cache} if cache else {})
        command = ["sh", "-c", ENTER, str(self.group.folder), sys.executable, "-m", "pocketlm", *words.split()]
        with open(asked) as file:
            self.process = subprocess.Popen(command, stdin=file, stdout=subprocess.DEVNULL, stderr=self.errors, env=environment)

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()
        self.group.folder.rmdir()

    def runs(self) -> bool:
        """Whether it still does; looks at its memory."""
        time.sleep(0.005)
        self.highest = max(self.highest, anonymous(self.process.pid))
        return self.process.poll() is None

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read().strip()

    def end(self, what: str) -> tuple[bool, str]:
        """Wait for its end: whether it kept the promise, and what came of it. `what`: what it did beside running."""
        while self.runs():
            pass
        status, said, kills = self.process.returncode, self.said(), self.group.kills() + self.kills
        if kills or status not in (0, 1):
            return False, f"KILLED with {status}: {said}"
        if status:
            return len(said.splitlines()) == 1, said
        return True, f"ran{what}, {self.highest / (1 << 20):.0f} MB"


def answered(limit: int, model: str, ctx: int, options: str, prompt: Path, cache: str | None) -> tuple[bool, str]:
    with Start(limit, f"generate {model} -f {prompt} --ctx {ctx} -n 8 --temp 0 --ignore-eos {options}", cache) as start:
        return start.end("")


def talked(limit: int, model: str, ctx: int, options: str, prompt: Path, cache: str | None) -> tuple[bool, str]:
    words = f"chat {model} --ctx {ctx} --max-tokens 8 --temp 0 --ignore-eos --no-save {options}"
    with Start(limit, words, cache, prompt) as start:
        return start.end("")


def served(limit: int, model: str, ctx: int, options: str, prompt: Path, cache: str | None) -> tuple[bool, str]:
    """The same of a server: clients ask at once, each with a prompt of its own that fills the context."""
    words = f"serve {model} --port 0 --ctx {ctx} {options}"
    if limit == UNIT:
        command = [sys.executable, "-m", "pocketlm", *words.split(), "--install-service"]
        unit = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        limit = int(re.findall(r"^MemoryMax=(\d+)M$", unit, re.MULTILINE)[0])
    with Start(limit, words, cache) as start:
        while start.runs() and not (place := re.search(r"http://\S+(?=/v1)", start.said())):
            pass
        if not start.runs():
            return start.end("")
        notes = "".join(f"; {line}" for line in start.said().splitlines() if "slot" in line)
        address, texts = f"{place[0]}/v1/completions", [f"{i} {prompt.read_text()}" for i in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            asked = [pool.submit(ask, f"{place[0]}/"), *(pool.submit(ask, address, text) for text in texts)]
            while start.runs() and not all(map(Future.done, asked)):
                pass
        start.process.send_signal(signal.SIGTERM)
        refused = [said for future in asked if (said := future.result())]
        kept, what = start.end(f" under {limit} MB{notes}" + "".join(f"; refused: {said}" for said in refused))
        return kept and all(said.startswith("4") for said in refused), what


def ask(address: str, prompt: str | None = None) -> str:
    """What a request is refused with, empty where it is answered."""
    body = None
    if prompt is not None:
        body = json.dumps({"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read().decode()}"
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    if prompt is not None and (made := json.loads(text)["usage"]["completion_tokens"]) != 8:
        return f"{made} tokens"
    return ""


def tokens_of_a_word(path: str) -> float:
    return len(tokenizer.load(path).encode("a " * 64)) / 64


def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", action="store_true", help="with an empty cache of compiled code")
    parser.add_argument("--serve", action="store_true", help="servers alone")
    parser.add_argument("limits", type=int, nargs="*", metavar="ROW")
    arguments = parser.parse_intermixed_args()
    places = {"smollm2": str(find_model("smollm2")), LARGE: str(shapes.find(LARGE, arguments.folder))}
    failed = 0
    rows = [(start, row) for start, table in ((answered, TABLE), (talked, TALKED), (served, SERVED)) for row in table]
    for start, (limit, model, ctx, options) in rows:
        if (arguments.limits and limit not in arguments.limits) or (arguments.serve and start is not served):
            continue
        with tempfile.TemporaryDirectory() as folder:
            prompt = Path(folder, "prompt.txt")
            prompt.write_text("a " * int((ctx - 24) / tokens_of_a_word(places[model])))
            kept, said = start(limit, places[model], ctx, options, prompt, folder if arguments.first else None)
        failed += not kept
        print(f"| {limit} MB | {start.__name__} | {model} {options} | {ctx} | {said} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
