"""What is measured of a backend: the kinds of tasks, what each asks the child process for, and what it is called.

A task's figures lie under its name in a backend's result, by a number: tokens of a prompt, tokens in the cache, tokens
generated. Knows nothing of processes or clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """`request(number, tokens)`: the method of the child and its arguments; `tokens` are those that "after N" decodes."""

    name: str  # in a backend's result
    setting: str  # the setting that lists the numbers
    column: str
    legend: str
    generates: bool  # tokens one by one; otherwise all in one call
    like_llama_bench: bool  # a round is one pass, and the figure is a mean with its standard deviation
    request: Callable[[int, int], dict[str, int]]

    @property
    def job(self) -> str:
        """The child's method."""
        return "decode" if self.generates else "prefill"

    def context(self, number: int, tokens: int) -> int:
        """The positions that it fills."""
        return sum(self.request(number, tokens).values())


TASKS = (
    Task("prefill", "prompts", "prompt {}", "prompt of {} tokens", False, False, lambda n, tokens: {"n": n}),
    Task("decode", "depths", "after {}", "after {} tokens", True, False, lambda n, tokens: {"n": tokens, "depth": n}),
    Task("pp", "pp", "pp{}", "pp{}", False, True, lambda n, tokens: {"n": n}),
    Task("tg", "tg", "tg{}", "tg{}", True, True, lambda n, tokens: {"n": n, "depth": 0}),
)


def keys(model: dict[str, Any], task: Task) -> list[str]:
    """The numbers that any backend of this model has figures for, the smallest first."""
    return sorted({key for row in model["backends"] for key in row.get(task.name, {})}, key=int)
