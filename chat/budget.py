"""What one rendering of a chat template may spend: processor time, memory, and the kinds of values it may hold.

In: values that a template makes, one by one. Out: nothing, or a `TemplateError` that ends the rendering. It works
without signals and without a second process, so in any thread of any system: every operation that a template can
perform passes through `tick` before and `admit` after, and no single operation may be long (`text_limit`).
Knows no operations.
"""

import sys
import time
from typing import Any

from pocketlm.errors import PocketlmError

CPU_SECONDS = 0.3
MEMORY_BYTES = 8 << 20
TEXT_LIMIT = 1 << 18
DEPTH_LIMIT = 24
"""A rendering's limits; time, memory and text grow with the conversation that is rendered (see `Budget`)."""

_CONTAINERS = (list, tuple, dict)

# The clock of this thread alone: a machine that is busy or asleep does not make a template slow.
_clock = getattr(time, "thread_time", time.perf_counter)


class TemplateError(PocketlmError):
    """A chat template that cannot be used: it is broken, or asks for what a template does not need."""


class TemplateRaised(TemplateError):
    """The template itself refused the conversation, by `raise_exception`."""


class Budget:
    """The meter of one rendering.

    `input_chars` is the length of the conversation. Every fourth operation reads the clock. `bytes_left` counts all
    memory that was ever asked for, freed or not.
    """

    __slots__ = ("_handles", "_plain", "bytes_left", "deadline", "depth", "text_limit", "ticks")

    def __init__(self, input_chars: int = 0):
        from jinja2.runtime import Undefined
        from jinja2.utils import Namespace

        self._plain = {int, float, bool, type(None), range, Undefined}
        self._handles = {Namespace, type(iter([]))}
        self.text_limit = TEXT_LIMIT + 4 * input_chars
        self.bytes_left = MEMORY_BYTES + 64 * input_chars
        self.deadline = _clock() + CPU_SECONDS + 1e-6 * input_chars
        self.ticks = 0
        self.depth = 0

    def tick(self) -> None:
        """Counts one operation. Raises TemplateError when the time is over."""
        self.ticks += 1
        if not self.ticks & 3 and _clock() > self.deadline:
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
        """Count the call of a macro; the caller lowers `depth` when it returns. Raises TemplateError if it is nested too
        deeply.
        """
        self.depth += 1
        if self.depth > DEPTH_LIMIT:
            raise TemplateError("its macros call each other without end")

    def admit(self, value: Any) -> Any:
        """Check a new value, charge its memory, return it. Raises TemplateError if it is too large or of a forbidden type."""
        kind = type(value)
        if kind is str:
            self.check_text(len(value))
            self.charge(sys.getsizeof(value))
        elif kind in _CONTAINERS:
            self.weigh(value)
            self.charge(sys.getsizeof(value))
        elif kind is int:
            if value.bit_length() > 63:
                raise TemplateError("it computes with a number that is too large")
        elif kind not in self._plain and kind not in self._handles:
            raise TemplateError(f"it makes a value of type {kind.__name__}")
        return value

    def weigh(self, value: Any, depth: int = 0) -> int:
        """The size of plain data written out: characters and elements, shared parts counted as often as they occur.

        Two lists that hold each other's parts twice, thirty deep, take no memory and 2³⁰ steps to compare or to
        print; whatever is admitted has a small weight, so no comparison, sort or conversion of it takes long.
        Raises TemplateError for anything but plain data: the text of such an object would show the inside of Python.
        """
        kind = type(value)
        if kind is str:
            return 1 + len(value)
        if kind not in _CONTAINERS:
            if kind in self._plain:
                return 1
            raise TemplateError(f"it takes an object of type {kind.__name__} for data")
        if depth == DEPTH_LIMIT:
            raise TemplateError("it nests lists too deeply")
        weight = 2
        for part in [part for pair in value.items() for part in pair] if kind is dict else value:
            weight += self.weigh(part, depth + 1)
            if weight > self.text_limit:
                raise TemplateError("it builds a list that is too long")
        return weight

    def text(self, value: Any) -> str:
        """The value as Jinja prints it, charged. Raises TemplateError for what is not plain data."""
        self.tick()
        if type(value) is not str:
            self.weigh(value)
            value = str(value)
        return self.admit(value)
