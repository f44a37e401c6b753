"""Which tokens may come next: an automaton beside a vocabulary.

In: an `Automaton`, a `Vocabulary`. Out: for each state a mask of the tokens that a whole text can go on with, exactly these.
Knows no model and no grammar.

A state is a set of (node, stack of the parts that were entered). For a mask, the tree of the vocabulary is walked by all its
branches at once, one level after the other; what follows each byte is a row of 256, made when a state is first met, and
forgotten when there are many. A mask is kept with its state. Inside a repeated part whose repetitions can be counted (the
characters of a string, above all) the tree is walked once: it says for every token how many repetitions it needs, or has before
it leaves the part. So a string of at most 4,000 characters costs no 4,000 walks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pocketlm import locks
from pocketlm.constrain.automaton import END, Automaton
from pocketlm.constrain.stacks import BOTTOM, Stacks
from pocketlm.constrain.vocabulary import Vocabulary
from pocketlm.errors import UsageError

MOST_ROWS = 1 << 13  # of 1 KB each
MOST_STACKS = 1 << 16
MOST_STEPS = 200_000  # for one mask
MOST_MASK_BYTES = 1 << 23
NONE = -1
FEW_BYTES = 8
FEW_NODES = 12
FEW_CHILDREN = 24
MOST_COUNTED = 8
FAR = np.iinfo(np.int16).max  # tokens are shorter

Place = tuple[int, int]  # node, stack
State = frozenset[Place]
WHOLE: Place = END, BOTTOM
NOWHERE: State = frozenset()


@dataclass
class Leaving:
    """Nodes of the tree by which a repeated part is left, the state there, and how many repetitions are through before it.

    `ids`: the tokens that lead that way out, and `before`: how many repetitions each of them has before it. `is_plain`: no
    token leaves the part by two of the nodes.
    """

    nodes: np.ndarray
    states: np.ndarray
    inner: np.ndarray
    ids: np.ndarray
    before: np.ndarray
    is_plain: bool


class Masks:
    """The states of one automaton, and their masks. Any thread may use it."""

    def __init__(self, automaton: Automaton, vocabulary: Vocabulary, of: str):
        self.vocabulary, self.of = vocabulary, of
        self._automaton = automaton
        self._lock = locks.ForkedLock()
        self._stacks, self._n_open = Stacks(), 0
        self._frames = self._stacks.frames
        self._masks: dict[State, np.ndarray] = {}
        self._mask_bytes = 0
        self._counted: dict[Hashable, tuple[np.ndarray, np.ndarray]] = {}
        self._forget()
        self.start: State = self._reach((automaton.start, BOTTOM))

    def _forget(self) -> None:
        """The numbers of states, and what follows them."""
        self._reached: dict[Place, State] = {}
        self._states: list[State] = []
        self._number_of: dict[State, int] = {}
        self._table = np.full((64, 256), NONE, np.int32)
        self._has_row = np.zeros(64, bool)
        self._is_whole = np.zeros(64, bool)
        self._leaving: dict[Hashable, Leaving] = {}
        self._beside: dict[State, np.ndarray] = {}
        self._steps = 0

    def _begin(self) -> None:
        self._steps = 0
        if len(self._states) > MOST_ROWS // 2:
            self._forget()

    @property
    def is_large(self) -> bool:
        """Whether so much has been met that one had better begin anew."""
        return len(self._frames) > MOST_STACKS // 4 + self._n_open

    def anew(self, state: State) -> tuple[Masks, State]:
        """Masks that have met nothing, and the same state there: what a long text has left behind is forgotten."""
        masks = Masks(self._automaton, self.vocabulary, self.of)
        state = frozenset((node, masks._stacks.take_over(self._frames, stack)) for node, stack in state)
        masks._n_open = len(masks._frames)
        return masks, state

    def advance(self, state: State, data: bytes) -> State:
        """The state after these bytes; NOWHERE where they cannot come. Raises UsageError as `mask`."""
        with self._lock.here:
            self._begin()
            for byte in data:  # few states of a text are met again: a row for each would take longer
                state = self._step(state, byte)
            return state

    def mask(self, state: State) -> np.ndarray:
        """What may come, as runtime/sampling.py's `Allowed` says it: ids where these are few, else for each token whether not.

        Raises UsageError where a text can be read in so many ways that this would take too much time or memory.
        """
        with self._lock.here:
            found = self._masks.get(state)
            if found is None:
                self._begin()
                found = self._compute(state)
                self._mask_bytes += found.nbytes
                while self._mask_bytes > MOST_MASK_BYTES and self._masks:
                    self._mask_bytes -= self._masks.pop(next(iter(self._masks))).nbytes
                self._masks[state] = found
            return found

    # ---- states

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MOST_STEPS or len(self._states) >= MOST_ROWS or len(self._frames) >= MOST_STACKS:
            raise UsageError(f"{self.of} can be read in too many ways at once; make it simpler")

    def _reach(self, place: Place) -> State:
        """Where one is without another byte: the places that have edges, and the end of the whole text."""
        found = self._reached.get(place)
        if found is not None:
            return found
        automaton, parts = self._automaton, self._automaton.parts
        work, seen, kept = [place], {place}, []
        while work:
            here = node, stack = work.pop()
            if node == END and stack == BOTTOM:
                kept.append(here)
                continue
            targets: list[Place] = []
            if node == END:
                i, times, below = self._frames[stack]
                part, times = parts[i], times + 1
                if times >= part.least:
                    targets.append((part.after, below))
                if part.most is None or times < part.most:
                    times = min(times, part.least) if part.most is None else times
                    targets.append((part.start, self._stacks.push(i, times, below)))
            else:
                if automaton.edges[node]:
                    kept.append(here)
                targets += [(target, stack) for target in automaton.skips[node]]
                for i in automaton.entries[node]:
                    if not parts[i].least:
                        targets.append((parts[i].after, stack))
                    targets.append((parts[i].start, self._stacks.push(i, 0, stack)))
            self._count(1 + len(targets))
            for target in targets:
                if target not in seen:
                    seen.add(target)
                    work.append(target)
        found = self._reached[place] = frozenset(kept)
        return found

    def _number(self, state: State) -> int:
        found = self._number_of.get(state)
        if found is None:
            self._count(len(state))
            found = self._number_of[state] = len(self._states)
            self._states.append(state)
            if found == len(self._table):
                self._table = np.concatenate([self._table, np.full_like(self._table, NONE)])
                self._has_row = np.concatenate([self._has_row, np.zeros_like(self._has_row)])
                self._is_whole = np.concatenate([self._is_whole, np.zeros_like(self._is_whole)])
            self._is_whole[found] = WHOLE in state
        return found

    def _step(self, state: State, byte: int) -> State:
        """The state after one more byte."""
        edges = self._automaton.edges
        reached = [
            self._reach((target, stack)) for node, stack in state for low, high, target in edges[node] if low <= byte <= high
        ]
        return NOWHERE.union(*reached) if len(reached) != 1 else reached[0]

    def _after(self, number: int, byte: int) -> int:
        """The number of the state after one more byte, or NONE: for few bytes faster than a row."""
        state = self._step(self._states[number], byte)
        return self._number(state) if state else NONE

    def _row(self, number: int) -> np.ndarray:
        """The numbers of the states after each byte."""
        if not self._has_row[number]:
            edges = self._automaton.edges
            spans = [
                (low, high, self._reach((target, stack)))
                for node, stack in self._states[number]
                for low, high, target in edges[node]
            ]
            starts = sorted({span[0] for span in spans} | {span[1] + 1 for span in spans})
            row = np.full(256, NONE, np.int32)
            for low, end in pairwise(starts):
                reached = {places for first, last, places in spans if first <= low <= last}
                self._count(len(spans))
                if reached:
                    row[low:end] = self._number(frozenset().union(*reached))
            self._table[number] = row
            self._has_row[number] = True
        return self._table[number]

    def _need_rows(self, states: np.ndarray) -> None:
        missing = states[~self._has_row[states]]
        if len(missing):
            for number in set(missing.tolist()):  # numpy.unique wants what packed programs lack
                self._row(number)

    # ---- masks

    def _compute(self, state: State) -> np.ndarray:
        vocabulary, automaton = self.vocabulary, self._automaton
        allowed = np.zeros(vocabulary.n_vocab, bool)
        counted: dict[int, list[Place]] = {}  # stack -> places in the part on top of it
        others: list[Place] = []
        for place in state:
            node, stack = place
            if stack != BOTTOM and automaton.parts[self._frames[stack][0]].is_even:
                counted.setdefault(stack, []).append((node, BOTTOM))
            elif place != WHOLE:
                others.append(place)
        if others:
            root, at = np.zeros(1, np.int64), frozenset(others)
            if (reached := self._beside.get(at)) is None:
                reached = self._walk(root, np.array([self._number(at)]))
                if counted:  # beside a counted part it is the same at every count
                    _keep(self._beside, at, reached)
            self._mark(reached, allowed)
        for stack, places in counted.items():
            self._repeated(stack, frozenset(places), allowed)
        if WHOLE in state:
            allowed[vocabulary.end_ids] = True
        n = np.count_nonzero(allowed)
        if not n and WHOLE not in state:
            raise UsageError(f"{self.of}: the model has no token that could come next; its vocabulary lacks the characters")
        return allowed.nonzero()[0] if n * 8 <= len(allowed) else ~allowed

    def _mark(self, nodes: np.ndarray, allowed: np.ndarray) -> None:
        """The tokens that end at these nodes are allowed."""
        vocabulary = self.vocabulary
        if len(nodes) < vocabulary.n_nodes // 8:
            allowed[vocabulary.at(nodes)] = True
        else:
            alive = np.zeros(vocabulary.n_nodes, bool)
            alive[nodes] = True
            allowed |= alive[vocabulary.node_of]

    def _walk(self, nodes: np.ndarray, states: np.ndarray) -> np.ndarray:
        """What can be reached in the tree of the vocabulary below these nodes, where the text is in these states."""
        vocabulary, found = self.vocabulary, [nodes[:0]]
        while len(nodes):
            if len(nodes) <= FEW_NODES:
                nodes, states = self._walk_few(nodes.tolist(), states.tolist(), found)
                continue
            self._need_rows(states)
            children, counts = vocabulary.below(nodes)
            states = self._table[np.repeat(states, counts), vocabulary.byte[children]]
            kept = states != NONE
            nodes, states = children[kept], states[kept]
            found.append(nodes)
            if sum(map(len, found)) > 2 * vocabulary.n_nodes:  # many were reached several times
                seen = np.zeros(vocabulary.n_nodes, bool)
                seen[np.concatenate(found)] = True
                found = [seen.nonzero()[0]]
        return np.concatenate(found)

    def _walk_few(self, nodes: list[int], states: list[int], found: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The same node by node, which is faster as long as they are few: along 80 spaces, say. Where it has come to."""
        byte, first, last = self.vocabulary.plain
        edges, through = self._automaton.edges, list[int]()
        while 0 < len(nodes) <= FEW_NODES:
            children, reached = list[int](), list[int]()
            for node, state in zip(nodes, states, strict=True):
                below: Iterable[int] = range(start := first[node], stop := last[node])
                row = self._table[state] if self._has_row[state] else None
                if row is None:
                    spans = {(low, high) for place, _ in self._states[state] for low, high, _ in edges[place]}
                    below = {  # children are in the order of their bytes
                        child
                        for low, high in spans
                        for child in range(bisect_left(byte, low, start, stop), bisect_right(byte, high, start, stop))
                    }
                    if len(below) > FEW_CHILDREN:
                        row = self._row(state)
                for child in below:
                    to = self._after(state, byte[child]) if row is None else int(row[byte[child]])
                    if to != NONE:
                        children.append(child)
                        reached.append(to)
            through += children
            nodes, states = children, reached
        found.append(np.array(through, np.int64))
        return np.array(nodes, np.int64), np.array(states, np.int64)

    def _repeated(self, stack: int, places: State, allowed: np.ndarray) -> None:
        """Mark the tokens that can come inside the part on top of the stack, and out of it."""
        i, times, below = self._frames[stack]
        part, counts = self._automaton.parts[i], self._counts(i, places)
        if counts is None:
            for place in places:
                self._repeated(stack, frozenset((place,)), allowed)
            return
        needed, through = counts
        least, most = max(part.least - times, 1), FAR - 1 if part.most is None else min(part.most - times, FAR - 1)
        allowed |= needed <= most
        # where the part may be left at an inner node of the tree, it goes on behind it: mostly whatever the count is
        kept = self._leaving.get(key := (i, places, below))
        if kept is None:
            kept = self._leave(self._number(self._reach((part.after, below))), through)
            _keep(self._leaving, key, kept)
        fits = (kept.inner >= least) & (kept.inner <= most)
        if kept.is_plain or fits.all():
            allowed[kept.ids[(kept.before >= least) & (kept.before <= most)]] = True
        else:
            nodes = kept.nodes[fits]
            self._mark(np.concatenate([nodes, self._walk(nodes, kept.states[fits])]), allowed)

    def _leave(self, number: int, through: np.ndarray) -> Leaving:
        """Out of a part, to a state; `through`: see `_counts`."""
        vocabulary, row = self.vocabulary, self._row(number)
        first = (row != NONE).nonzero()[0]
        if len(first) <= FEW_BYTES:
            nodes = vocabulary.with_bytes(first.tolist())
        else:
            nodes = 1 + (row[vocabulary.byte[1:]] != NONE).nonzero()[0]
        inner = through[vocabulary.parent[nodes]]
        nodes, inner = nodes[inner > 0], inner[inner > 0]
        states = row[vocabulary.byte[nodes]]
        behind = self._walk(nodes, states)
        repetitions = np.zeros(vocabulary.n_nodes, np.int16)
        repetitions[behind] = -1
        is_plain = not repetitions[nodes].any()
        repetitions[nodes] = inner
        at, above = behind[repetitions[behind] < 0], vocabulary.parent.copy()
        while len(at):  # as many as before its parent: who does not know it yet looks twice as far up
            repetitions[at] = found = repetitions[above[at]]
            at = at[found < 0]
            above[at] = above[above[at]]
        found = repetitions[vocabulary.node_of]
        ids = found.nonzero()[0]
        return Leaving(nodes, states, inner, ids, found[ids], is_plain)

    def _counts(self, i: int, places: State) -> tuple[np.ndarray, np.ndarray] | None:
        """From the root of the tree inside a part and never out of it: for each token how many repetitions are needed, FAR
        where that leads nowhere, int16 (n_vocab,); for each node how many are through where one is at the end of one, else 0,
        int16 (n_nodes,). None where not all of several places come to the end of one at the same time.
        """
        vocabulary, part = self.vocabulary, self._automaton.parts[i]
        first = self._reach((part.start, BOTTOM))
        # of what is at its beginning it depends on nothing but what is repeated: every string has the same
        kept_in, key = (vocabulary.counted, part.body) if places == first else (self._counted, (part.start, places))
        if (found := kept_in.get(key)) is not None:
            return found
        needed, through = np.full(vocabulary.n_nodes, FAR, np.int16), np.zeros(vocabulary.n_nodes, np.int16)
        nodes, states, counts = np.zeros(1, np.int64), np.array([self._number(places)]), np.zeros(1, np.int16)
        while len(nodes):
            self._need_rows(states)
            children, n = vocabulary.below(nodes)
            states, counts = self._table[np.repeat(states, n), vocabulary.byte[children]], np.repeat(counts, n)
            kept = states != NONE
            nodes, states, counts = children[kept], states[kept], counts[kept]
            ends = self._is_whole[states]
            if len(places) > 1 and any(len(self._states[number]) > 1 for number in set(states[ends].tolist())):
                return None
            counts = counts + ends
            needed[nodes] = counts + ~ends
            through[nodes] = counts * ends
            states = np.where(ends, self._number(first), states)
        found = needed[vocabulary.node_of], through  # the root's is FAR
        _keep(kept_in, key, found)
        return found


def _keep(cache: dict[Any, Any], key: Hashable, value: Any) -> None:
    """Remember it; what was before, when that is much, no longer."""
    if len(cache) >= MOST_COUNTED:
        cache.clear()
    cache[key] = value
