"""An automaton made deterministic where a text comes along: its states, numbered, and what follows each.

In: an `Automaton`. Out: the state after each byte. Knows no tokens.

A state is a set of places, each a node and the stack of the parts that were entered: every way to read the text so far. What
follows a state is made when it is first asked for; all of it is forgotten when it is much.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pocketlm.constrain.automaton import END, Automaton
from pocketlm.errors import UsageError

BOTTOM = 0  # the stack where nothing was entered
MOST_STATES = 1 << 13  # whose rows take 1 KB each
MOST_STACKS = 1 << 16
MOST_STEPS = 200_000  # for one mask
MANY = 8  # repetitions: passing a part of fewer in one go, again from each of its ends, costs more than it saves
NONE = -1  # in place of a state's number: this byte cannot come
FAR = np.iinfo(np.int16).max  # more repetitions than any token has

Place = tuple[int, int]  # node, stack
Frame = tuple[int, int, int]  # part, times through it, stack below
State = frozenset[Place]
WHOLE: Place = END, BOTTOM
NOWHERE: State = frozenset()


@dataclass(slots=True)
class Way:
    """On from a state by any byte from `first` to the one before `end`, to what `places` reach. Once that was asked for, it has
    a `number`, and the places are gone.
    """

    first: int
    end: int
    places: set[Place]
    number: int = NONE


class Stacks:
    """Stacks of the parts that were entered and not yet left, each as one number: equal stacks have the same.

    A stack is a frame on top of another stack, and so is shared by all that begin with it. `frames`: the top frame of each, by
    the stack's number.
    """

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


class States:
    """`table`: the number of the state after each byte, or NONE, int32 [n, 256], where `need_rows` was asked for it.
    `is_whole`: a text may end here; `is_inside`: here one is inside a counted part of MANY repetitions. bool [n].
    """

    def __init__(self, automaton: Automaton, of: str):
        self.automaton, self.of = automaton, of
        self.stacks, self.n_open = Stacks(), 0
        self.frames = self.stacks.frames
        self._forget()
        self.start = self.reach((automaton.start, BOTTOM))

    def _forget(self) -> None:
        self._reached: dict[Place, State] = {}
        self.by_number: list[State] = []
        self._number_of: dict[State, int] = {}
        self._ways: list[list[Way] | None] = []
        self.table = np.full((64, 256), NONE, np.int32)
        self._has_row, self.is_whole, self.is_inside = np.zeros((3, 64), bool)
        self._steps = 0

    def begin(self) -> bool:
        """Another mask, or some bytes more. Whether the numbers of states that were given before are forgotten."""
        self._steps = 0
        if len(self.by_number) <= MOST_STATES // 2:
            return False
        self._forget()
        return True

    def count(self, steps: int) -> None:
        """Raises UsageError where that is too much for one mask."""
        self._steps += steps
        if self._steps > MOST_STEPS or len(self.by_number) >= MOST_STATES or len(self.frames) >= MOST_STACKS:
            raise UsageError(f"{self.of} can be read in too many ways at once; make it simpler")

    def reach(self, place: Place) -> State:
        """The places that are reached from here without another byte: those that have edges, and the end of the whole text."""
        found = self._reached.get(place)
        if found is not None:
            return found
        automaton, parts = self.automaton, self.automaton.parts
        work, seen, kept = [place], {place}, []
        while work:
            here = node, stack = work.pop()
            if node == END and stack == BOTTOM:
                kept.append(here)
                continue
            targets: list[Place] = []
            if node == END:
                i, times, below = self.frames[stack]
                part, times = parts[i], times + 1
                if times >= part.least:
                    targets.append((part.after, below))
                if part.most is None or times < part.most:
                    times = min(times, part.least) if part.most is None else times
                    targets.append((part.start, self.stacks.push(i, times, below)))
            else:
                if automaton.edges[node]:
                    kept.append(here)
                targets += [(target, stack) for target in automaton.skips[node]]
                for i in automaton.entries[node]:
                    if not parts[i].least:
                        targets.append((parts[i].after, stack))
                    targets.append((parts[i].start, self.stacks.push(i, 0, stack)))
            self.count(1 + len(targets))
            for target in targets:
                if target not in seen:
                    seen.add(target)
                    work.append(target)
        found = self._reached[place] = frozenset(kept)
        return found

    def step(self, state: State, byte: int) -> State:
        """The state after one more byte; NOWHERE where it cannot come. Leaves nothing behind that is kept."""
        edges = self.automaton.edges
        reached = [
            self.reach((target, stack)) for node, stack in state for low, high, target in edges[node] if low <= byte <= high
        ]
        return NOWHERE.union(*reached) if len(reached) != 1 else reached[0]

    def number(self, state: State) -> int:
        found = self._number_of.get(state)
        if found is None:
            self.count(len(state))
            found = self._number_of[state] = len(self.by_number)
            self.by_number.append(state)
            self._ways.append(None)
            if found == len(self.table):
                self.table = np.concatenate([self.table, np.full_like(self.table, NONE)])
                flags = np.stack([self._has_row, self.is_whole, self.is_inside])
                self._has_row, self.is_whole, self.is_inside = np.concatenate([flags, np.zeros_like(flags)], 1)
            self.is_whole[found] = WHOLE in state
            self.is_inside[found] = any(self._is_counted(stack, MANY) for _, stack in state)
        return found

    def number_after(self, i: int, below: int) -> int:
        """Of the state behind a part that was entered from this stack."""
        return self.number(self.reach((self.automaton.parts[i].after, below)))

    def ways(self, number: int) -> list[Way]:
        """On from a state, in the order of the bytes."""
        if (found := self._ways[number]) is None:
            edges, targets = self.automaton.edges, dict[tuple[int, int], set[Place]]()
            for node, stack in self.by_number[number]:
                for low, high, to in edges[node]:
                    targets.setdefault((low, high + 1), set()).add((to, stack))
            found = []
            for first, end in pairwise(sorted({byte for span in targets for byte in span})):
                places = set[Place]().union(*(at for (low, behind), at in targets.items() if low <= first < behind))
                self.count(len(targets) + len(places))
                if places:
                    found.append(Way(first, end, places))
            self._ways[number] = found
        return found

    def follow(self, way: Way) -> int:
        """The number of the state that it leads to."""
        if way.number == NONE:
            way.number = self.number(NOWHERE.union(*map(self.reach, way.places)))
            way.places.clear()  # much, of many ways, and wanted no more
        return way.number

    def row(self, number: int) -> np.ndarray:
        """The numbers of the states after each byte."""
        if not self._has_row[number]:
            row = np.full(256, NONE, np.int32)
            for way in self.ways(number):
                row[way.first : way.end] = self.follow(way)
            self.table[number] = row
            self._has_row[number] = True
        return self.table[number]

    def need_rows(self, numbers: np.ndarray) -> None:
        for number in set(numbers[~self._has_row[numbers]].tolist()):  # numpy.unique wants what packed programs lack
            self.row(number)

    # ---- parts whose repetitions can be counted

    def _is_counted(self, stack: int, many: int = 0) -> bool:
        """Whether the part on top is such a one, of at least so many repetitions until it ends or counts no more."""
        if stack == BOTTOM:
            return False
        part = self.automaton.parts[self.frames[stack][0]]
        return part.is_even and (part.most or part.least) >= many

    def split(self, state: State) -> tuple[dict[int, State], State]:
        """The places inside of such parts, by their stacks and as if nothing were below, and the others but for the end."""
        counted = dict[int, set[Place]]()
        for node, stack in state:
            if self._is_counted(stack):
                counted.setdefault(stack, set()).add((node, BOTTOM))
        others = frozenset(place for place in state if place != WHOLE and place[1] not in counted)
        return {stack: frozenset(places) for stack, places in counted.items()}, others

    def bounds(self, i: int, times: int) -> tuple[int, int]:
        """After so many repetitions of a part: how many more it needs, at least one, and how many more there can be."""
        part = self.automaton.parts[i]
        return max(part.least - times, 1), FAR - 1 if part.most is None else min(part.most - times, FAR - 1)

    # ---- long texts

    @property
    def is_large(self) -> bool:
        """Whether so much has been met that one had better begin anew."""
        return len(self.frames) > MOST_STACKS // 4 + self.n_open

    def take_over(self, others: States, state: State) -> State:
        """The same state here, where nothing else was met yet."""
        state = frozenset((node, self.stacks.take_over(others.frames, stack)) for node, stack in state)
        self.n_open = len(self.frames)
        return state
