"""A fresh Debian for arm64, as a Raspberry Pi has it: install, talk, pack, talk to what was packed, and parts of the tests.

    python tests/arm64/run.py [--short] [--root FOLDER] [--cpu cortex-a72] [--jobs 2]

Linux with debootstrap and qemu-user-static (from Debian 13 on qemu-user), and SmolLM2 installed. Wheels only: what has no
wheel for arm64 ends it. Nothing needs root rights but debootstrap itself. The tests and the walk over all models (models.py,
walk.py) at both levels run side by side, as many as there are cores here. The transcript goes to stdout; exit status 0 means
that every step did what it should.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import struct
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from emulated import Machine, call, side_by_side, with_folder

from pocketlm.model import find_model

SOURCE = Path(__file__).resolve().parents[2]
PACKAGES = SOURCE / ".cache/packages"  # of Debian, kept for another root
PYTHON = "3.11"  # bookworm's; trixie has 3.13
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_17_aarch64", "manylinux_2_26_aarch64", "manylinux_2_28_aarch64")
PAGE = 0x4000  # a Raspberry Pi 5's
CPUS = {"dotprod": "cortex-a76", "neon": "cortex-a72"}  # what qemu is for a level: the plainest core that has it
# ten minutes; test_native_aarch64.py has these kernels in front of such pages, under qemu too
MOST = "not guard_pages"
SUITE = (  # a process each, the longest first, and which of their tests
    ("sliding_windows", "not lfm2"), ("sliding_windows", "lfm2"), ("byte_caches experts", MOST),
    ("sessions session_files", MOST),
    ("memory tokenizer_memory doctor greedy native_selection", MOST), ("bursts native_executor", MOST),
    ("native_kernels", MOST),
)  # fmt: skip
SHORT_SUITE = (("vectors chat_templates native_kernels", "test_vectors or templates or (overflow and (Q4_0 or Q8_0))"),)
FEW = ("Llama, Q4_0", "Llama, Q8_0", "Llama, F16, cache of q8", "experts, Q4_K", "gemma3, F32")  # of models.py
PEERS = ["pytest", "gguf", "psutil"]  # that the tests want; there are others that have no wheel for arm64
ANSWER = ["generate", "small-talk", "-p", "Hi! How are", "-n", "12", "--temp", "0"]


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
    PACKAGES.mkdir(parents=True, exist_ok=True)
    options = ["--arch=arm64", "--foreign", "--variant=minbase", "--include=python3,python3-venv", f"--cache-dir={PACKAGES}"]
    call("debootstrap", *options, "bookworm", part)
    for package in sorted((part / "var/cache/apt/archives").glob("*.deb")):
        call("dpkg-deb", "-x", package, part)
    for name in ("proc", "dev", "mnt"):
        (part / name).mkdir(exist_ok=True)
    part.rename(root)


def fetch_wheels(folder: Path, *more: str) -> None:
    """Our own wheel, and for arm64 those of all that it needs. Exits where something has none."""
    pip, copy = [sys.executable, "-m", "pip"], folder / "source"  # a build writes into its folder, which others may be reading
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns(".*", "tests", "*.egg-info", "__pycache__"))
    call(*pip, "wheel", "-q", "--no-deps", "-w", folder, copy)
    shutil.rmtree(copy)
    own = next(folder.glob("pocketlm-*.whl"))
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    call(
        *pip, "download", "-q", "--only-binary", ":all:", *platforms, "--python-version", PYTHON, "--implementation", "cp",
        "-d", folder, own, *more,
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


def check(machine: Machine, jobs: int, short: bool) -> None:
    """The walk over models at both levels, and the tests: side by side, the longest first."""
    folder, python = machine.shared, f"{machine.place}/env/bin/python"
    shutil.copytree(SOURCE / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "models").mkdir()
    made = call(sys.executable, SOURCE / "tests/arm64/models.py", folder / "models", *(FEW if short else ()))
    print(made, end="", flush=True)
    walk = [python, f"{machine.place}/tests/arm64/walk.py", f"{machine.place}/models"]
    works = [partial(machine.of(cpu).run, *walk, level) for level, cpu in CPUS.items()]
    for names, chosen in SHORT_SUITE if short else SUITE:
        files = [f"{machine.place}/tests/test_{name}.py" for name in names.split()]
        works.append(partial(machine.run, python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", chosen, *files))
    if failed := side_by_side(jobs, works):
        sys.exit("\n".join(map(str, failed)))


def talk(machine: Machine, *command: str, asked: str = "Hello", expected: str = "") -> None:
    said = machine.run(*command, stdin=f"{asked}\n/quit\n")
    if expected not in said or len(said.split()) < 2:
        sys.exit(f"{command[0]} does not answer")


def install(machine: Machine, *more: str) -> str:
    """Into an environment of its own, from wheels alone; the path of the program there."""
    shared, place = machine.shared, machine.place
    (shared / "wheels").mkdir()
    fetch_wheels(shared / "wheels", *more)
    pip = next((machine.root / "usr/share/python-wheels").glob("pip-*.whl"))
    shutil.copy(pip, shared)
    machine.run("uname", "-m")
    machine.run("python3", "-m", "venv", "--without-pip", f"{place}/env")  # copying pip takes two minutes there
    wheels = ["--no-index", "--find-links", f"{place}/wheels", "--only-binary", ":all:"]
    pip = [f"{place}/env/bin/python", f"{place}/{pip.name}/pip"]
    machine.run(*pip, "install", "-q", "--no-compile", *wheels, "pocketlm", *more)
    if wrong := misaligned(shared / "env"):
        sys.exit(f"not for pages of 16 KB: {', '.join(wrong)}")
    print(f"every library of {len(list((shared / 'env').rglob('*.so*')))} can be loaded with pages of 16 KB", flush=True)
    return f"{place}/env/bin/pocketlm"


def use(machine: Machine, pocketlm: str) -> None:
    """Talk, pack, and talk to what was packed."""
    large = machine.of(page=PAGE)
    large.run(pocketlm, "doctor")
    here = call(sys.executable, "-m", "pocketlm", *ANSWER)
    if any(there.run(pocketlm, *ANSWER) != here for there in (machine, large)):
        sys.exit(f"another answer than here: {here!r}")
    talk(machine, pocketlm, "chat", "--no-save")
    shutil.copy(find_model("smollm2"), machine.shared / "smollm2.gguf")
    options = ["--no-save", "--temp", "0", "--max-tokens", "16"]
    asked = "What is the capital of France?"
    talk(machine, pocketlm, "chat", f"{machine.place}/smollm2.gguf", *options, asked=asked, expected="Paris")
    call(sys.executable, "-m", "pocketlm", "stub", "--for", "linux-aarch64", "-o", machine.shared / "stub")
    friend = f"{machine.place}/friend"
    pack = ["pack", "small-talk", "--stub", f"{machine.place}/stub", "-o", friend]
    if machine.is_own:
        machine.run(pocketlm, *pack)
        for there in (machine, large):
            talk(there, friend)
    else:
        print("nothing packed: a packed program starts itself once more, and this system starts none of another processor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few models and tests: some minutes")
    parser.add_argument("--root", type=Path, default=SOURCE / ".cache/arm64", help="where the Debian is kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many of the tests run side by side")
    parser.add_argument("--cpu", default="cortex-a76", help="what qemu is: cortex-a76 a Pi 5, cortex-a72 a Pi 4")
    parser.add_argument("--qemu-alone", action="store_true", help="as where nobody may register programs of another processor")
    arguments = parser.parse_args()

    def work(folder: Path) -> None:
        make_root(root := arguments.root.resolve())
        machine = Machine(root, folder, arguments.cpu, False if arguments.qemu_alone else None)
        use(machine, install(machine, *PEERS))
        check(machine, arguments.jobs, arguments.short)

    with_folder(work)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"all steps done, {(used.ru_utime + used.ru_stime) / 60:.0f} minutes of processor time")


if __name__ == "__main__":
    main()
