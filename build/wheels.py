"""What a stub is composed of, fetched once: wheels from pip's index, and for Linux some packages of Debian.

In: a platform and a version of Python. Out: the paths of the files, in the cache folder or in a folder of the user's. Knows
where files come from, not what is in them. Two tables beside this file list every file with its hash, as sha256sum does:
`wheels.sha256` (fetched by pip, as pip is configured) and `debian.sha256` (a release, and a path in its archive).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketlm.errors import FileError, PocketlmError, refused
from pocketlm.runtime import container
from pocketlm.runtime.atomic import replacing_file
from pocketlm.runtime.native.code_cache import kept_folder
from pocketlm.terminal_text import StatusLine

Python = tuple[int, int]  # 3, 11
PYTHONS: tuple[Python, ...] = ((3, 10), (3, 11), (3, 12), (3, 13), (3, 14))
_TAGS = {  # how wheels spell a platform
    "windows-x86_64": "win_amd64", "macos-arm64": r"macosx_\w+_(arm64|universal2)",
    "macos-x86_64": r"macosx_\w+_(x86_64|universal2)", "linux-x86_64": r"manylinux\w+_x86_64",
    "linux-aarch64": r"manylinux\w+_aarch64",
}  # fmt: skip
_RELEASES = {"bookworm": (3, 11), "trixie": (3, 13)}  # Debian's, each with one version of Python
_MACHINES = {"linux-x86_64": "amd64", "linux-aarch64": "arm64"}
# The first loses a package when its next version comes out, the second never
_ARCHIVES = ("http://deb.debian.org/debian/", "http://snapshot.debian.org/archive/debian/20261120T000000Z/")


class Unreachable(PocketlmError):
    """A file cannot be fetched, nor is it in the cache folder."""


@dataclass(frozen=True)
class Pinned:
    """A file that may be fetched, and its hash."""

    name: str  # "numpy"; of Debian "libpython3.11-stdlib"
    version: str
    file: str  # its name
    sha256: str
    source: str = ""  # Debian's: release, and folder in the archive

    @property
    def is_cpython(self) -> bool:
        """Whether it holds CPython, or a library of Debian's that CPython needs."""
        return bool(self.source) or self.name == "panda3d"

    def fits(self, platform: str, python: Python) -> bool:
        """Whether it is for `platform` and that version of CPython, by the tags in its name."""
        if self.source:
            return _RELEASES[self.source.partition("/")[0]] == python and self.file.endswith(f"_{_MACHINES.get(platform)}.deb")
        *_, interpreter, abi, systems = self.file.removesuffix(".whl").split("-")
        if systems != "any" and not any(re.fullmatch(_TAGS[platform], system) for system in systems.split(".")):
            return False
        return interpreter == f"cp{python[0]}{python[1]}" or (interpreter, abi) == ("py3", "none")


def pinned(platform: str, python: Python) -> list[Pinned]:
    """The files for a stub for `platform`, with those of CPython if there are any for that version and platform."""
    return list({file.name: file for file in _table() if file.fits(platform, python)}.values())


def version_for(platform: str, python: Python, host: str) -> Python:
    """The version of CPython for a stub for `platform`: `python` if it can be fetched, else, on Linux, one that can be fetched
    for `host`, too, where it compiles the bytecode. Raises PocketlmError if there is none.
    """
    candidates = [version for version in PYTHONS if any(file.is_cpython for file in pinned(platform, version))]
    # Where CPython is a wheel's, Python's own modules are this Python's
    others = [version for version in candidates if any(file.is_cpython for file in pinned(host, version))]
    if python not in candidates and not (platform.startswith("linux") and others):
        usable = ", ".join(f"{major}.{minor}" for major, minor in candidates)
        raise PocketlmError(f"executables for {platform} are composed by Python {usable}; this is {python[0]}.{python[1]}")
    return python if python in candidates else others[0]


def fetch(files: Sequence[Pinned], folder: Path | None = None) -> dict[str, Path]:
    """Paths by name. Files are looked for in `folder`; without one, in the cache folder, and missing ones are fetched.

    A file appears whole, with the right SHA-256, or not at all; after an interruption the rest is fetched. Raises FileError for
    a file with other content or missing in `folder`, PocketlmError for one that cannot be fetched.
    """
    own = folder or kept_folder("wheels")
    missing = [] if folder else [file for file in files if not (own / file.file).exists()]
    for number, file in enumerate(missing, 1):
        with StatusLine() as line:
            line.show(f"fetching {number} of {len(missing)}: {file.file}", instead=True)
            _fetch(file, own)
    for file in files:
        _check(own / file.file, file)
    return {file.name: own / file.file for file in files}


def _table() -> Iterator[Pinned]:
    for table in ("wheels.sha256", "debian.sha256"):
        for line in Path(__file__).with_name(table).read_text(encoding="ascii").splitlines():
            sha256, _, path = line.partition("  ")
            source, _, file = path.rpartition("/")
            name, version, *_ = file.split("_" if source else "-")
            yield Pinned(name, version, file, sha256, source)


def _fetch(file: Pinned, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as temporary:
        got = Path(temporary, file.file)
        (_from_debian if file.source else _by_pip)(file, got)
        _check(got, file)
        with replacing_file(folder / file.file, got.stat().st_size) as part:
            got.rename(part)


def _by_pip(file: Pinned, to: Path) -> None:
    """Let pip, as the user has configured it, download exactly this file: by its hash and the tags in its name."""
    name, version, interpreter, abi, systems = file.file.removesuffix(".whl").split("-")
    wanted = to.with_name("wanted.txt")
    wanted.write_text(f"{name}=={version} --hash=sha256:{file.sha256}\n", encoding="ascii")
    tags = [word for system in systems.split(".") for word in ("--platform", system)]
    digits = interpreter.removeprefix("cp") if interpreter.startswith("cp") else f"3{sys.version_info.minor}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--implementation", interpreter[:2], "--python-version", digits, "--abi", abi, *tags,
               "--require-hashes", "--requirement", str(wanted), "--dest", str(to.parent)]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode or not to.exists():
        lines = done.stdout.splitlines() or ["it said nothing"]
        said = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines
        raise Unreachable(f"pip could not fetch {file.file} ({said[-1].strip()}); try again, or name a folder with --wheels")


def _from_debian(file: Pinned, to: Path) -> None:
    folder, problem = file.source.partition("/")[2], ""
    for archive in _ARCHIVES:
        try:
            with urllib.request.urlopen(f"{archive}{folder}/{file.file}", timeout=60) as source, open(to, "wb") as target:
                shutil.copyfileobj(source, target)
            return
        except OSError as error:  # a server's refusal is one, too
            problem = str(error)
    raise Unreachable(f"could not fetch {file.file} from Debian's archive ({problem}); try again, or --wheels")


def _check(path: Path, file: Pinned) -> None:
    with refused(path, "it is needed to compose an executable"), open(path, "rb") as data:
        found = container.digest(data, 0, path.stat().st_size)
    if found.hex() != file.sha256:
        raise FileError(path, "is not the file that pocketlm knows by this name (its SHA-256 differs)", "remove it")
