"""Builds the stub, the executable that models are packed into, for the platform this runs on; and keeps stubs.

In: the sources of this package and PyInstaller. Out: an executable without a model, in the user's cache folder or where
asked for. Knows no models. contents.py says what goes in.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pocketlm import __version__
from pocketlm.build import blas
from pocketlm.build.contents import BUILDERS, FREEZERS, FROZEN, LEFT_OUT, PACKAGES
from pocketlm.build.freeze import BLAS
from pocketlm.errors import PocketlmError, UsageError
from pocketlm.runtime.atomic import replacing_file
from pocketlm.runtime.native.aot import KERNELS, PLATFORMS, build_images
from pocketlm.runtime.native.code_cache import cache_folder
from pocketlm.runtime.native.kernels import module_texts
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
_SPECIFICATION = """\
from pathlib import Path
from pocketlm.build.freeze import freeze
freeze(Analysis, PYZ, EXE, Path({folder!r}), {icon!r})
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
    """The stub for a platform in the cache folder, built or composed if it is missing; `wheels` as for compose."""
    from pocketlm.build.compose import compose

    folder = cache_folder()
    if folder is None:
        raise PocketlmError("there is no cache folder for stubs; set POCKETLM_CACHE, or name a stub with --stub")
    path = folder / "stubs" / f"{name}-{_fingerprint()[:16]}"
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if name == host_platform():
            build_stub(path)
        else:
            print(f"composing a stub for {name}: a minute", file=sys.stderr)
            compose(name, path, wheels)
        for old in path.parent.glob(f"{name}-*"):
            if old != path:
                old.unlink(missing_ok=True)
    return path


def build_stub(out: Path, icon: str | None = None) -> Path:
    """Build the stub for this platform; its path. Raises PocketlmError when PyInstaller is missing or fails."""
    if importlib.util.find_spec("PyInstaller") is None:
        raise PocketlmError("building a stub needs PyInstaller: pip install 'pocketlm[build]'")
    print("building a stub: a minute or two", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="pocketlm-stub-") as temporary:
        folder = Path(temporary, "tree")
        copy_sources(folder)
        build_images(folder / KERNELS, host_platform(), module_texts, __version__)
        _write_blas(folder / BLAS)
        built = _run_pyinstaller(folder, Path(temporary), icon)
        with replacing_file(out, built.stat().st_size) as part:
            shutil.copyfile(built, part)
            part.chmod(0o755)
    return out


def _sources() -> list[Path]:
    """The package's files that a stub depends on, relative to the package."""
    root = Path(__file__).parents[1]
    files = [file.relative_to(root) for package in PACKAGES for file in sorted((root / package).glob("*.py"))]
    return [file for file in files if file.as_posix() not in LEFT_OUT]


def copy_sources(folder: Path) -> None:
    """`folder`/pocketlm and entry.py: PyInstaller finds nothing else of this package, however it is installed."""
    root = Path(__file__).parents[1]
    for file in _sources():
        if file.as_posix() not in BUILDERS - FREEZERS:
            target = folder / "pocketlm" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / file, target)
    (folder / "entry.py").write_text(ENTRY)


def _write_blas(folder: Path) -> None:
    """What takes the place of NumPy's OpenBLAS, under its name; nothing where there is none, or one of another kind."""
    import numpy

    packages = Path(numpy.__file__).parents[1]
    users = [*packages.glob("numpy/_core/_multiarray_umath*.so"), *packages.glob("numpy/linalg/_umath_linalg*.so")]
    folder.mkdir()
    if sys.platform == "linux":
        for library in packages.glob("numpy.libs/*openblas*"):
            if blas.is_replaceable(library, users):
                (folder / library.name).write_bytes(blas.library_for(library, users, host_machine()))


def _run_pyinstaller(folder: Path, temporary: Path, icon: str | None) -> Path:
    specification = temporary / "stub.spec"
    text = _SPECIFICATION.format(folder=str(folder), icon=icon and str(Path(icon).resolve()))
    specification.write_text(text, encoding="utf-8")
    # the same sources give the same stub: hashes and times are fixed
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONHASHSEED": "1", "SOURCE_DATE_EPOCH": "315532800",
                   "PYINSTALLER_CONFIG_DIR": str(temporary / "config")}  # fmt: skip
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level", "ERROR",
               "--distpath", str(temporary / "dist"), "--workpath", str(temporary / "work"), str(specification)]  # fmt: skip
    result = subprocess.run(command, cwd=temporary, env=environment, capture_output=True, text=True, errors="replace")
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise PocketlmError(f"PyInstaller could not build the stub: {lines[-1]}")
    return next(path for path in (temporary / "dist").iterdir() if path.stem == "stub")


def _fingerprint() -> str:
    """Stands for all that a stub depends on: another one, another stub."""
    root, versions = Path(__file__).parents[1], [importlib.metadata.version(name) for name in FROZEN]
    digest = hashlib.sha256(f"{sys.version} {platform.machine()} {versions}".encode())
    for file in [*_sources(), *sorted(Path("build", table.name) for table in (root / "build").glob("*.sha256"))]:
        digest.update(file.as_posix().encode() + (root / file).read_bytes())
    return digest.hexdigest()
