"""Changes single bits anywhere in a packed executable, and looks at what becomes of it.

    python tests/fuzz_packed.py [--count 10000] [--starts 1000] [--seconds N] [--seed 0] [FRIEND]

Every changed file is given to the full check, in this process; some are started for one question, as a friend would. FRIEND:
a packed executable of this system; by default Pocket is packed. The promises: the check finds every change; a program that is
started says what it said before, says something else (weights have no checksums that a start reads), or ends with one line;
where code of ours runs, it does not crash. The boot loader runs before it, and cannot check itself: those are counted apart.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from pocketlm.errors import FileError
from pocketlm.runtime import container

QUESTION = "Hi! How are you?\n"
EXPECTED = ("the same answer", "another answer", "one line", "the boot loader's message")
ENDS = ("one line", "the boot loader's message", "other lines", "traceback", "hung", "refused by the system")
TIME_ALLOWED = 120  # seconds for a start: the machine may be busy


def pack_pocket(folder: Path) -> Path:
    from pocketlm.cli import main

    out = folder / "friend"
    assert main(["pack", "small-talk", "-o", str(out), "--temp", "0", "--seed", "1", "--max-tokens", "24"]) == 0
    return out


def part_of(place: int, sections: dict[str, container.Section]) -> str:
    """Which part of the executable a byte lies in."""
    for name in ("header", *(name for name in sections if name not in ("header", "gguf"))):
        if sections[name].offset <= place < sections[name].end:
            return container.TITLES[name]
    return "locator" if place >= sections["persona"].end else "zeros behind the boot loader"


def check(path: Path) -> str:
    """What the full check says."""
    try:
        packed = container.find(path)
        if packed is None:
            return "found"  # there is no model: said at once
        packed.check()
    except FileError as error:
        return "found" if str(error).isprintable() else "found, in more than a line"
    return "NOT FOUND"


def start(path: Path, folder: Path) -> tuple[str, str]:
    """Ask one question: what kind of end it is, and what was said on stderr."""
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(folder), "HOME": str(folder)}
    try:
        done = subprocess.run([path, "--no-save"], input=QUESTION.encode(), capture_output=True, timeout=TIME_ALLOWED,
                              env=environment)  # fmt: skip
    except subprocess.TimeoutExpired:
        return "hung", ""
    except OSError as error:  # not an executable any more
        return "refused by the system", str(error)
    said, lines = done.stderr.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace").strip().splitlines()
    if done.returncode < 0:
        return f"crashed (signal {-done.returncode})", said
    if "Traceback" in said:
        return "traceback", said
    if done.returncode:
        own = lines and lines[0].startswith(f"{path.name}: ")
        kind = "one line" if len(lines) == 1 and own else "the boot loader's message" if "[PYI-" in said else "other lines"
        return kind, said
    return done.stdout.decode("utf-8", "replace"), said


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("friend", nargs="?", type=Path)
    options.add_argument("--count", type=int, default=10_000)
    options.add_argument("--starts", type=int, default=1_000)
    options.add_argument("--seconds", type=float, default=float("inf"), help="start no more programs after this time")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    noise, began, outcomes = random.Random(args.seed), time.monotonic(), collections.Counter()
    starts: collections.Counter[tuple[str, str]] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="pocketlm-fuzz-") as temporary:
        folder = Path(temporary)
        friend = args.friend or pack_pocket(folder)
        whole, sections, broken = friend.read_bytes(), dict(container.find(friend).sections), folder / "broken"
        broken.write_bytes(whole)
        broken.chmod(0o755)
        right, _ = start(broken, folder)
        with suppress(KeyboardInterrupt):  # the figures so far
            for i in range(args.count):
                place, bit = noise.randrange(len(whole)), 1 << noise.randrange(8)
                part = part_of(place, sections)
                with open(broken, "r+b") as file:
                    file.seek(place)
                    file.write(bytes([whole[place] ^ bit]))
                outcomes[part, check(broken)] += 1
                if sum(starts.values()) < args.starts and time.monotonic() - began < args.seconds:
                    result, said = start(broken, folder)
                    for left in folder.glob("_MEI*"):  # a boot loader that gives up leaves 28 MB behind
                        shutil.rmtree(left, ignore_errors=True)
                    kind = "the same answer" if result == right else result if result in ENDS else "another answer"
                    kind = result if result.startswith("crashed") else kind
                    starts[part, kind] += 1
                    if kind not in EXPECTED:
                        last = " | ".join(said.strip().splitlines()[-2:])[:300]
                        print(f"byte {place}, bit {bit}, {part}: {kind}: {last}", file=sys.stderr, flush=True)
                with open(broken, "r+b") as file:
                    file.seek(place)
                    file.write(whole[place : place + 1])
                if i % 1000 == 999:
                    print(f"{i + 1} checked, {sum(starts.values())} started", file=sys.stderr, flush=True)
    for title, table in (("changed bits, given to the check", outcomes), ("of them started", starts)):
        print(sum(table.values()), title)
        for (part, kind), n in sorted(table.items()):
            print(f"{n:8}  {part:<28} {kind}")
    return int(any(kind == "NOT FOUND" for _, kind in outcomes))


if __name__ == "__main__":
    sys.exit(main())
