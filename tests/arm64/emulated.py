"""Programs of a Debian for arm64, run here under qemu, that end with the program that started them, however it ends.

In: the folder of the root, and one that both sides share. Where the system allows it (Linux 6.7 or newer, no rights needed), a
program sees the root as its own, and the programs that it starts are those of the other processor, too. Elsewhere qemu looks
files up in the root, which is enough for a program that starts no other. Knows nothing of pocketlm.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of the tests
from find_qemu import entry, find_qemu

# The shell is the first process of a namespace of its own: where it is killed, all that it has started are
ALONE = ("unshare", "--user", "--map-root-user", "--mount", "--net", "--pid", "--fork", "--kill-child", "sh", "-c")
_ENTER = """
mount -t binfmt_misc none /proc/sys/fs/binfmt_misc && printf %s "$1" > /proc/sys/fs/binfmt_misc/register || exit 77
mount -t proc none "$2/proc" && mount --rbind /dev "$2/dev" && mount --bind "$3" "$2/mnt" || exit 77
root=$2; shift 3
chroot "$root" /usr/bin/env -i "$@"
exit $?
"""


class Processes:
    """Those that run. `end` kills them and whatever they have started; where this process is killed, the kernel does."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._ended, self._lock = False, threading.Lock()

    def run(self, *command: str | Path, stdin: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """What the program said and its status. To be called in a thread that lives as long as the program."""
        with self._lock:
            if self._ended:
                sys.exit("ended")
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *map(str, command)], env=env, text=True, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            self._running.add(process)
        try:
            said = process.communicate(stdin)
        except BaseException:
            self._kill(process)
            process.communicate()  # until none of them is left that could write
            raise
        finally:
            self._running.discard(process)
        return subprocess.CompletedProcess([*map(str, command)], process.returncode, *said)

    def end(self) -> None:
        with self._lock:
            self._ended = True
        for process in list(self._running):
            self._kill(process)

    def _kill(self, process: subprocess.Popen[str]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


PROCESSES = Processes()


def call(*command: str | Path) -> str:
    """Run a program of this machine; what it wrote. Exits where it fails."""
    found = PROCESSES.run(*command)
    if found.returncode:
        sys.exit(f"{found.stdout}{found.stderr}failed with {found.returncode}: {' '.join(found.args)}")
    return found.stdout


class Machine:
    """The root and the shared folder, whose path is `place` for a program there. `cpu`: what qemu is; `page`: bytes a page."""

    def __init__(self, root: Path, shared: Path, cpu: str, is_own: bool | None = None, page: int = 4096):
        self.qemu = find_qemu()
        if self.qemu is None:
            sys.exit("needs a static qemu-aarch64: apt install qemu-user-static, from Debian 13 on qemu-user")
        self.root, self.shared, self.cpu, self.page, self.is_own = root, shared, cpu, page, True
        (shared / "tmp").mkdir(exist_ok=True)
        self.is_own = PROCESSES.run(*self._words("true")).returncode == 0 if is_own is None else is_own
        self.place = "/mnt" if self.is_own else str(shared)

    def of(self, cpu: str = "", page: int = 0) -> Machine:
        """The same with another processor, or other pages."""
        return Machine(self.root, self.shared, cpu or self.cpu, self.is_own, page or self.page)

    def run(self, *command: str, stdin: str = "") -> str:
        """Run a command there, and print it with what it says. Exits where it fails. Returns its standard output."""
        started = time.monotonic()
        found = PROCESSES.run(*self._words(*command), stdin=stdin)
        took = f"[{self.cpu}, pages of {self.page >> 10} KB, {time.monotonic() - started:.0f} s]"
        # in one piece: others may run beside it
        said = f"$ {' '.join(command)}\n{found.stdout}{found.stderr}{took}\n"
        print(said, end="", flush=True)
        if found.returncode:
            sys.exit(f"failed with {found.returncode}: {' '.join(command)}")
        return found.stdout

    def _words(self, *command: str) -> list[str | Path]:
        home = Path("/mnt" if self.is_own else self.shared)
        clean = ["PATH=/usr/bin:/bin", f"HOME={home}", "LANG=C.UTF-8", f"TMPDIR={home / 'tmp'}"]
        clean += [f"QEMU_CPU={self.cpu}", f"QEMU_PAGESIZE={self.page}"]
        assert self.qemu
        if self.is_own:
            return [*ALONE, _ENTER, "sh", entry(self.qemu), self.root, self.shared, *clean, *command]
        program = self.root / "usr/bin" / command[0]  # the second alone where that is a whole path
        first, _, _ = program.read_bytes().partition(b"\n")
        script = [first[2:].decode()] if first.startswith(b"#!") else []
        return ["env", "-i", *clean, f"QEMU_LD_PREFIX={self.root}", self.qemu, *script, program, *command[1:]]


def side_by_side(jobs: int, works: Iterable[Callable[[], object]]) -> list[BaseException]:
    """Do it all, so many at a time; what went wrong. Whoever is interrupted meanwhile ends PROCESSES."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            return [error for part in [pool.submit(work) for work in works] if (error := part.exception())]
        except BaseException:
            PROCESSES.end()
            raise


def with_folder(work: Callable[[Path], None]) -> None:
    """Work in a folder that goes afterwards, also where a signal ends this process meanwhile."""

    def leave(number: int, _: object) -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)  # once is enough
        sys.exit(128 + number)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, leave)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work(Path(folder))
