"""What a packed program costs the friend who gets it: size, time to start, tokens per second, memory.

    python bench/packed.py [--shape 48M] [--formats F16,Q8_0,Q4_0] [--rounds 5] [--threads 2]

Random weights are packed for this system in each format; the programs take turns. Prints a Markdown table of medians. This
process itself does no work that takes memory: the system reports for a child at least the peak of the process that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

HEAD = ("", "program, MB", "model opened, ms", "started and 1 token, ms", "tokens/s", "peak memory, MB")
MAKE = "import sys, pathlib; from pocketlm.bench import shapes; print(shapes.find(sys.argv[1], pathlib.Path(sys.argv[2])))"
OPEN = "import sys, time, pocketlm; start = time.perf_counter(); pocketlm.load(sys.argv[1]); print(time.perf_counter() - start)"


def python(code: str, *words: object) -> str:
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True, capture_output=True, text=True).stdout


def measure(program: Path, threads: str) -> tuple[float, float, float, float]:
    """Milliseconds to open the model, and of a run of one token; tokens per second and megabytes of a run of 128."""
    opened = float(python(OPEN, program))
    command = [program, "generate", "-p", "to", "--temp", "0", "--json", "--threads", threads, "-n"]
    started = time.perf_counter()
    subprocess.run([*command, "1"], check=True, capture_output=True)
    first = time.perf_counter() - started
    process = subprocess.Popen([*command, "128"], stdout=subprocess.PIPE)
    assert process.stdout
    said = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)  # of the boot loader and of the program that it starts, the larger
    process.returncode = os.waitstatus_to_exitcode(status)
    return 1e3 * opened, 1e3 * first, said["tokens_per_second"], usage.ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="48M", choices=("48M", "1.3B-class"))
    parser.add_argument("--formats", default="F16,Q8_0,Q4_0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default="2")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        programs = {kind: Path(folder, f"friend-{kind}") for kind in arguments.formats.split(",")}
        for kind, program in programs.items():
            model = python(MAKE, f"{arguments.shape}-{kind}", folder).strip()
            subprocess.run([sys.executable, "-m", "pocketlm", "pack", model, "-o", program], check=True)
        found: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in programs}
        for _ in range(arguments.rounds):
            for kind, program in programs.items():
                found[kind].append(measure(program, arguments.threads))
        rows = [HEAD, ("---", *["--:"] * 5)]
        for kind, runs in found.items():
            size = programs[kind].stat().st_size / 1e6
            rows.append((kind, *(f"{value:.1f}" for value in (size, *map(median, zip(*runs, strict=True))))))
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
