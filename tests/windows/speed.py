"""A packed program for Windows under wine beside the same model's for Linux: processor time to start, and for a token.

    python tests/windows/speed.py smollm2 [--rounds 5] [--threads 1] [-n 256]

The two take turns. What counts is user and system time, of the boot loader and of what it starts: on a busy machine the clock
says nothing. Prints a line for each, medians, and their ratios.
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

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from suite import CACHE  # noqa: E402
from wine_runner import WINE, environment_for, prefix  # noqa: E402

TICK = os.sysconf("SC_CLK_TCK")


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


def processor_seconds(program: Path, n: int, threads: str, environment: dict[str, str]) -> float:
    """Of a run of `n` tokens; wine's processes are nobody's children, so they are looked at until they end."""
    command = [str(program), "generate", "-p", "Once", "--temp", "0", "--ignore-eos", "--threads", threads, "-n", str(n)]
    command = [WINE or "wine", *command] if program.suffix == ".exe" else command
    seen: dict[int, float] = {}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}  # Python under wine takes no files
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdin
        process.stdin.close()
        while process.poll() is None:
            seen |= times(program.name)
            time.sleep(0.01)
    assert process.returncode == 0, command
    return sum(seen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default="1")
    parser.add_argument("-n", type=int, default=256)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        programs = {"Linux": Path(folder, "beside-linux"), "wine": Path(folder, "beside-wine.exe")}
        for program, platform in zip(programs.values(), ("linux", "windows"), strict=True):
            command = [sys.executable, "-m", "pocketlm", "pack", arguments.model, "--for", platform, "-o", str(program)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        environments = {"Linux": dict(os.environ), "wine": environment_for(prefix(CACHE))}
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for _ in range(arguments.rounds):
            for name, program in programs.items():
                one, many = (processor_seconds(program, n, arguments.threads, environments[name]) for n in (1, 1 + arguments.n))
                runs[name].append((one, (many - one) / arguments.n))
    starts, tokens = ({name: median(row[i] for row in rows) for name, rows in runs.items()} for i in (0, 1))
    for name in programs:
        print(f"{name}: {starts[name]:.2f} s to start and one token, {1e3 * tokens[name]:.2f} ms for a token")
    print(f"wine / Linux: start {starts['wine'] / starts['Linux']:.2f}, tokens/s {tokens['Linux'] / tokens['wine']:.2f}")


if __name__ == "__main__":
    main()
