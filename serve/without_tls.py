"""uvicorn and anyio where Python has no TLS, as in a packed program, which leaves OpenSSL out.

Both import `ssl` for names alone as long as nobody asks for TLS, and `import uvicorn` brings a command line and a supervisor
of processes along. `settle` puts empty modules in their places; where Python has TLS it does nothing.
"""

from __future__ import annotations

import asyncio  # noqa: F401 (it must have found out for itself that there is no TLS)
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any


class _Names(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {})


def settle() -> None:
    """To be called before uvicorn or anyio are imported."""
    if importlib.util.find_spec("_ssl") is not None or "ssl" in sys.modules:
        return
    sys.modules["ssl"] = _Names("ssl")
    spec = importlib.util.find_spec("uvicorn")
    assert spec is not None
    package = sys.modules["uvicorn"] = importlib.util.module_from_spec(spec)  # its folder, without what it would run
    package.Config = importlib.import_module("uvicorn.config").Config  # pyright: ignore[reportAttributeAccessIssue]
