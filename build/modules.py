"""Which modules a program needs, found by reading the import statements of a platform's sources on any other platform.

In: folders with Python's library, packages and compiled modules; the names to begin with; the platform. Out: a file for
every module that can be reached. Nothing is imported or run. Knows no archives.

An import is followed wherever it stands, in a function too, but for branches that the platform does not take
(`if sys.platform == …`, `if os.name == …`), nor this version of Python (`if sys.version_info >= …`), and those for type
checkers. What compiled modules import is read from the dotted names in them.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

COMPILED = (".so", ".pyd")
Target = tuple[str, tuple[int, int]]  # "linux", and a version of Python
_SYS_PLATFORM = {"windows": "win32", "macos": "darwin", "linux": "linux"}
_FREE_THREADED = re.compile(r"\.(cp|cpython-)3\d+t-")  # compiled for a Python without the lock, which may lie beside the other
_DOTTED = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)+")


@dataclass
class Found:
    """Modules by name. `python`, `compiled`: their files. `nowhere`: modules that have no file, and who imports them first."""

    python: dict[str, Path] = field(default_factory=dict)
    compiled: dict[str, Path] = field(default_factory=dict)
    nowhere: dict[str, str] = field(default_factory=dict)


def find(
    roots: Collection[str], folders: Sequence[Path], platform: str, excluded: Collection[str],
    python: tuple[int, int] = sys.version_info[:2],
) -> Found:  # fmt: skip
    """All modules that `roots` import, directly or not.

    `platform`: as in aot.PLATFORMS. Packages in `excluded` are left out with everything in them. SyntaxError: a file is not
    Python.
    """
    found, target = Found(), (platform.partition("-")[0], python)
    waiting = [(name, "") for name in sorted(roots, reverse=True)]
    seen: set[str] = set()
    while waiting:
        name, importer = waiting.pop()
        if name in seen or any(name == out or name.startswith(out + ".") for out in excluded):
            continue
        seen.add(name)
        parent = name.rpartition(".")[0]
        if parent:
            waiting.append((parent, importer))
        path = _file(name, folders)
        if path is None:
            if importer:
                found.nowhere[name] = importer
        elif path.suffix in COMPILED:
            found.compiled[name] = path
            package = name.split(".")[0].lstrip("_")  # _ctypes imports ctypes._layout
            waiting += [(other, "") for other in _named_in(path) if other.split(".")[0].lstrip("_") == package]
        else:
            found.python[name] = path
            tree = ast.parse(path.read_bytes(), str(path))
            package = name if path.stem == "__init__" else parent
            for other, is_certain in _imports(tree, package, target):
                if is_certain or _file(other, folders):
                    waiting.append((other, name if is_certain else ""))
    return found


def _file(name: str, folders: Sequence[Path]) -> Path | None:
    """The file of a module or package, chosen as importlib would."""
    *parts, last = name.split(".")
    for root in folders:
        folder = root.joinpath(*parts)
        files = names(folder)
        if "__init__.py" in names(folder / last if last in files else folder / "?"):
            return folder / last / "__init__.py"
        for file in files:
            if file.startswith(f"{last}.") and file.endswith(COMPILED) and not _FREE_THREADED.search(file):
                return folder / file
        if f"{last}.py" in files:
            return folder / f"{last}.py"
    return None


@functools.cache
def names(folder: Path) -> list[str]:
    """The sorted names in a folder; [] if there is no such folder."""
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _named_in(path: Path) -> set[str]:
    """Dotted names that are complete strings in a compiled module."""
    texts = (text for text in path.read_bytes().split(b"\0") if b"." in text)
    return {text.decode() for text in texts if _DOTTED.fullmatch(text)}


def _imports(tree: ast.Module, package: str, target: Target) -> Iterator[tuple[str, bool]]:
    """Names that a file imports anywhere, and whether each is certainly a module: in `from a import b`, b may be anything."""
    for statement in _taken(tree.body, target):
        if isinstance(statement, ast.Import):
            yield from ((alias.name, True) for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            base = statement.module or ""
            if statement.level:
                above = package.split(".")[: len(package.split(".")) - statement.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield base, True
            yield from ((f"{base}.{alias.name}", False) for alias in statement.names)


def _taken(body: Sequence[ast.stmt], target: Target) -> Iterator[ast.stmt]:
    """Every statement in `body`, also nested ones, except in branches that the target does not take."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If):
            truth = _truth(statement.test, target)
            yield from _taken(statement.body, target) if truth is not False else ()
            yield from _taken(statement.orelse, target) if truth is not True else ()
            continue
        for name in ("body", "orelse", "finalbody"):
            yield from _taken(getattr(statement, name, ()), target)
        for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
            yield from _taken(part.body, target)


def _truth(test: ast.expr, target: Target) -> bool | None:
    """Whether a condition holds on the target, if it asks only for the system or the version of Python; else None."""
    system, python = target
    values = {"sys.platform": _SYS_PLATFORM[system], "platform": _SYS_PLATFORM[system],
              "os.name": "nt" if system == "windows" else "posix"}  # fmt: skip
    match test:
        case ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING"):
            return False
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            truth = _truth(operand, target)
            return None if truth is None else not truth
        case ast.Compare(left=left, ops=[ast.Eq() | ast.NotEq() as op], comparators=[ast.Constant(value=str(other))]):
            value = values.get(ast.unparse(left))
            return None if value is None else (value == other) == isinstance(op, ast.Eq)
        case ast.Compare(left=left, ops=[ast.Lt() | ast.GtE() as op], comparators=[ast.Tuple(elts=[_, _]) as other]):
            is_older = python < ast.literal_eval(other)
            return is_older == isinstance(op, ast.Lt) if ast.unparse(left) == "sys.version_info" else None
        case ast.Call(func=ast.Attribute(attr="startswith", value=left), args=[ast.Constant(value=str(start))]):
            value = values.get(ast.unparse(left))
            return None if value is None else value.startswith(start)
        case _:
            return None
