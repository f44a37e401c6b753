"""What a packed program costs the friend who gets it: size, time to start, tokens per second, memory.

    python bench/packed.py [--shape 48M] [--formats F16,Q8_0,Q4_0] [--rounds 5]

Random weights are packed for this system in each format; the programs take turns. Prints a Markdown table of medians.
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

import pocketlm
from pocketlm.bench import shapes

HEAD = ("", "program, MB", "model opened, ms", "started and 1 token, ms", "tokens/s", "peak memory, MB")


def measure(program: Path) -> tuple[float, float, float, float]:
    """Milliseconds to open the model, to the end of a run of one token, tokens per second of 128, megabytes of that run."""
    started = time.perf_counter()
    pocketlm.load(program).close()
    opened = time.perf_counter() - started
    command = [program, "generate", "-p", "to", "--temp", "0", "--json", "-n"]
    started = time.perf_counter()
    subprocess.run([*command, "1"], check=True, capture_output=True)
    first = time.perf_counter() - started
    process = subprocess.Popen([*command, "128"], stdout=subprocess.PIPE)
    assert process.stdout
    said = json.loads(process.stdout.read())
    _, _, usage = os.wait4(process.pid, 0)  # of the boot loader and of the program that it starts, the larger
    process.returncode = 0
    return 1e3 * opened, 1e3 * first, said["tokens_per_second"], usage.ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="48M", choices=shapes.SHAPES)
    parser.add_argument("--formats", default="F16,Q8_0,Q4_0")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        programs = {}
        for kind in arguments.formats.split(","):
            model = shapes.find(f"{arguments.shape}-{kind}", Path(folder))
            programs[kind] = Path(folder, f"friend-{kind}")
            subprocess.run([sys.executable, "-m", "pocketlm", "pack", model, "-o", programs[kind]], check=True)
        found: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in programs}
        for _ in range(arguments.rounds):
            for kind, program in programs.items():
                found[kind].append(measure(program))
        rows = [HEAD, ("---", *["--:"] * 5)]
        for kind, runs in found.items():
            size = programs[kind].stat().st_size / 1e6
            rows.append((kind, *(f"{value:.1f}" for value in (size, *map(median, zip(*runs, strict=True))))))
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
