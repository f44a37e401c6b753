"""Stubs, the executables that models are packed into: which platforms there are, and the stubs kept in the cache folder.

In: a platform's name. Out: the path of its stub, composed when it is first wanted. Knows no models; compose.py makes stubs,
contents.py says what goes in.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from pocketlm.build.compose import compose
from pocketlm.build.sources import fingerprint
from pocketlm.errors import UsageError
from pocketlm.runtime.native.aot import PLATFORMS
from pocketlm.runtime.native.code_cache import kept_folder
from pocketlm.terminal_text import print

SHORT_NAMES = {
    "windows": ("windows-x86_64",), "macos": ("macos-arm64", "macos-x86_64"), "linux": ("linux-x86_64",),
    "pi": ("linux-aarch64",), "all": tuple(PLATFORMS),
}  # fmt: skip


def platforms(name: str) -> tuple[str, ...]:
    """The platforms that --for NAME means. Raises UsageError."""
    if name not in (*SHORT_NAMES, *PLATFORMS):
        raise UsageError(f"--for {name}: known are {', '.join((*SHORT_NAMES, *PLATFORMS))}")
    return SHORT_NAMES.get(name, (name,))


def kept_stub(name: str, wheels: Path | None = None) -> Path:
    """The stub for a platform in the cache folder; composes it if it is missing. `wheels`: as `wheel_folder` of compose.

    Raises PocketlmError if others may write to that folder: they could put a program there that friends would run.
    """
    path = kept_folder("stubs") / f"{name}-{fingerprint()[:16]}"
    if not path.exists():
        print(f"composing a stub for {name}: half a minute", file=sys.stderr)
        compose(name, path, wheels)
        for old in path.parent.glob(f"{name}-*"):
            if old != path:
                with suppress(OSError):  # on Windows, one that is being read
                    old.unlink()
    return path
