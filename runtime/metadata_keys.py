"""Numbers, counts and choices from a file's metadata, each checked; a complaint names the file and the key.

Knows no key by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketlm.errors import FileError

LIMIT = 1 << 24  # no count of layers, heads, positions or widths above this: guards products against absurd files


class Keys:
    """Typed access to those keys of metadata that begin with `prefix`, by what follows it."""

    def __init__(self, metadata: Mapping[str, Any], path: object, prefix: str = ""):
        self.metadata, self.path, self._prefix = metadata, path, prefix

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self.metadata

    def fail(self, key: str, problem: str, advice: str = "the file is damaged or was exported wrongly") -> FileError:
        return FileError(self.path, f"{self._prefix}{key} {problem}", advice)

    def given(self, key: str, default: float | None = None) -> Any:
        """The value, an array as a list, or the default. FileError where there is neither."""
        value = self.metadata.get(self._prefix + key, default)
        if value is None:
            raise self.fail(key, "is missing")
        return value.tolist() if hasattr(value, "tolist") else value

    def number(self, key: str, default: float | None = None, low: float = 0.0, high: float = 1e12) -> float:
        value = self.given(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(key, f"should be a number, not {type(value).__name__}")
        if not low <= value <= high:
            raise self.fail(key, f"is {value!r:.60}, expected {low:g} to {high:g}")
        return float(value)

    def count(self, key: str, default: int | None = None, besides_zero: bool = False) -> int:
        value = self.given(key, default)
        if isinstance(value, list):  # one value a layer: all must agree, or all that are not 0
            values = [number for number in value if number or not besides_zero]
            if not values or values.count(values[0]) < len(values):
                raise self.fail(key, "differs from layer to layer", "pocketlm runs models whose layers are alike")
            value = values[0]
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"should be a whole number, not {type(value).__name__}")
        if not 1 <= value <= LIMIT:
            raise self.fail(key, f"is {value}, expected 1 to {LIMIT}")
        return value

    def numbers(self, key: str, n: int, default: float | None = None) -> list[float]:
        """`n` numbers (or yes and no: 1 and 0); a single one stands for all."""
        value = self.given(key, default)
        values = value if isinstance(value, list) else [value] * n
        if len(values) != n:
            raise self.fail(key, f"has {len(values)} numbers for {n} layers")
        if not all(isinstance(v, (bool, int, float)) and abs(v) <= 1e12 for v in values):
            raise self.fail(key, "should be finite numbers")
        return [float(v) for v in values]

    def choice(self, key: str, default: Any, allowed: tuple) -> Any:
        value = self.metadata.get(self._prefix + key, default)
        if not isinstance(value, (str, bool)) or value not in allowed:
            raise self.fail(key, f"is {value!r:.60}, expected one of {', '.join(map(str, allowed))}")
        return value
