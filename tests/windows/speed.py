"""A packed program for Windows under wine beside the same model's for Linux: how long a start and a token take.

    python tests/windows/speed.py smollm2 [--rounds 5] [--threads 1] [-n 1000] [--folder FOLDER]

The two take turns, in every round; an empty program says how much of a start is wine's. Prints medians and their ratios, by
the clock and by processor time (the boot loader's and that of what it starts, not wine's server's): on a busy machine only the
second says something. The end is what comes after the last token; there the boot loader for Windows looks five times, for 50 ms
each, whether the session ends, too. wine's server is started first: else it would end between two programs, and begin each with
starting all its services. `--folder` keeps the packed programs and wine's folder, so that a second run only measures.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import images  # noqa: E402
from wine_runner import WINE, environment_for, prefix  # noqa: E402

TICK = os.sysconf("SC_CLK_TCK")


class Seconds(NamedTuple):
    clock: float
    processor: float


class Run(NamedTuple):
    """Seconds since its start: when its first and its last output came; of all of it."""

    first: float
    last: float
    whole: Seconds


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


def run(program: Path, arguments: list[str], environment: dict[str, str]) -> Run:
    """Of a run to its end; wine's processes are nobody's children, so they are looked at until they end."""
    command = [WINE or "wine", str(program)] if program.suffix == ".exe" else [str(program)]
    seen: dict[int, float] = {}
    outputs: list[float] = []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}  # Python under wine takes no files
    start = time.perf_counter()
    with subprocess.Popen([*command, *arguments], env=environment, **pipes) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.close()
        reader = threading.Thread(target=_note_outputs, args=(os.dup(process.stdout.fileno()), start, outputs), daemon=True)
        reader.start()
        while process.poll() is None:
            seen |= times(program.name)
            time.sleep(0.01)
        clock = time.perf_counter() - start
        reader.join(1)  # wine's services may keep the pipe open
    assert process.returncode == 0, command
    return Run(outputs[0] if outputs else clock, outputs[-1] if outputs else clock, Seconds(clock, sum(seen.values())))


def _note_outputs(file: int, start: float, outputs: list[float]) -> None:
    with open(file, "rb", buffering=0) as pipe:
        while pipe.read(65536):
            outputs.append(time.perf_counter() - start)


def of_a_token(one: Seconds, many: Seconds, n: int) -> Seconds:
    """Seconds of a token, from those of two runs of which the second made `n` more. SystemExit: it did not take longer."""
    if n < 1 or any(b <= a for a, b in zip(one, many, strict=True)):
        sys.exit(f"speed.py: {n} tokens take less time than starts differ by: ask for more with -n")
    return Seconds(*((b - a) / n for a, b in zip(one, many, strict=True)))


def pack(model: str, platform: str, program: Path) -> None:
    if not program.exists():
        command = [sys.executable, "-m", "pocketlm", "pack", model, "--for", platform, "-o", str(program)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", default="1")
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="keep the packed programs and wine here")
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
        home = environment_for(prefix(folder.resolve()))
        environments = {"Linux": dict(os.environ), "wine": home}
        nothing: list[Run] = []
        ones: dict[str, list[Run]] = {name: [] for name in programs}
        tokens: dict[str, list[Seconds]] = {name: [] for name in programs}
        try:
            for command in (["wineserver", "-p"], [WINE, str(empty)]):
                subprocess.run(command, env=home, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            for i in range(arguments.rounds):
                nothing.append(run(empty, [], home))
                for name, program in programs.items():
                    one, many = (run(program, [*generate, str(n)], environments[name]) for n in (1, 1 + arguments.n))
                    ones[name].append(one)
                    tokens[name].append(of_a_token(one.whole, many.whole, arguments.n))
                clock, processor = (a / b for a, b in zip(tokens["Linux"][-1], tokens["wine"][-1], strict=True))
                print(f"round {i + 1}: wine / Linux tokens/s {clock:.2f}, by processor time {processor:.2f}", flush=True)
        finally:
            subprocess.run(["wineserver", "-k"], env=home)
    print(f"an empty program under wine {median(each.whole.clock for each in nothing):.2f} s")
    for name in programs:
        start, end = median(one.first for one in ones[name]), median(one.whole.clock - one.last for one in ones[name])
        print(f"{name}: {start:.2f} s to the first token, {end:.2f} s for the end")
    for i, measure in enumerate(Seconds._fields):
        whole, token = ({name: median(row[i] for row in rows) for name, rows in runs.items()}
                        for runs in ({name: [one.whole for one in rows] for name, rows in ones.items()}, tokens))  # fmt: skip
        for name in programs:
            print(f"{measure}: {name} {whole[name]:.2f} s for start, one token and end, {1e3 * token[name]:.2f} ms for a token")
        ratio = median(a[i] / b[i] for a, b in zip(tokens["Linux"], tokens["wine"], strict=True))
        print(f"{measure}: wine / Linux: {whole['wine'] / whole['Linux']:.2f}, tokens/s {ratio:.2f} (median of rounds)")


if __name__ == "__main__":
    main()
