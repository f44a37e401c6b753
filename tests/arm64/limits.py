"""Models under hard limits of memory: each row of TABLE is one start of the program in a control group of its own.

    python tests/arm64/limits.py FOLDER [--first] [ROW...]

A start fills its context and then answers with eight tokens. It may run, or end with one line; a kill or anything else is an
error, and exit status 1. Prints the rows of the table in PI.md: the anonymous memory at its highest, or what the line says.
`--first`: with an empty cache of compiled code each time, as on a fresh system. FOLDER keeps the made model of 1.3 billion
weights (722 MB). ROW: only these limits, in MB. Linux, as root, with control groups of version 1 or 2.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pocketlm import tokenizer
from pocketlm.bench import shapes
from pocketlm.model import find_model

LARGE = "Llama-1.3B-Q4_0"
# MB, model, context, more options
TABLE = (
    (128, "smollm2", 256, ""), (160, "smollm2", 256, ""), (192, "smollm2", 1024, ""), (256, "smollm2", 4096, ""),
    (512, "smollm2", 4096, ""), (512, LARGE, 256, ""),
    (900, LARGE, 512, ""), (1024, LARGE, 1024, "--low-memory"), (1024, LARGE, 2048, ""), (1024, LARGE, 2048, "--kv q8"),
    (2048, LARGE, 2048, ""), (2048, "smollm2", 8192, ""),
)  # fmt: skip
GROUPS = Path("/sys/fs/cgroup")
ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


class Group:
    """A control group without swap; `kills`: how often the system ended a process in it."""

    def __init__(self, limit: int):
        self.is_second = (GROUPS / "cgroup.controllers").exists()
        self.folder = (GROUPS if self.is_second else GROUPS / "memory") / "pocketlm-limits"
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


def start(limit: int, model: str, ctx: int, options: str, prompt: Path, cache: str | None) -> tuple[bool, str]:
    """Whether it kept the promise, and what came of it."""
    words = f"-m pocketlm generate {model} -f {prompt} --ctx {ctx} -n 8 --temp 0 --ignore-eos {options}".split()
    group = Group(limit << 20)
    before, highest = group.kills(), 0
    environment = os.environ | ({"POCKETLM_CACHE": cache} if cache else {})
    with subprocess.Popen(
        ["sh", "-c", ENTER, str(group.folder), sys.executable, *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        while process.poll() is None:
            highest = max(highest, anonymous(process.pid))
            time.sleep(0.005)
        assert process.stderr
        said = process.stderr.read().strip()
    kills = group.kills() - before
    group.folder.rmdir()
    if kills or process.returncode not in (0, 1):
        return False, f"KILLED with {process.returncode}: {said}"
    if process.returncode:
        return len(said.splitlines()) == 1, said
    return True, f"ran, {highest / (1 << 20):.0f} MB"


def tokens_of_a_word(path: str) -> float:
    return len(tokenizer.load(path).encode("a " * 64)) / 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", action="store_true", help="with an empty cache of compiled code")
    parser.add_argument("limits", type=int, nargs="*", metavar="ROW")
    arguments = parser.parse_intermixed_args()
    places = {"smollm2": str(find_model("smollm2")), LARGE: str(shapes.find(LARGE, arguments.folder))}
    failed = 0
    for limit, model, ctx, options in TABLE:
        if arguments.limits and limit not in arguments.limits:
            continue
        with tempfile.TemporaryDirectory() as folder:
            prompt = Path(folder, "prompt.txt")
            prompt.write_text("a " * int((ctx - 24) / tokens_of_a_word(places[model])))
            kept, said = start(limit, places[model], ctx, options, prompt, folder if arguments.first else None)
        failed += not kept
        print(f"| {limit} MB | {model} {options} | {ctx} | {said} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
