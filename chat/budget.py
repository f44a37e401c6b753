"""What one rendering of a chat template may spend: processor time, memory, and the kinds of values it may hold.

In: values that a template makes, one by one. Out: nothing, or a `TemplateError` that ends the rendering. It works
without signals and without a second process, so in any thread of any system: every operation that a template can
perform passes through `tick` before and `admit` after, and no single operation may be long (`text_limit`).
Knows no Jinja.
"""

import sys
import time
from typing import Any

from pocketlm.errors import PocketlmError

CPU_SECONDS = 0.4
MEMORY_BYTES = 8 << 20
TEXT_LIMIT = 1 << 18
DEPTH_LIMIT = 24
"""A rendering's limits; time, memory and text grow with the conversation that is rendered (see `Budget`)."""

# The clock of this thread alone: a machine that is busy or asleep does not make a template slow.
_clock = getattr(time, "thread_time", time.perf_counter)


class TemplateError(PocketlmError):
    """A chat template that cannot be used: it is broken, or asks for what a template does not need."""


class TemplateRaised(TemplateError):
    """The template itself refused the conversation, by `raise_exception`."""


class Budget:
    """The meter of one rendering.

    `input_chars` is the length of the conversation. Every 16th operation reads the clock. `bytes_left` counts all
    memory that was ever asked for, freed or not.
    """

    __slots__ = ("bytes_left", "deadline", "depth", "text_limit", "ticks")

    def __init__(self, input_chars: int = 0):
        self.text_limit = TEXT_LIMIT + 4 * input_chars
        self.bytes_left = MEMORY_BYTES + 64 * input_chars
        self.deadline = _clock() + CPU_SECONDS + 1e-6 * input_chars
        self.ticks = 0
        self.depth = 0

    def tick(self) -> None:
        """Counts one operation. Raises TemplateError when the time is over."""
        self.ticks += 1
        if not self.ticks & 15 and _clock() > self.deadline:
            raise TemplateError("it does not come to an end")

    def charge(self, n_bytes: int) -> None:
        """Takes memory out of the budget, before it is allocated where that can be foreseen."""
        self.bytes_left -= n_bytes
        if self.bytes_left < 0:
            raise TemplateError("it asks for too much memory")

    def check_text(self, n_chars: int) -> None:
        """Raises TemplateError if a text of `n_chars` may not be made."""
        if n_chars > self.text_limit:
            raise TemplateError("it builds a text that is too long")

    def enter(self) -> None:
        """A macro is called; `depth` falls again when it returns."""
        self.depth += 1
        if self.depth > DEPTH_LIMIT:
            raise TemplateError("its macros call each other without end")

    def admit(self, value: Any) -> Any:
        """Lets a new value in and returns it: small enough, and nothing that is not a template's business."""
        kind = type(value)
        if kind is str:
            self.check_text(len(value))
            self.charge(sys.getsizeof(value))
        elif kind in (list, tuple, dict):
            self.weigh(value)
            self.charge(sys.getsizeof(value))
        elif kind is int:
            if value.bit_length() > 63:
                raise TemplateError("it computes with a number that is too large")
        elif kind is complex or kind is bytes:
            raise TemplateError(f"it makes a value of type {kind.__name__}")
        return value

    def weigh(self, value: Any, *, printable: bool = False) -> int:
        """The size of a value written out: characters and elements, shared parts counted as often as they occur.

        Two lists that hold each other's parts twice, thirty deep, take no memory and 2³⁰ steps to compare or to
        print; whatever is admitted has a small weight, so no comparison, sort or conversion of it takes long.
        `printable` refuses what is not plain data: the text of such an object would show the inside of Python.
        """
        return self._weigh(value, printable, 0)

    def _weigh(self, value: Any, printable: bool, depth: int) -> int:
        kind = type(value)
        if kind is str:
            return 1 + len(value)
        if kind is dict:
            parts: Any = (part for pair in value.items() for part in pair)
        elif kind is list or kind is tuple:
            parts = value
        elif printable and kind not in _PRINTABLE and not _is_undefined(value):
            raise TemplateError(f"it prints an object of type {kind.__name__}")
        else:
            return 1
        if depth == DEPTH_LIMIT:
            raise TemplateError("it nests lists too deeply")
        weight = 2
        for part in parts:
            weight += self._weigh(part, printable, depth + 1)
            if weight > self.text_limit:
                raise TemplateError("it builds a list that is too long")
        return weight

    def text(self, value: Any) -> str:
        """The value as Jinja prints it, charged. Raises TemplateError for what is not plain data."""
        self.tick()
        if type(value) is not str:
            self.weigh(value, printable=True)
            value = str(value)
        return self.admit(value)


_PRINTABLE = frozenset({int, float, bool, type(None), range})


def _is_undefined(value: Any) -> bool:
    from jinja2 import Undefined

    return type(value) is Undefined
