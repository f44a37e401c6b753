"""A fresh Debian for arm64, as a Raspberry Pi has it: install, talk, pack, talk to what was packed, and parts of the tests.

    python tests/arm64/run.py [--short] [--root FOLDER] [--cpu cortex-a72] [--jobs 2]

Linux with debootstrap and qemu-user-static. Wheels only: what has no wheel for arm64 ends it. Nothing needs root rights but
debootstrap itself; programs of the other processor start by an entry of the kernel's that only they see (Linux 6.7 or newer).
The tests and the walk over all models (models.py, walk.py) at both levels run side by side, as many as there are cores here.
The transcript goes to stdout; exit status 0 means that every step did what it should.
"""

from __future__ import annotations

import argparse
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
PYTHON = "3.11"  # bookworm's; trixie has 3.13
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_17_aarch64", "manylinux_2_26_aarch64", "manylinux_2_28_aarch64")
PAGE = 0x4000  # a Raspberry Pi 5's
CPUS = {"dotprod": "cortex-a76", "neon": "cortex-a72"}  # what qemu is for a level: the plainest core that has it
SUITE = (  # a process each, the longest first
    "native_kernels", "native_executor", "sessions", "sliding_windows", "byte_caches experts",
    "memory tokenizer_memory doctor greedy native_selection",
)  # fmt: skip
LEFT_OUT = "guard_pages"  # ten minutes; test_native_aarch64.py has these kernels in front of such pages, under qemu too
PEERS = ["pytest", "gguf", "psutil"]  # that the tests want; there are others that have no wheel for arm64
ANSWER = ["generate", "small-talk", "-p", "Hi! How are", "-n", "12", "--temp", "0"]

_ELF = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
_MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
_ENTER = """
mount -t binfmt_misc none /proc/sys/fs/binfmt_misc && printf %s "$1" > /proc/sys/fs/binfmt_misc/register || exit 77
mount --rbind /proc "$2/proc" && mount --rbind /dev "$2/dev" && mount --bind "$3" "$2/mnt" || exit 77
root=$2; shift 3
exec chroot "$root" /usr/bin/env -i PATH=/usr/bin:/bin HOME=/mnt LANG=C.UTF-8 TMPDIR=/mnt/tmp QEMU_CPU="$QEMU_CPU" "$@"
"""


class Machine:
    """The root, and a folder that is /mnt in it."""

    def __init__(self, root: Path, shared: Path, cpu: str):
        self.root, self.shared, self.cpu = root, shared, cpu
        (shared / "tmp").mkdir(exist_ok=True)

    def run(self, *command: str, stdin: str = "") -> str:
        """Run a command there, and print it with what it says. Exits where it fails. Returns its standard output."""
        qemu = shutil.which("qemu-aarch64-static")
        if qemu is None:
            sys.exit("needs qemu-aarch64-static: apt install qemu-user-static")
        entry = f":pocketlm:M::{_ELF}:{_MASK}:{qemu}:F"
        words = ["unshare", "-U", "-r", "-m", "-n", "sh", "-c", _ENTER, "sh", entry, str(self.root), str(self.shared), *command]
        started = time.monotonic()
        found = subprocess.run(
            words, input=stdin, capture_output=True, text=True, check=False, env={**os.environ, "QEMU_CPU": self.cpu}
        )
        # in one piece: others may run beside it
        said = f"$ {' '.join(command)}\n{found.stdout}{found.stderr}[{self.cpu}, {time.monotonic() - started:.0f} s]\n"
        print(said, end="", flush=True)
        if found.returncode == 77:
            sys.exit("this system lets nobody register programs of another processor")
        if found.returncode:
            sys.exit(f"failed with {found.returncode}: {' '.join(command)}")
        return found.stdout


def make_root(root: Path) -> None:
    """Debian's packages unpacked, not configured: enough to run Python in."""
    if (root / "usr/bin/python3").exists():
        return
    if root.exists():
        sys.exit(f"{root}: is there already and holds no Python; name another folder with --root")
    if shutil.which("debootstrap") is None:
        sys.exit("needs debootstrap: apt install debootstrap")
    part = root.with_name(root.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    options = ["--arch=arm64", "--foreign", "--variant=minbase", "--include=python3,python3-venv"]
    subprocess.run(["debootstrap", *options, "bookworm", str(part)], check=True, stdout=subprocess.DEVNULL)
    for package in sorted((part / "var/cache/apt/archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(part)], check=True)
    for name in ("proc", "dev", "mnt"):
        (part / name).mkdir(exist_ok=True)
    part.rename(root)


def fetch_wheels(folder: Path, *more: str) -> None:
    """Our own wheel, and for arm64 those of all that it needs. Exits where something has none."""
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(folder), str(SOURCE)], check=True)
    own = next(folder.glob("pocketlm-*.whl"))
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    subprocess.run(
        [*pip, "download", "-q", "--only-binary", ":all:", *platforms, "--python-version", PYTHON, "--implementation", "cp",
         "-d", str(folder), str(own), *more], check=True,
    )  # fmt: skip


def misaligned(folder: Path) -> list[str]:
    """The libraries below a folder that a system with pages of 16 KB cannot load."""
    found = []
    for path in sorted(folder.rglob("*.so*")):
        data = path.read_bytes()
        if data[:4] != b"\x7fELF":
            continue
        table, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
        for at in range(table, table + size * count, size):
            kind, _, offset, address = struct.unpack_from("<IIQQ", data, at)
            if kind == 1 and (struct.unpack_from("<Q", data, at + 48)[0] < PAGE or (offset - address) % PAGE):
                found.append(str(path.relative_to(folder)))
                break
    return found


def check(machine: Machine, jobs: int) -> None:
    """The walk over all models at both levels, and the tests: side by side, the longest first."""
    folder, python = machine.shared, "/mnt/env/bin/python"
    shutil.copytree(SOURCE / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "models").mkdir()
    subprocess.run([sys.executable, str(SOURCE / "tests/arm64/models.py"), str(folder / "models")], check=True)
    pytest = [python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", f"not {LEFT_OUT}"]
    with ThreadPoolExecutor(jobs) as pool:
        parts = [
            pool.submit(Machine(machine.root, folder, cpu).run, python, "/mnt/tests/arm64/walk.py", "/mnt/models", level)
            for level, cpu in CPUS.items()
        ]
        parts += [pool.submit(machine.run, *pytest, *(f"/mnt/tests/test_{name}.py" for name in part.split())) for part in SUITE]
    if failed := [str(error) for part in parts if (error := part.exception())]:
        sys.exit("\n".join(failed))


def talk(machine: Machine, program: str, *options: str) -> None:
    if "Hi" not in (said := machine.run(program, *options, stdin="Hello\n/quit\n")) and len(said.split()) < 2:
        sys.exit(f"{program} does not answer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="install, talk, pack and talk; no tests")
    parser.add_argument("--root", type=Path, default=SOURCE / ".cache/arm64", help="where the Debian is kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many of the tests run side by side")
    parser.add_argument("--cpu", default="cortex-a76", help="what qemu is: cortex-a76 a Pi 5, cortex-a72 a Pi 4")
    arguments = parser.parse_args()
    make_root(arguments.root.resolve())
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        shared = Path(folder)
        machine = Machine(arguments.root.resolve(), shared, arguments.cpu)
        (shared / "wheels").mkdir()
        peers = [] if arguments.short else PEERS
        fetch_wheels(shared / "wheels", *peers)
        machine.run("uname", "-m")
        machine.run("python3", "-m", "venv", "--without-pip", "/mnt/env")  # copying pip takes two minutes there
        wheels = ["--no-index", "--find-links", "/mnt/wheels", "--only-binary", ":all:"]
        pip = next((machine.root / "usr/share/python-wheels").glob("pip-*.whl")).relative_to(machine.root)
        machine.run("/mnt/env/bin/python", f"/{pip}/pip", "install", "-q", "--no-compile", *wheels, "pocketlm", *peers)
        if wrong := misaligned(shared / "env"):
            sys.exit(f"not for pages of 16 KB: {', '.join(wrong)}")
        print(f"every library of {len(list((shared / 'env').rglob('*.so*')))} can be loaded with pages of 16 KB")
        pocketlm = "/mnt/env/bin/pocketlm"
        machine.run(pocketlm, "doctor")
        said = machine.run(pocketlm, *ANSWER)
        here = subprocess.run([sys.executable, "-m", "pocketlm", *ANSWER], capture_output=True, text=True, check=True).stdout
        if said != here:
            sys.exit(f"another answer than here: {here!r}")
        talk(machine, pocketlm, "chat", "--no-save")
        stub = [sys.executable, "-m", "pocketlm", "stub", "--for", "linux-aarch64", "-o", str(shared / "stub")]
        subprocess.run(stub, check=True)
        machine.run(pocketlm, "pack", "small-talk", "--stub", "/mnt/stub", "-o", "/mnt/friend")
        talk(machine, "/mnt/friend")
        if not arguments.short:
            check(machine, arguments.jobs)
    print("all steps done")


if __name__ == "__main__":
    main()
