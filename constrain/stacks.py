"""Stacks of the parts that were entered and not yet left, each as one number: equal stacks have the same.

A stack is a frame on top of another stack, and so is shared by all that begin with it. Knows no automaton and no text.
"""

from __future__ import annotations

BOTTOM = 0  # the stack where nothing was entered
Frame = tuple[int, int, int]  # part, times through it, stack below


class Stacks:
    """`frames`: the top frame of each stack, by the stack's number."""

    def __init__(self) -> None:
        self.frames: list[Frame] = [(0, 0, 0)]
        self._numbers: dict[Frame, int] = {}

    def push(self, part: int, times: int, below: int) -> int:
        frame = part, times, below
        found = self._numbers.get(frame)
        if found is None:
            found = self._numbers[frame] = len(self.frames)
            self.frames.append(frame)
        return found

    def take_over(self, frames: list[Frame], stack: int) -> int:
        """The number here of another object's stack number `stack`, given that object's `frames`."""
        taken = list[Frame]()
        while stack != BOTTOM:
            taken.append(frames[stack])
            stack = frames[stack][2]
        for part, times, _ in reversed(taken):
            stack = self.push(part, times, stack)
        return stack
