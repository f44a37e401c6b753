"""How the next token is chosen: the options, their defaults and their ranges.

Knows no NumPy, so that a program can check what it was asked for before it shows its first line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from pocketlm.errors import UsageError

MAX_TOKENS = 1_000_000  # of an answer that a person may ask for


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose the next token. The defaults suit small models: a low temperature, and no penalties.

    Raises UsageError naming the option, its value and the range.
    """

    temperature: float = 0.7  # 0: greedy, the likeliest token, the lowest id among equals
    top_k: int = 40  # only the k likeliest; 0: off
    top_p: float = 0.95  # the fewest likeliest that together have this probability; 1: off (arXiv 1904.09751)
    min_p: float = 0.05  # only those with this share of the likeliest one's probability; 0: off (arXiv 2407.01082)
    repeat_penalty: float = 1.0  # positive logits of recent tokens / it, negative ones * it; 1: off (CTRL, arXiv 1909.05858)
    presence_penalty: float = 0.0  # taken from the logit of every recent token (OpenAI's API reference)
    frequency_penalty: float = 0.0  # the same for every time it occurs
    repeat_last_n: int = 64  # how many of the last tokens, prompt included, are "recent" for the three penalties
    logit_bias: Mapping[int, float] | None = None  # id -> added to its logit; -inf: never this token
    seed: int | None = None  # None: from the operating system

    def __post_init__(self):
        for name, kind, within, expected in _RANGES:
            value = getattr(self, name)
            if isinstance(value, kind) and type(value) not in (int, float, bool, type(None)):
                value = int(value) if kind is not Real else float(value)  # NumPy's numbers are narrow, and wrap around
                object.__setattr__(self, name, value)
            if not isinstance(value, kind) or isinstance(value, bool) or not within(value):
                raise UsageError(f"{name} is {value!r}; it must be {expected}")
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise UsageError(f"logit_bias is {self.logit_bias!r}; it must map token ids to numbers")
        for id, bias in (self.logit_bias or {}).items():
            if not isinstance(bias, Real) or not (-1e6 <= bias <= 1e6 or bias == -math.inf):
                raise UsageError(f"logit_bias of token {id!r} is {bias!r}; it must be a number from -1e6 to 1e6, or -inf")


# option, its type, what holds for a good value, the same in words
_RANGES: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
    ("temperature", Real, lambda x: 0 <= x <= 1e6, "a number from 0 up (0: always the likeliest token)"),
    ("top_k", Integral, lambda x: x >= 0, "a whole number from 0 up (0: off)"),
    ("top_p", Real, lambda x: 0 < x <= 1, "over 0 and at most 1 (1: off)"),
    ("min_p", Real, lambda x: 0 <= x <= 1, "from 0 to 1 (0: off)"),
    ("repeat_penalty", Real, lambda x: 0.01 <= x <= 100, "from 0.01 to 100 (1: off)"),
    ("presence_penalty", Real, lambda x: -100 <= x <= 100, "from -100 to 100 (0: off)"),
    ("frequency_penalty", Real, lambda x: -100 <= x <= 100, "from -100 to 100 (0: off)"),
    ("repeat_last_n", Integral, lambda x: x >= 1, "a whole number from 1 up"),
    ("seed", (Integral, type(None)), lambda x: x is None or x >= 0, "a whole number from 0 up, or None"),
)
