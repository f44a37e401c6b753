"""uvicorn and anyio imported without what a packed program leaves out: TLS, uvicorn's command line and its processes.

`import uvicorn` imports a command line and a supervisor of processes. Of `ssl`, `logging.config` and `configparser` the two
packages use names alone here, and of `http.client` the titles of statuses. So modules of empty classes stand in for those that
a packed program lacks; where Python has a module, nothing changes.
"""

from __future__ import annotations

import asyncio  # noqa: F401 (it must have found out for itself that there is no TLS)
import http
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# What may be left out: the module that is then missing, and what is looked up in its place but for classes
LEFT_OUT = {
    "ssl": ("_ssl", {}), "logging.config": ("logging.config", {}), "configparser": ("configparser", {}),
    "http.client": ("http.client", {"responses": {status.value: status.phrase for status in http.HTTPStatus}}),
}  # fmt: skip


class _Names(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {})


def stand_in() -> None:
    """Put stand-ins for missing modules into `sys.modules`. To be called before anything imports them."""
    for name, (part, values) in LEFT_OUT.items():
        if name not in sys.modules and importlib.util.find_spec(part) is None:
            module = sys.modules[name] = _Names(name)
            vars(module).update(values)
            package, _, last = name.rpartition(".")
            if package:
                setattr(importlib.import_module(package), last, module)


@contextmanager
def imports() -> Iterator[None]:
    """In the block, submodules of uvicorn can be imported without running `uvicorn/__init__.py`."""
    stand_in()
    before = sys.modules.get("uvicorn")
    if before is None:
        spec = importlib.util.find_spec("uvicorn")
        assert spec is not None
        package = sys.modules["uvicorn"] = importlib.util.module_from_spec(spec)  # its folder, without what it would run
        package.Config = importlib.import_module("uvicorn.config").Config  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        if before is None:
            del sys.modules["uvicorn"]  # who wants all of it gets that
