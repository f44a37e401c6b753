"""A Python for Windows, made on any system: a folder with python.exe, its library, and packages from wheels.

In: a folder. Out: the same, with a python.exe in it that is started as any other. CPython is the one that stubs for Windows
are composed of, found and checked by the same code (pocketlm.build.wheels); its own library is this Python's, and so is its
version. Needs pip. Knows nothing of wine, but for what wine 8 lacks and every Windows 10 has.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import images
import pefile

from pocketlm.build import wheels

VERSION = sys.version_info[:2]
LIBRARY = f"python{VERSION[0]}{VERSION[1]}.dll"
NOT_COPIED = (
    "test", "tests", "idlelib", "tkinter", "ensurepip", "lib2to3", "site-packages", "lib-dynload", "__pycache__", "config-*",
    "_sysconfigdata*",
)  # fmt: skip
# Windows has the first, msvc_runtime brings the second; with the third Python ends under wine, and does without
NOT_TAKEN = ("api-ms-win-", "vcruntime", "_wmi")


def compose(folder: Path, requirements: Iterable[str], constraints: Path) -> None:
    """Write `folder`, with python.exe and the packages `requirements`, which pip fetches."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "DLLs").mkdir(parents=True)
    shutil.copytree(sysconfig.get_path("stdlib"), folder / "Lib", ignore=shutil.ignore_patterns(*NOT_COPIED))
    cpython = [file for file in wheels.pinned("windows-x86_64", VERSION) if file.name in ("panda3d", "msvc_runtime")]
    for name, path in wheels.fetch(cpython).items():
        with zipfile.ZipFile(path) as wheel:
            for member in wheel.namelist():
                file = member.rpartition("/")[2].lower()
                if name == "msvc_runtime" and file.endswith(".dll"):
                    (folder / file).write_bytes(wheel.read(member))
                elif member.startswith("deploy_libs/") and file.endswith((".pyd", ".dll")) and not file.startswith(NOT_TAKEN):
                    (folder / ("" if file == LIBRARY else "DLLs") / file).write_bytes(wheel.read(member))
    (folder / "bcryptprimitives.dll").write_bytes(images.random_numbers())
    offered = pefile.PE(str(folder / LIBRARY), fast_load=True)
    offered.parse_data_directories([pefile.DIRECTORY_ENTRY["IMAGE_DIRECTORY_ENTRY_EXPORT"]])
    names = {symbol.name.decode() for symbol in offered.DIRECTORY_ENTRY_EXPORT.symbols if symbol.name}
    (folder / "python3.dll").write_bytes(images.stable_abi(LIBRARY, names))
    install(folder / "Lib/site-packages", requirements, constraints)
    (folder / "python.exe").write_bytes(images.python_exe(LIBRARY))


def install(folder: Path, requirements: Iterable[str], constraints: Path) -> None:
    """The wheels for Windows of what is required, and of what that requires, unpacked."""
    digits = f"{VERSION[0]}{VERSION[1]}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:",
               "--platform=win_amd64", f"--python-version={digits}", "--implementation=cp", f"--constraint={constraints}",
               *(f"--abi={abi}" for abi in (f"cp{digits}", "abi3", "none"))]  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run([*command, "--dest", temporary, *requirements], check=True)
        for path in sorted(Path(temporary).glob("*.whl")):
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(folder)
