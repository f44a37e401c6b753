"""Models that no published architecture describes: the file states every option itself (`pocketlm.norm`, …)."""

from __future__ import annotations

from typing import Any

from pocketlm.runtime.architectures.common import pre_norm

USUAL: dict[str, Any] = {}
SETTINGS: tuple[str, ...] = ()
operations = pre_norm
