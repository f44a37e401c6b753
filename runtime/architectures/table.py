"""The architectures that pocketlm runs, by the name that a file gives in `general.architecture`.

A row is a module with USUAL (the options it means by itself, as in hyper.OPTIONS), SETTINGS (keys of its own that it reads)
and operations(builder), which lists what it does.
"""

from __future__ import annotations

from typing import Any, Protocol

from pocketlm.runtime.architectures import gpt2, llama, pocketlm, refact
from pocketlm.runtime.architectures.common import Builder


class Architecture(Protocol):
    USUAL: dict[str, Any]
    SETTINGS: tuple[str, ...]

    def operations(self, m: Builder) -> None: ...


ARCHITECTURES: dict[str, Architecture] = {"gpt2": gpt2, "llama": llama, "refact": refact, "pocketlm": pocketlm}
