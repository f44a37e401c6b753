"""What of this package a stub holds, and which platform this is. Knows no wheels and no executables."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

from pocketlm.build.contents import DATA, LEFT_OUT, PACKAGES, is_held
from pocketlm.errors import PocketlmError
from pocketlm.runtime.native.aot import PLATFORMS
from pocketlm.runtime.native.levels import host_machine

_SYSTEMS = {"linux": "linux", "win32": "windows", "darwin": "macos"}
QUIET = """\
import _signal  # of what Python is made of: nothing can be imported from the archive yet

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:  # Ctrl-C ends a start without a word
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
"""
ENTRY = """\
import os
import sys

try:
    try:
        from pocketlm.build.stub_entry import main
    except Exception as error:  # every stub has been started: a module that cannot be read now was damaged since
        name, reason = os.path.basename(sys.executable), str(error).partition("\\n")[0]
        sys.exit(f"{name}: was damaged or cut short on its way ({reason}); get it again, best in a zip archive")
    main()
except KeyboardInterrupt:  # a second one: the boot loader passes on what the terminal sends to both
    os._exit(130)
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


def _sources() -> list[Path]:
    """The files of the package that a stub depends on, relative to the package."""
    root = Path(__file__).parents[1]
    files = [file.relative_to(root) for package in PACKAGES for file in sorted((root / package).glob("*.py"))]
    return [file for file in files if file.as_posix() not in LEFT_OUT] + [Path(name) for name in DATA]


def copy_sources(folder: Path) -> None:
    """Write `folder`/pocketlm with the files of the package that a stub holds, and the scripts quiet.py and entry.py."""
    root = Path(__file__).parents[1]
    for file in _sources():
        if is_held(file.as_posix()):
            target = folder / "pocketlm" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / file, target)
    (folder / "quiet.py").write_text(QUIET)
    (folder / "entry.py").write_text(ENTRY)


def fingerprint() -> str:
    """A hash of everything that a stub is made of, in hexadecimal: two stubs with the same one are the same."""
    root, tables = Path(__file__).parents[1], sorted(Path(__file__).parent.glob("*.sha256"))
    digest = hashlib.sha256(sys.version.encode())
    for file in [*_sources(), *(table.relative_to(root) for table in tables)]:
        digest.update(file.as_posix().encode() + (root / file).read_bytes())
    return digest.hexdigest()
