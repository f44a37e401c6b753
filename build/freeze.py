"""What PyInstaller puts into a stub: run inside PyInstaller's specification file, written by stub.py.

In: PyInstaller's own `Analysis`, `PYZ` and `EXE`, and the folder with the program's sources. Out: the executable. Knows
nothing about models. contents.py says what goes in and what stays out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocketlm.build.contents import EXCLUDED, FREEZERS, UNWANTED
from pocketlm.runtime.native.aot import KERNELS

BLAS = "blas"  # a folder of libraries that replace those of the same name
FORTRAN = ("libgfortran", "libquadmath")  # OpenBLAS's

Row = tuple[str, str, str]  # PyInstaller's: name in the archive, path, kind


def freeze(
    analyse: Callable[..., Any], archive: Callable[..., Any], executable: Callable[..., Any], folder: Path, icon: str | None
) -> None:
    """Analyse `folder`/entry.py and build `stub`; `folder` holds a package pocketlm and the kernels, too."""
    package = folder / "pocketlm"
    files = sorted(file.relative_to(folder) for file in package.rglob("*.py") if _inside(file, package) not in FREEZERS)
    found = analyse(
        [str(folder / "entry.py")], pathex=[str(folder)], hiddenimports=list(map(_module, files)), excludes=list(EXCLUDED),
        datas=[(str(folder / KERNELS), ".")], noarchive=False, optimize=2,
    )  # fmt: skip
    binaries = [row for row in found.binaries if not Path(row[0]).name.startswith(UNWANTED)]
    if sys.platform == "linux":
        binaries = [(name, _stripped(path, folder), kind) for name, path, kind in _without_openblas(binaries, folder)]
    datas = [row for row in found.datas if ".dist-info" not in row[0] and not row[0].endswith((".pyi", "py.typed"))]
    # PyInstaller's own scripts make `inspect` find sources, which are not there; they would run where nobody catches errors
    scripts = [row for row in found.scripts if not row[0].startswith("pyi_rth_")]
    executable(
        archive(found.pure), scripts, binaries, datas, [("X utf8=1", None, "OPTION")],
        name="stub", console=True, icon=icon or "NONE", upx=False, strip=False,
    )  # fmt: skip


def _inside(file: Path, package: Path) -> str:
    return file.relative_to(package).as_posix()


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _without_openblas(binaries: list[Row], folder: Path) -> list[Row]:
    """With the small library that stub.py has put there in place of OpenBLAS and its Fortran library: 28 MB less."""
    own = {path.name: str(path) for path in (folder / BLAS).glob("*")}
    kept = [row for row in binaries if not (own and Path(row[0]).name.startswith(FORTRAN))]
    return [(name, own.get(Path(name).name, path), kind) for name, path, kind in kept]


def _stripped(path: str, folder: Path) -> str:
    """A library without its symbols: Python's 23 MB become 6. Not NumPy's: strip breaks what auditwheel has edited."""
    if shutil.which("strip") is None or {"numpy", "numpy.libs", BLAS} & set(Path(path).parts):
        return path
    copy = folder / os.path.basename(path)
    shutil.copyfile(path, copy)
    subprocess.run(["strip", str(copy)], check=True)
    return str(copy)
