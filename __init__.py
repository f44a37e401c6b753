"""pocketlm: a small language model that you trained, as one file that a friend talks to, run in Python.

    import pocketlm
    model = pocketlm.load("model.gguf")
    for piece in model.generate("Once upon a time", max_tokens=32):
        print(piece.text, end="")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketlm import tokenizer
    from pocketlm.errors import FileError, PocketlmError, UsageError
    from pocketlm.model import Model, load

__version__ = "0.1.0"
__all__ = ["FileError", "Model", "PocketlmError", "UsageError", "__version__", "load", "tokenizer"]


def __dir__() -> list[str]:
    """What Tab completion offers: also names that are imported on first use."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import on first use: `pocketlm --help` must not wait for NumPy."""
    if name in ("load", "Model"):
        return getattr(importlib.import_module("pocketlm.model"), name)
    if name in ("FileError", "PocketlmError", "UsageError"):
        return getattr(importlib.import_module("pocketlm.errors"), name)
    if name == "tokenizer":
        return importlib.import_module("pocketlm.tokenizer")
    raise AttributeError(f"module 'pocketlm' has no attribute {name!r}")
