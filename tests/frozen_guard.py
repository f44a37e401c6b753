"""Refuses to the code of a stub what a stub does not hold, so that every test of that code proves it can do without.

`install` is called by conftest.py, before anything else is imported. What a packed program leaves out (build/contents.py), and
packages that it has never heard of, cannot be imported, nor be reached as an attribute of NumPy, on behalf of a module of
pocketlm that such a program holds: the error is the one that a friend would see. The tests themselves, pytest, and the parts
of pocketlm that stay with the sender import what they like. Who asks is the nearest caller that is neither the standard
library nor a frozen package: these do what they are told. Stubs hold NumPy 2: with NumPy 1, whose modules have other
names, nothing is refused.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import re
import sys
from importlib import metadata
from types import FrameType
from typing import Any

from pocketlm.build.contents import EXCLUDED, FROZEN, REPLACED, STOOD_IN, is_excluded, is_held

SERVANTS = {*FROZEN, *sys.stdlib_module_names, "frozen_guard"}
# Every import passes here: most are let through by their first word
HARMLESS = {*SERVANTS, "pocketlm"} - {name.partition(".")[0] for name in EXCLUDED}
SUBMODULES = {name.removeprefix("numpy.") for name in EXCLUDED if name.count(".") == 1 and name.startswith("numpy.")}
PRELOADED = ("ma", "random", "fft", "polynomial", "ctypeslib", "testing")  # what tests use, so that all is in its place


def on_behalf_of_a_stub(frame: FrameType | None) -> str | None:
    """The module of a stub that somebody is working for, or None."""
    while frame is not None:
        name = frame.f_globals.get("__name__") or ""
        if name in STOOD_IN:  # in a stub it is not there, and so wants nothing
            return None
        if name.partition(".")[0] not in SERVANTS:
            return name if name.partition(".")[0] == "pocketlm" and is_held(_source(frame)) else None
        frame = frame.f_back
    return None


def _source(frame: FrameType) -> str:
    """`chat/repl.py` for the module `pocketlm.chat.repl`, and `chat/__init__.py` for `pocketlm.chat`."""
    name = frame.f_globals["__name__"].partition(".")[2].replace(".", "/")
    is_package = "__path__" in frame.f_globals
    return f"{name}/__init__.py".removeprefix("/") if is_package else f"{name}.py"


def refuse(module: str, frame: FrameType | None) -> None:
    """Raise ModuleNotFoundError for a module that no stub holds and that is wanted for a stub's code."""
    unknown = module.partition(".")[0] not in {*SERVANTS, "pocketlm"}
    missing = unknown or is_excluded(module) or is_replaced(module)
    stood_in = not {module, module.rpartition(".")[0]}.isdisjoint(STOOD_IN)  # or a name in such a module
    if missing and not stood_in and (asker := on_behalf_of_a_stub(frame)):
        raise ModuleNotFoundError(f"No module named {module!r} in a packed program, where {asker} wants it", name=module)


def is_replaced(module: str) -> bool:
    """Whether this is a name in a package whose `__init__` is another in a stub, which has no such name."""
    package, _, name = module.rpartition(".")
    text = REPLACED.get(f"{package.replace('.', '/')}/__init__.py")
    if text is None or name.startswith("__") or name in re.findall(r"\w+", text):
        return False
    return importlib.util.find_spec(module) is None


def install() -> None:
    """From now on; once."""
    if hasattr(builtins.__import__, "guarded") or metadata.version("numpy").startswith("1."):
        return
    plain_import, plain_import_module = builtins.__import__, importlib.import_module

    def guarded(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if level == 0 and name.partition(".")[0] not in HARMLESS:
            frame = sys._getframe(1)
            refuse(name, frame)
            for part in fromlist or ():
                refuse(f"{name}.{part}", frame)
            module = plain_import(name, globals, locals, fromlist, level)
            _hide_submodules()
            return module
        return plain_import(name, globals, locals, fromlist, level)

    def guarded_import_module(name: str, package: str | None = None) -> Any:
        refuse(name, sys._getframe(1))
        return plain_import_module(name, package)

    guarded.guarded = True  # type: ignore[attr-defined]
    builtins.__import__, importlib.import_module = guarded, guarded_import_module
    for name in PRELOADED:
        plain_import_module(f"numpy.{name}")
    import numpy

    plain_attribute = numpy.__getattr__  # what NumPy answers for what is no attribute yet

    def attribute(name: str) -> Any:
        if name in SUBMODULES:
            refuse(f"numpy.{name}", sys._getframe(1))
            if (module := sys.modules.get(f"numpy.{name}")) is not None:
                return module
        return plain_attribute(name)

    numpy.__getattr__ = attribute
    _hide_submodules()


def _hide_submodules() -> None:
    """A module that was imported once is an attribute of NumPy, which nobody could refuse."""
    numpy = sys.modules.get("numpy")
    for name in SUBMODULES & vars(numpy).keys() if numpy and hasattr(numpy.__dict__.get("__getattr__"), "__closure__") else ():
        delattr(numpy, name)
