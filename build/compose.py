"""A stub for any platform, put together on any platform from files that exist already, and kept in the cache folder.

In: the name of a platform. Out: an executable without a model, the same bytes for the same inputs. Runs nothing of the target.

Boot loader and loader scripts are PyInstaller's. CPython comes from panda3d's wheels (Windows, macOS) or Debian's packages
(Linux), other packages from their wheels. The kernels are compiled here, for every instruction-set level. The standard library
is that of the Python that composes, because the bytecode must be of the version that will run it; Debian's packages, which do
not exist for every version, bring their own. On Linux, for Linux, CPython is the one that composes, too, unless its library is
large; such a stub needs a C library as new as this computer's.
"""

from __future__ import annotations

import io
import os
import re
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pocketlm import __version__
from pocketlm.build import archive_writer, blas, bytecode, elf, licences, macho, modules, pe, wheels
from pocketlm.build.archive_writer import Code, Entry
from pocketlm.build.contents import COMPILED_IN, DATA, ENCODINGS, EXCLUDED, REPLACED
from pocketlm.build.sources import copy_sources, fingerprint, host_platform
from pocketlm.errors import FileError, PocketlmError, UsageError, refused
from pocketlm.runtime.atomic import replacing_file
from pocketlm.runtime.native.aot import KERNELS, PLATFORMS, build_images
from pocketlm.runtime.native.code_cache import kept_folder
from pocketlm.runtime.native.kernels import module_texts
from pocketlm.terminal_text import print

SHORT_NAMES = {
    "windows": ("windows-x86_64",), "macos": ("macos-arm64", "macos-x86_64"), "linux": ("linux-x86_64",),
    "pi": ("linux-aarch64",), "all": tuple(PLATFORMS),
}  # fmt: skip
PYTHON = sys.version_info[:2]
# Modules that Python needs before it can read the archive (PyInstaller/compat.py, PY3_BASE_MODULES), with all below them
_BASE = (
    "_collections_abc", "_weakrefset", "abc", "codecs", "collections", "copyreg", "encodings", "enum", "functools",
    "genericpath", "heapq", "io", "keyword", "linecache", "locale", "ntpath", "operator", "os", "posixpath", "re", "reprlib",
    "sre_compile", "sre_constants", "sre_parse", "stat", "traceback", "types", "warnings", "weakref",
)  # fmt: skip
_BOOT = ("struct", "_struct", "zlib")  # what reads the archive
_LOADER = ("pyimod01_archive", "pyimod02_importers", "pyimod03_ctypes")
_MISSING_ON_WINDOWS = re.compile("vcruntime|msvcp|vcomp|concrt|python", re.IGNORECASE)
_FORTRAN = ("libgfortran", "libquadmath")  # OpenBLAS's
_GLIBC = re.compile(r"(ld-linux|lib(c|m|dl|pthread|rt|util|resolv|crypt|nsl)\.so)")
# Bytes of this Python as a library: Debian's 3.11 has 7.7 million; its 3.14, with a compiler in it that is off, 8.6
_LARGEST_OWN = 8_000_000
_DEBIANS_GLIBC = (2, 36)
_SYSTEM_LIBRARIES = ("/lib/*-linux-gnu", "/usr/lib/*-linux-gnu", "/lib64", "/usr/lib64", "/usr/local/lib", "/usr/lib", "/lib")


@dataclass(frozen=True)
class _Layout:
    """Where things are in the wheels and packages, and in the archive."""

    python: wheels.Python
    boot: str  # the boot loader in PyInstaller's wheel
    library: str  # Python, in the archive
    compiled: str  # folder for compiled modules of Python's own library, in the archive
    separator: str = "/"


def _layout(platform: str, python: wheels.Python) -> _Layout:
    major, minor = python
    dynload = f"python{major}.{minor}/lib-dynload/"
    files = {
        "windows-x86_64": ("Windows-64bit-intel/run.exe", f"python{major}{minor}.dll", "", "\\"),
        "linux-x86_64": ("Linux-64bit-intel/run", f"libpython{major}.{minor}.so.1.0", dynload),
        "linux-aarch64": ("Linux-64bit-arm/run", f"libpython{major}.{minor}.so.1.0", dynload),
        "macos-arm64": ("Darwin-64bit/run", f"libpython{major}.{minor}.dylib", dynload),
        "macos-x86_64": ("Darwin-64bit/run", f"libpython{major}.{minor}.dylib", dynload),
    }
    return _Layout(python, *files[platform])


def platforms(name: str) -> tuple[str, ...]:
    """The platforms that --for NAME means. Raises UsageError."""
    if name not in (*SHORT_NAMES, *PLATFORMS):
        raise UsageError(f"--for {name}: known are {', '.join((*SHORT_NAMES, *PLATFORMS))}")
    return SHORT_NAMES.get(name, (name,))


def kept_stub(name: str, wheel_folder: Path | None = None) -> Path:
    """The stub for a platform in the cache folder; composes it if it is missing. `wheel_folder`: as of compose.

    Raises PocketlmError if others may write to that folder: they could put a program there that friends would run.
    """
    path = kept_folder("stubs") / f"{name}-{fingerprint()[:16]}"
    if not path.exists():
        print(f"composing a stub for {name}: half a minute", file=sys.stderr)
        compose(name, path, wheel_folder)
        for old in path.parent.glob(f"{name}-*"):
            if old != path:
                with suppress(OSError):  # on Windows, one that is being read
                    old.unlink()
    return path


def compose(platform: str, out: Path, wheel_folder: Path | None = None) -> Path:
    """Write the stub for `platform` (a name in aot.PLATFORMS); returns its path.

    `wheel_folder`: a folder with the wheels, in place of the cache folder and the network. PocketlmError: a file cannot be
    fetched, or there is no CPython of this version for the platform; FileError: a file has another hash than the known one.
    """
    host = host_platform()
    is_own = platform == host and _own_library(_layout(host, PYTHON).library) is not None
    python = PYTHON if is_own else wheels.version_for(platform, PYTHON, host)
    layout = _layout(platform, python)
    wanted = [file for file in wheels.pinned(platform, python) if not (is_own and file.is_cpython)]
    fetched = wheels.fetch(wanted, wheel_folder)
    for_host = [] if python == PYTHON else [file for file in wheels.pinned(host, python) if file.is_cpython]
    with tempfile.TemporaryDirectory(prefix="pocketlm-compose-") as temporary:
        for_compiler = wheels.fetch(for_host, wheel_folder)
        with refused(Path(temporary).parent, "make room there, or name another folder in TMPDIR", "cannot be filled"):
            tree = _unpack(fetched, Path(temporary), is_own, python)
            compiler = _compiler(for_compiler, Path(temporary), _layout(host, python).library)
        entries = _entries(platform, layout, tree, fetched, compiler)
        program = archive_writer.program(entries, python, layout.library)
        boot = _smaller((tree.loader / "PyInstaller/bootloader" / layout.boot).read_bytes(), platform)
        with replacing_file(out, len(boot) + len(program)) as part:
            with open(part, "x+b") as file:
                file.write(boot + program)
                if platform.startswith("macos"):
                    macho.sign(file)
            part.chmod(0o755)
    return out


# ---- the files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tree:
    """What was fetched, unpacked."""

    own: Path  # pocketlm's sources and the entry script
    packages: Path  # NumPy and so on
    library: Path  # Python's own, the .py files
    compiled: Path  # Python's own, the compiled modules
    shared: tuple[Path, ...]  # folders with the libraries that all these want
    loader: Path  # PyInstaller
    licences: Mapping[str, str]  # of Debian's packages


def _own_library(name: str) -> Path | None:
    """This Python's shared library, to be taken for a stub. None where it is not to be taken: on systems other than Linux, if
    there is none, or if it is larger than Debian's, unless Debian's needs a newer C library than this system's.
    """
    path = Path(sysconfig.get_config_var("LIBDIR") or "/nowhere", name)
    if sys.platform != "linux" or not path.exists():
        return None
    glibc = re.findall(r"\d+", os.confstr("CS_GNU_LIBC_VERSION") or "")
    is_old = tuple(map(int, glibc)) < _DEBIANS_GLIBC
    return path if is_old or len(elf.without_sections(path.read_bytes())) <= _LARGEST_OWN else None


def _unpack(fetched: Mapping[str, Path], root: Path, is_own: bool, python: wheels.Python) -> _Tree:
    own, packages, cpython, loader = (root / name for name in ("own", "packages", "cpython", "loader"))
    copy_sources(own)
    library, compiled, shared = Path(sysconfig.get_path("stdlib")), cpython / "deploy_libs", (cpython / "deploy_libs",)
    if is_own:
        compiled = Path(sysconfig.get_config_var("DESTSHARED"))
        system = [folder for pattern in _SYSTEM_LIBRARIES for folder in sorted(Path("/").glob(pattern[1:]))]
        shared = (Path(sysconfig.get_config_var("LIBDIR")), *system)
    for name, path in fetched.items():
        if path.suffix == ".deb":
            _unpack_debian(path, cpython)
            library = cpython / f"usr/lib/python{python[0]}.{python[1]}"
            compiled = library / "lib-dynload"
            shared = tuple(sorted(folder for kind in ("usr/lib", "lib") for folder in (cpython / kind).glob("*-linux-gnu")))
        elif name == "panda3d":
            _unzip(path, cpython, ("deploy_libs/",))
        elif name == "pyinstaller":
            _unzip(path, loader, ("PyInstaller/bootloader/", "PyInstaller/loader/"))
        elif name == "msvc_runtime":  # newer ones than CPython was built with, for NumPy wants them
            _unzip(path, cpython)
            shared = (next(cpython.glob("msvc_runtime-*.data/data/Scripts")), *shared)
        else:
            _unzip(path, packages)
    for file, text in REPLACED.items():
        packages.joinpath(file).resolve(strict=True).write_text(text, encoding="ascii")
    copyrights = cpython.glob("usr/share/doc/*/copyright")
    texts = {path.parent.name: path.read_text(encoding="utf-8", errors="replace") for path in copyrights}
    return _Tree(own, packages, library, compiled, (*shared, *sorted(packages.glob("*.libs"))), loader, texts)


def _compiler(fetched: Mapping[str, Path], root: Path, name: str) -> Path | None:
    """The other version of CPython among the `fetched` files, unpacked. None: no files."""
    for path in fetched.values():
        _unpack_debian(path, root / "compiler") if path.suffix == ".deb" else _unzip(path, root / "compiler", ("deploy_libs/",))
    return next((root / "compiler").rglob(name)) if fetched else None


def _unzip(path: Path, to: Path, starts: tuple[str, ...] = ("",)) -> None:
    with zipfile.ZipFile(path) as file:  # which keeps within the folder
        file.extractall(to, [name for name in file.namelist() if name.startswith(starts)])


def _unpack_debian(path: Path, to: Path) -> None:
    """The files of a package: an ar archive, with a compressed tar archive as its last member. Links become copies."""
    try:
        import lzma
    except ImportError:
        raise PocketlmError("this Python has no lzma, which unpacks Debian's packages; install Python with it") from None
    data, at = path.read_bytes(), 8
    while at < len(data):
        name, length = data[at : at + 16].rstrip(b" /"), int(data[at + 48 : at + 58])
        if name == b"data.tar.xz":
            content = lzma.decompress(data[at + 60 : at + 60 + length])
            with tarfile.open(fileobj=io.BytesIO(content)) as file:
                for member in file:
                    try:
                        source = file.extractfile(member)
                    except KeyError:  # a link to what another package brings
                        continue
                    if source:
                        target = to / PurePosixPath(member.name)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(source.read())
            return
        at += 60 + length + length % 2
    raise FileError(path, "is not a package of Debian", "remove it")


# ---- the archive -------------------------------------------------------------------------------------------------------


def _entries(
    platform: str, layout: _Layout, tree: _Tree, fetched: Mapping[str, Path], compiler: Path | None
) -> list[Entry]:
    loader = tree.loader / "PyInstaller/loader"
    boot_modules = [*_LOADER, *(["pyimod04_pywin32"] if platform.startswith("windows") else [])]
    found = modules.find(
        [*_own_modules(tree.own), *_base_modules(tree.library), *_BOOT], [tree.own, tree.packages, tree.library, tree.compiled],
        platform, (*EXCLUDED, *COMPILED_IN), layout.python,
    )  # fmt: skip
    quiet = {"quiet": tree.own / "quiet.py"}  # the first that is run
    scripts = {"pyiboot01_bootstrap": loader / "pyiboot01_bootstrap.py", "entry": tree.own / "entry.py"}
    files = {**found.python, **{name: loader / f"{name}.py" for name in boot_modules}, **quiet, **scripts}
    marshalled, magic = bytecode.compile_all(dict(sorted(files.items())), compiler, tree.library)
    code = {name: Code(path.stem == "__init__", marshalled[name]) for name, path in found.python.items()}
    base = {name: item for name, item in code.items() if name.startswith(_BASE) and name.split(".")[0] in _BASE}
    rest = {name: item for name, item in code.items() if name not in base}
    kernels = tree.own / KERNELS
    build_images(kernels, platform, module_texts, __version__)
    binaries = _binaries(platform, layout, tree, found.compiled)
    # what is no compiled module: libraries end in .so.NUMBER, or lie in a folder called PACKAGE.libs
    shared = [e.name for e in binaries if not e.name.endswith(modules.COMPILED) or ".libs" in e.name]
    libraries = [PurePosixPath(name.replace("\\", "/")).name for name in shared]
    return [
        *(Entry(archive_writer.MODULE, name, marshalled[name]) for name in (*quiet, "struct", *boot_modules)),
        *(Entry(archive_writer.SCRIPT, name, marshalled[name]) for name in scripts),
        *binaries,
        Entry(archive_writer.DATA, "base_library.zip", archive_writer.library(base, magic)),
        Entry(archive_writer.DATA, KERNELS, kernels.read_bytes()),
        *(_data(f"pocketlm/{name}", layout, tree) for name in DATA),
        Entry(archive_writer.DATA, licences.NAME, licences.collect(fetched, tree.licences, tree.library, libraries).encode()),
        Entry(archive_writer.MODULES, "PYZ.pyz", archive_writer.modules(rest, magic)),
        Entry(archive_writer.OPTION, "X utf8=1"),
        *[Entry(archive_writer.OPTION, "O")] * 2,  # the code has no docstrings: NumPy must not expect them
    ]


def _data(name: str, layout: _Layout, tree: _Tree) -> Entry:
    return Entry(archive_writer.DATA, name.replace("/", layout.separator), (tree.own / name).read_bytes())


def _own_modules(own: Path) -> list[str]:
    files = sorted(file.relative_to(own).with_suffix("") for file in (own / "pocketlm").rglob("*.py"))
    return [".".join(file.parts).removesuffix(".__init__") for file in files]


def _base_modules(library: Path) -> list[str]:
    """The names in _BASE that this version of Python has, and the modules of those that are packages."""
    names = [name for name in _BASE if (library / name).is_dir() or (library / f"{name}.py").exists()]
    files = [(name, file.stem) for name in names for file in sorted((library / name).glob("*.py"))]
    wanted = (f"{name}.{stem}" for name, stem in files if stem in ENCODINGS or name != "encodings")
    return [*names, *(name for name in wanted if not name.endswith(".__init__"))]


def _binaries(platform: str, layout: _Layout, tree: _Tree, compiled: Mapping[str, Path]) -> list[Entry]:
    """Python, the compiled modules, and the libraries they need, each under the name by which it is found at run time."""
    python = _library(layout.library, tree.shared)
    if python is None:
        raise PocketlmError(f"{layout.library} is in none of the files that were fetched")

    def place(path: Path, folder: str = "") -> str:
        return path.relative_to(tree.packages).as_posix() if path.is_relative_to(tree.packages) else folder + path.name

    wanted = {layout.library: python, **{place(path, layout.compiled): path for path in compiled.values()}}
    needs = _needs_of(platform)
    waiting = list(wanted.values())
    while waiting:
        for name in needs(waiting.pop().read_bytes()):
            path = _library(name, tree.shared)
            if path is None or name.startswith("api-ms-win-") or _GLIBC.match(name):  # the system's; the second Windows 10's
                if _MISSING_ON_WINDOWS.match(name):
                    raise PocketlmError(f"{name}, which {platform} wants, is in none of the files that were fetched")
                continue
            if (within := place(path)) not in wanted:
                wanted[within] = path
                waiting.append(path)
    users = [path for path in wanted.values() if path.suffix in modules.COMPILED]
    contents = {name: _smaller(path.read_bytes(), platform) for name, path in wanted.items()}
    for name, path in wanted.items():
        if "openblas" in name and blas.is_replaceable(path, users):
            contents[name] = blas.library_for(path, users, PLATFORMS[platform].machine)
            contents = {other: data for other, data in contents.items() if not PurePosixPath(other).name.startswith(_FORTRAN)}
    return [Entry(archive_writer.BINARY, name.replace("/", layout.separator), data) for name, data in sorted(contents.items())]


def _library(name: str, folders: Iterable[Path]) -> Path | None:
    """The path of a library. Names are compared without regard to case, as Windows does."""
    return next((folder / file for folder in folders for file in modules.names(folder) if file.lower() == name.lower()), None)


def _needs_of(platform: str) -> Callable[[bytes], Iterable[str]]:
    """A function that lists the libraries that a binary of the platform needs."""
    if platform.startswith("macos"):
        return lambda data: macho.needed(_smaller(data, platform))
    return pe.imports if platform.startswith("windows") else elf.needed


def _smaller(binary: bytes, platform: str) -> bytes:
    """The binary without its parts for other processors (macOS) and for debuggers (Linux)."""
    if platform.startswith("macos"):
        return macho.part_for(binary, PLATFORMS[platform].machine)
    return elf.without_sections(binary) if platform.startswith("linux") else binary
