"""Stubs, the executables that models are packed into: which platforms there are, and the stubs kept in the cache folder.

In: a platform's name. Out: the path of its stub, composed when it is first wanted. Knows no models; compose.py makes stubs,
contents.py says what goes in.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

from pocketlm.build.contents import BUILDERS, LEFT_OUT, PACKAGES
from pocketlm.errors import PocketlmError, UsageError
from pocketlm.runtime.native.aot import PLATFORMS
from pocketlm.runtime.native.code_cache import cache_folder
from pocketlm.runtime.native.levels import host_machine

SHORT_NAMES = {
    "windows": ("windows-x86_64",), "macos": ("macos-arm64", "macos-x86_64"), "linux": ("linux-x86_64",),
    "pi": ("linux-aarch64",), "all": tuple(PLATFORMS),
}  # fmt: skip
_SYSTEMS = {"linux": "linux", "win32": "windows", "darwin": "macos"}
ENTRY = """\
import os
import sys

try:
    from pocketlm.build.stub_entry import main
except Exception as error:  # every stub has been started: a module that cannot be read now was damaged since
    name, reason = os.path.basename(sys.executable), str(error).partition("\\n")[0]
    sys.exit(f"{name}: was damaged or cut short on its way ({reason}); get it again, best in a zip archive")
main()
"""


def host_platform() -> str:
    """The name of this system and processor in aot.PLATFORMS. Raises PocketlmError for one without stubs."""
    machine = host_machine()
    if sys.platform == "darwin" and machine == "aarch64":
        machine = "arm64"
    name = f"{_SYSTEMS.get(sys.platform, sys.platform)}-{machine}"
    if name not in PLATFORMS:
        raise PocketlmError(f"there are no stubs for {name}; known are {', '.join(PLATFORMS)}")
    return name


def platforms(name: str) -> tuple[str, ...]:
    """The platforms that --for NAME means. Raises UsageError."""
    if name not in (*SHORT_NAMES, *PLATFORMS):
        raise UsageError(f"--for {name}: known are {', '.join((*SHORT_NAMES, *PLATFORMS))}")
    return SHORT_NAMES.get(name, (name,))


def kept_stub(name: str, wheels: Path | None = None) -> Path:
    """The stub for a platform in the cache folder, composed if it is missing; `wheels` as for compose."""
    from pocketlm.build.compose import compose

    folder = cache_folder()
    if folder is None:
        raise PocketlmError("there is no cache folder for stubs; set POCKETLM_CACHE, or name a stub with --stub")
    path = folder / "stubs" / f"{name}-{_fingerprint()[:16]}"
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        print(f"composing a stub for {name}: half a minute", file=sys.stderr)
        compose(name, path, wheels)
        for old in path.parent.glob(f"{name}-*"):
            if old != path:
                old.unlink(missing_ok=True)
    return path


def _sources() -> list[Path]:
    """The package's files that a stub depends on, relative to the package."""
    root = Path(__file__).parents[1]
    files = [file.relative_to(root) for package in PACKAGES for file in sorted((root / package).glob("*.py"))]
    return [file for file in files if file.as_posix() not in LEFT_OUT]


def copy_sources(folder: Path) -> None:
    """`folder`/pocketlm and entry.py: what of this package a stub holds, however it is installed."""
    root = Path(__file__).parents[1]
    for file in _sources():
        if file.as_posix() not in BUILDERS:
            target = folder / "pocketlm" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / file, target)
    (folder / "entry.py").write_text(ENTRY)


def _fingerprint() -> str:
    """Stands for all that a stub depends on: another one, another stub."""
    root, tables = Path(__file__).parents[1], sorted(Path(__file__).parent.glob("*.sha256"))
    digest = hashlib.sha256(sys.version.encode())
    for file in [*_sources(), *(table.relative_to(root) for table in tables)]:
        digest.update(file.as_posix().encode() + (root / file).read_bytes())
    return digest.hexdigest()
