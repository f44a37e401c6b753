"""A packed program for Windows under wine beside the same model's for Linux: how long a start and a token take.

    python tests/windows/speed.py smollm2 [--rounds 5] [--threads 1] [-n 256] [--folder FOLDER]

The two take turns, in every round; an empty program says how much of a start is wine's. Prints medians and their ratios, by
the clock and by processor time (the boot loader's and that of what it starts, not wine's server's): on a busy machine only the
second says something. `--folder` keeps the packed programs, so that a second run only measures.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import images  # noqa: E402
from suite import CACHE  # noqa: E402
from wine_runner import WINE, environment_for, prefix  # noqa: E402

TICK = os.sysconf("SC_CLK_TCK")


class Seconds(NamedTuple):
    clock: float
    processor: float


def times(name: str) -> dict[int, float]:
    """Seconds of processor time so far, by process, of all that have `name` in their command line."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if name.encode() in (entry / "cmdline").read_bytes():
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found[int(entry.name)] = (int(fields[11]) + int(fields[12])) / TICK
        except OSError:  # it has ended
            continue
    return found


def run(program: Path, arguments: list[str], environment: dict[str, str]) -> Seconds:
    """Of a run to its end; wine's processes are nobody's children, so they are looked at until they end."""
    command = [WINE or "wine", str(program)] if program.suffix == ".exe" else [str(program)]
    seen: dict[int, float] = {}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}  # Python under wine takes no files
    start = time.perf_counter()
    with subprocess.Popen([*command, *arguments], env=environment, **pipes) as process:
        assert process.stdin
        process.stdin.close()
        while process.poll() is None:
            seen |= times(program.name)
            time.sleep(0.01)
        clock = time.perf_counter() - start
    assert process.returncode == 0, command
    return Seconds(clock, sum(seen.values()))


def pack(model: str, platform: str, program: Path) -> None:
    if not program.exists():
        command = [sys.executable, "-m", "pocketlm", "pack", model, "--for", platform, "-o", str(program)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default="1")
    parser.add_argument("-n", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="keep the packed programs here")
    arguments = parser.parse_args()
    if WINE is None:
        parser.error("this needs wine (Debian packages wine and wine64)")
    generate = ["generate", "-p", "Once", "--temp", "0", "--ignore-eos", "--threads", arguments.threads, "-n"]
    with TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        programs = {"Linux": folder / "beside-linux", "wine": folder / "beside-wine.exe"}
        pack(arguments.model, "linux-x86_64", programs["Linux"])
        pack(arguments.model, "windows-x86_64", programs["wine"])
        empty = folder / "empty.exe"
        empty.write_bytes(images.empty_exe())
        environments = {"Linux": dict(os.environ), "wine": environment_for(prefix(CACHE))}
        nothing = []
        starts: dict[str, list[Seconds]] = {name: [] for name in programs}
        tokens: dict[str, list[Seconds]] = {name: [] for name in programs}
        for _ in range(arguments.rounds):
            nothing.append(run(empty, [], environments["wine"]))
            for name, program in programs.items():
                one, many = (run(program, [*generate, str(n)], environments[name]) for n in (1, 1 + arguments.n))
                starts[name].append(one)
                tokens[name].append(Seconds(*((b - a) / arguments.n for a, b in zip(one, many, strict=True))))
    for i, measure in enumerate(Seconds._fields):
        start, token = ({name: median(row[i] for row in rows) for name, rows in runs.items()} for runs in (starts, tokens))
        print(f"{measure}: an empty program under wine {median(row[i] for row in nothing):.2f} s")
        for name in programs:
            print(f"{measure}: {name} {start[name]:.2f} s to start and one token, {1e3 * token[name]:.2f} ms for a token")
        ratio = median(a[i] / b[i] for a, b in zip(tokens["Linux"], tokens["wine"], strict=True))
        print(f"{measure}: wine / Linux: start {start['wine'] / start['Linux']:.2f}, tokens/s {ratio:.2f} (median of rounds)")


if __name__ == "__main__":
    main()
