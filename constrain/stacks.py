"""What was entered and not yet left, as numbers: a stack is its top frame, and the number of the stack below that.

Knows no automaton and no text.
"""

from __future__ import annotations

BOTTOM = 0  # the stack where nothing was entered
Frame = tuple[int, int, int]  # part, times through it, stack below


class Stacks:
    """`frames`: of each stack, by its number, the top one."""

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
        """The number that a stack of others has here."""
        taken = list[Frame]()
        while stack != BOTTOM:
            taken.append(frames[stack])
            stack = frames[stack][2]
        for part, times, _ in reversed(taken):
            stack = self.push(part, times, stack)
        return stack
