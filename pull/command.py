"""`pocketlm pull`: fetch a good small model by its name, or list those that have one."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from pocketlm.errors import FileError, PocketlmError, UsageError, did_you_mean
from pocketlm.pull.catalogue import CATALOGUE, QUANT, fetched, place
from pocketlm.pull.download import download, sweep
from pocketlm.pull.hub import BROKEN, Remote, endpoint, look_up, reason
from pocketlm.terminal_text import StatusLine, clock, print


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `pocketlm pull`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="a model of the list, which comes without a name")
    parser.add_argument("--quant", default=QUANT, metavar="Q", help=f"which of its files: {QUANT} (default), Q4_0, Q8_0, …")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: the cache folder, where NAME finds it")


def run(arguments: argparse.Namespace) -> int:
    """List, or fetch and say where the file is. Raises PocketlmError."""
    if arguments.name is None:
        print("\n".join(_listed()))
        return 0
    name, known = arguments.name, CATALOGUE.get(arguments.name)
    if known is None:
        raise UsageError(f"pull {name}: there is no such name{did_you_mean(name, CATALOGUE) or '; pocketlm pull lists them'}")
    target = arguments.output or place(name)
    if arguments.output and not target.absolute().parent.is_dir():
        raise FileError(target, "its folder does not exist", "make the folder first")
    if arguments.output and os.path.lexists(target):
        raise FileError(target, "is there already", "choose another name")
    try:
        remote = look_up(known.repository, arguments.quant)
    except BROKEN as error:
        raise PocketlmError(f"pull {name}: {endpoint()} cannot be reached ({reason(error)}); is there a network?") from None
    ours = dict(known.sha256).get(arguments.quant.upper())
    licence = f"licence {remote.licence}" if remote.licence else "its page states no licence"
    print(f"{remote.file}, {remote.n_bytes / 1e6:.1f} MB, of {known.repository}; {licence}", file=sys.stderr)
    progress = _Progress(name, remote)
    try:
        download(remote, target, ours or remote.sha256, progress.step)
    finally:
        progress.end()
    who = "that pocketlm knows it by" if ours else "that the server states (pocketlm knows none of its own)"
    if not arguments.output:
        sweep(target)
    print(f"whole: its SHA-256 is the one {who}", file=sys.stderr)
    print(target)
    return 0


def _listed() -> list[str]:
    width = max(map(len, CATALOGUE))
    here = {name: path for name in CATALOGUE if (path := fetched(name))}
    rows = [
        f"{name:{width}}  {known.parameters:>5}  {known.about}"
        + (f"  [here: {here[name].stat().st_size / 1e6:.0f} MB]" if name in here else "")
        for name, known in CATALOGUE.items()
    ]
    return [*rows, "", "pocketlm pull NAME fetches one from huggingface.co, and says before under which licence"]


class _Progress(StatusLine):
    def __init__(self, name: str, remote: Remote):
        super().__init__()
        self._name, self._n_bytes, self._shown_at = name, remote.n_bytes, 0.0
        self._began: tuple[float, int] | None = None

    def step(self, have: int) -> None:
        """So many bytes are there."""
        now = time.monotonic()
        self._began = self._began or (now, have)
        if now - self._shown_at < 0.2 and have < self._n_bytes:
            return
        text = f"{self._name}: {have / 1e6:.1f} of {self._n_bytes / 1e6:.1f} MB  {have / self._n_bytes:.0%}"
        speed = (have - self._began[1]) / max(now - self._began[0], 1e-3)
        if speed > 0 and now - self._began[0] > 1:
            text += f"  {speed / 1e6:.1f} MB/s  {clock((self._n_bytes - have) / speed)} left"
        self.show(text)
        self._shown_at = now
