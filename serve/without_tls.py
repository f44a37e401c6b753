"""uvicorn and anyio imported without what a packed program leaves out: TLS, uvicorn's command line and its processes.

`import uvicorn` brings a command line and a supervisor of processes along, and both packages import `ssl` for names alone as
long as nobody asks for TLS. Where Python has TLS, nothing of that changes for anybody else in the process.
"""

from __future__ import annotations

import asyncio  # noqa: F401 (it must have found out for itself that there is no TLS)
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class _Names(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {})


def stand_in() -> None:
    """Where Python has no TLS, something takes its place. To be called before anything is imported that wants it."""
    if importlib.util.find_spec("_ssl") is None:
        sys.modules.setdefault("ssl", _Names("ssl"))


@contextmanager
def imports() -> Iterator[None]:
    """Inside, parts of uvicorn can be imported without `import uvicorn`."""
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
