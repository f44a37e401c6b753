"""Kills the commands that write files, at random moments, and counts what that costs. kill_programs.py chat:300 export:300 …

A row for each command: what is run, and what must hold after every SIGKILL. "lost": something that was finished is gone, or
what was there before is not what it was. "half": a file under the name of an output that is no whole output. "rests": other
files that are still there when the command has run once more, undisturbed, an hour later. "turns" and
"new" count what was done all the same: answers that are kept, outputs that were whole before the kill came. POSIX only.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from packing import fake_stub

from pocketlm import cli
from pocketlm.model import find_model

STALE = 7200  # seconds: rests are made older than this, and the command that runs next takes them away
SHAPE = "--set n_layer=2 --set n_embd=32 --set n_head=4 --set n_kv_head=2 --set n_ff=48 --set n_ctx=32 --tokenizer characters"
SHORT = f"{SHAPE} --steps 40 --batch 4 --micro-batch 2 --warmup 4 --eval-every 5 --threads 1 --log-every 1 --save-seconds 0"


@dataclass
class Program:
    """`command`: what is run, with `stdin`. `check`: after a kill, with what had been written to standard output by then.

    `check` returns names of what went wrong. `renew`: after how many kills everything is begun anew.
    """

    command: list[str]
    check: Callable[[str], list[str]]
    stdin: str = ""
    outputs: tuple[str, ...] = ()
    renew: int = 1_000_000
    environment: dict[str, str] = field(default_factory=dict)


def chat(folder: Path) -> Program:
    """One conversation, gone on with again and again: what was there stays, and so do the answers that were seen whole."""
    questions = [f"I have {n} cats. Do you like cats?" for n in range(12)]
    path = folder / "pocketlm" / "chats" / "20260101-000000-1.json"
    before: list[dict] = []
    conversation = {"format": "pocketlm conversation 1", "system": "", "model": "", "messages": before}
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(conversation))

    def check(seen: str) -> list[str]:
        nonlocal before
        answered = max(0, seen.count("\n") - 1)  # the last one may have been killed on its way to the disk
        files = [path, *(other for other in path.parent.glob("[!.]*.json") if other != path)]
        try:
            messages, *_ = [json.loads(file.read_text())["messages"] for file in files]
        except (OSError, ValueError, KeyError):
            return ["half"]
        wrong = [] if len(files) == 1 else ["lost"]
        new, asked = messages[len(before) :], [m["content"] for m in messages[len(before) :][::2]]
        kept = sum(bool(message["content"]) for message in new[1::2])
        if messages[: len(before)] != before or asked != questions[: len(asked)] or kept < answered:
            wrong.append("lost")
        before = messages
        return wrong + ["turns"] * kept

    command = ["chat", "small-talk", "--save", "--lines", "--resume", path.stem, "--max-tokens", "30", "--threads", "1"]
    return Program(command, check, "".join(f"{question}\n" for question in questions), renew=10,
                   environment={"XDG_DATA_HOME": str(folder)})  # fmt: skip


def _whole_or_old(command: list[str], out: Path) -> Program:
    """A command that writes one file in place of another."""
    subprocess.run([sys.executable, "-m", "pocketlm", *command], check=True, capture_output=True)
    new = hashlib.sha256(out.read_bytes()).digest()
    out.write_bytes(b"the old file")

    def check(seen: str) -> list[str]:
        data = out.read_bytes() if out.exists() else b""
        if data == b"the old file":
            return []
        out.write_bytes(b"the old file")
        if not data:
            return ["lost"]
        return ["new"] if hashlib.sha256(data).digest() == new else ["half"]

    return Program(command, check, outputs=(out.name,))


def export(folder: Path) -> Program:
    out = folder / "out.gguf"
    return _whole_or_old(["export", str(find_model("small-talk")), "-o", str(out), "--quant", "q4_0"], out)


def pack(folder: Path) -> Program:
    stub = fake_stub(Path(tempfile.mkdtemp(dir=folder.parent)) / "stub", archive=3_000_000)
    out = folder / "friend"
    return _whole_or_old(["pack", str(find_model("small-talk")), "-o", str(out), "--stub", str(stub)], out)


def train(folder: Path) -> Program:
    """A run that is gone on with after every kill: its last checkpoint is whole, and never an earlier one than before."""
    from pocketlm.train import checkpoints

    checkpoints.torch.set_num_threads(1)

    text, run = folder.parent / "text.txt", folder / "run"
    text.write_text("".join(f"Line {i}: the quick brown fox jumps over {i * 7919 % 1000} lazy dogs.\n" for i in range(900)))
    steps = -1

    def check(seen: str) -> list[str]:
        nonlocal steps
        if not (run / "last.pt").exists():
            return ["lost"] if steps >= 0 else []
        try:
            now = checkpoints.read(run / "last.pt")["step"]
        except Exception:
            return ["half"]
        wrong = ["lost"] if now < steps else ["new"] if now > steps else []
        steps = now
        return wrong

    return Program(["train", str(text), "-o", str(run), *SHORT.split()], check, renew=8)


PROGRAMS: dict[str, Callable[[Path], Program]] = {"chat": chat, "export": export, "pack": pack, "train": train}


def kill_often(name: str, n_kills: int, seed: int = 0) -> Counter[str]:
    """Run and kill; how often what went wrong, and "killed": the runs that had not ended by themselves."""
    dice, counts = random.Random(seed), Counter(killed=0, lost=0, half=0, rests=0)
    seconds = 0.0
    with tempfile.TemporaryDirectory() as parent:
        folder, program = Path(parent, "work"), None
        for n in range(n_kills):
            if program is None or n % program.renew == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                program = PROGRAMS[name](folder)
                if not seconds:
                    seconds = _seconds(program)
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                    program = PROGRAMS[name](folder)
            started = time.monotonic()
            killed, seen = _run(program, dice.uniform(0, seconds))
            if not killed:  # the first run may have been a slow one: moments behind the end would kill nothing
                seconds = min(seconds, time.monotonic() - started)
            counts["killed"] += killed
            counts.update(program.check(seen))
        if program is not None and program.outputs:
            for path in folder.iterdir():
                os.utime(path, (time.time() - STALE,) * 2)
            _run(program, None)
            counts["rests"] += len({path.name for path in folder.iterdir()} - set(program.outputs))
    return counts


def _run(program: Program, seconds: float | None) -> tuple[bool, str]:
    """Run in a fork of this process, which has imported everything; kill it after `seconds`. (killed, standard output)."""
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as shown, open(os.devnull, "w") as nowhere:
        given.write(program.stdin)
        given.seek(0)
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.environ.update(program.environment)
            for number, file in enumerate((given, shown, nowhere)):
                os.dup2(file.fileno(), number)
            status = 1
            try:
                status = cli.main(program.command)
                sys.stdout.flush()
            finally:
                os._exit(status)
        killed, end = False, time.monotonic() + (600 if seconds is None else seconds)
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if not killed and time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                killed = True
            time.sleep(0.001)
        assert ended[1] == 0 or killed, f"{program.command} fails by itself"
        shown.seek(0)
        return killed, shown.read()


def _seconds(program: Program) -> float:
    started = time.monotonic()
    _run(program, None)
    return time.monotonic() - started


if __name__ == "__main__":
    for word in sys.argv[1:]:
        name, _, n = word.partition(":")
        started, total = time.monotonic(), Counter(killed=0, lost=0, half=0, rests=0)
        for batch in range(0, int(n or 100), 20):
            total.update(kill_often(name, min(20, int(n or 100) - batch), seed=os.getpid() + batch))
            print(f"{name}: {batch + 20} runs, {dict(total)}, {time.monotonic() - started:.0f} s", flush=True)
