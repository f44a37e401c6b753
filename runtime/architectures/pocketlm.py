"""Models that no published architecture describes: the file states every option itself (`pocketlm.norm`, …)."""

from typing import Any

from pocketlm.runtime.architectures.common import pre_norm

USUAL: dict[str, Any] = {}
operations = pre_norm
