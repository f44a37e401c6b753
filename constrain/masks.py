"""Which tokens may come next: an automaton beside a vocabulary.

In: an `Automaton`, a `Vocabulary`. Out: for each state a mask of exactly those tokens after which the text can still become
whole. Knows no model and no grammar.

A mask is found by walking the vocabulary's tree, each branch with its own state: level by level, all branches at once, or node
by node while they are few. It is kept with the state it belongs to.

Some parts have repetitions that can be counted, above all the characters of a string. Inside one, one walk of the tree serves
every count: `_inside` finds how many repetitions lead to each node. A mask then only compares these numbers with what the
bounds still allow. So a string of at most 4,000 characters does not cost 4,000 walks, nor a line break 32 for the spaces that
may follow it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocketlm import locks
from pocketlm.constrain.automaton import Automaton
from pocketlm.constrain.states import BOTTOM, FAR, NONE, WHOLE, State, States
from pocketlm.constrain.vocabulary import Vocabulary
from pocketlm.errors import UsageError

MOST_MASK_BYTES = 1 << 23
FEW_BYTES = 8  # if at most so many may follow a part, their nodes are looked up; if more, all nodes are compared
FEW_NODES = 12  # of a level: up to here a loop in Python is faster than NumPy
MOST_KEPT, MOST_ALIKE = 8, 16  # walks that a cache holds; masks that states with other counts share
MOST_COUNTED, MOST_INSIDES = 48, 256  # walks inside counted parts, of all forms: from the root, and below inner nodes
MOST_INSIDE_NODES = 1 << 12  # how large these may be
ROOT = np.zeros(1, np.int64)


@dataclass
class Inside:
    """`nodes` [k]: nodes of the tree that are reached without leaving a part; `needed` [k], int16: how many repetitions that
    takes, one that is not complete included; `ends` [k]: whether one has just ended.
    """

    nodes: np.ndarray
    needed: np.ndarray
    ends: np.ndarray


@dataclass
class Leaving:
    """How tokens leave a repeated part, whatever its count is.

    `nodes` [k]: nodes of the tree that the first byte behind the part leads to; `states` [k]: the numbers of the states there;
    `inner` [k]: repetitions that are complete before that byte. `ids` [m]: the tokens that end at or below one of these nodes;
    `before` [m]: repetitions that each completes before it leaves. `is_plain`: none of the nodes is reached from another, so
    that each token leaves in one way.
    """

    nodes: np.ndarray
    states: np.ndarray
    inner: np.ndarray
    ids: np.ndarray
    before: np.ndarray
    is_plain: bool


class Masks:
    """The masks of one automaton's states. Any thread may use it."""

    def __init__(self, automaton: Automaton, vocabulary: Vocabulary, of: str):
        self.vocabulary, self.of = vocabulary, of
        self._lock = locks.ForkedLock()
        self._states = States(automaton, of)
        self._masks: dict[State, np.ndarray] = {}
        self._mask_bytes = 0
        self._own = object()  # stands for these masks in the vocabulary's caches
        self._leaving: dict[Hashable, Leaving] = {}
        self._beside: dict[State, np.ndarray] = {}
        self._alike: dict[Hashable, np.ndarray] = {}  # see `_between`
        self.start = self._states.start

    @property
    def is_large(self) -> bool:
        """Whether so much has been met that one had better begin anew."""
        return self._states.is_large

    def anew(self, state: State) -> tuple[Masks, State]:
        """Masks that have met nothing, and the same state there: what a long text has left behind is forgotten."""
        masks = Masks(self._states.automaton, self.vocabulary, self.of)
        return masks, masks._states.take_over(self._states, state)

    def _begin(self) -> None:
        if self._states.begin():
            self._leaving.clear()  # it holds their numbers

    def advance(self, state: State, data: bytes) -> State:
        """The state after these bytes; NOWHERE where they cannot come. Raises UsageError as `mask`."""
        with self._lock.here:
            self._begin()
            for byte in data:  # few states of a text are met again: a row for each would take longer
                state = self._states.step(state, byte)
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

    def _compute(self, state: State) -> np.ndarray:
        counted, others = self._states.split(state)
        key = others, WHOLE in state, frozenset(self._between(*part) for part in counted.items())
        if (found := self._alike.get(key)) is None:
            found = self._made(counted, others, WHOLE in state)
            if counted:
                _keep(self._alike, key, found, MOST_ALIKE)
        return found

    def _made(self, counted: dict[int, State], others: State, is_whole: bool) -> np.ndarray:
        vocabulary, allowed = self.vocabulary, np.zeros(self.vocabulary.n_vocab, bool)
        if others:
            if (reached := self._beside.get(others)) is None:
                reached = self._walk(ROOT, np.array([self._states.number(others)]))
                if counted:  # beside a counted part it is the same at every count
                    _keep(self._beside, others, reached)
            self._mark(reached, allowed)
        for stack, places in counted.items():
            self._repeated(stack, places, allowed)
        if is_whole:
            allowed[vocabulary.end_ids] = True
        n = np.count_nonzero(allowed)
        if not n and not is_whole:
            raise UsageError(f"{self.of}: the model has no token that could come next; its vocabulary lacks the characters")
        return allowed.nonzero()[0] if n * 8 <= len(allowed) else ~allowed

    def _mark(self, nodes: np.ndarray, allowed: np.ndarray) -> None:
        """The tokens that end at these nodes are allowed."""
        vocabulary = self.vocabulary
        if len(nodes) < vocabulary.n_nodes // 8:
            allowed[vocabulary.at(nodes)[0]] = True
        else:
            alive = np.zeros(vocabulary.n_nodes, bool)
            alive[nodes] = True
            allowed |= alive[vocabulary.node_of]

    # ---- along the tree

    def _walk(self, nodes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """The nodes that can be reached below `nodes` [k], where the states have these numbers [k]; some may be there twice."""
        vocabulary, states, found = self.vocabulary, self._states, [nodes[:0]]
        while len(nodes):
            if len(nodes) <= FEW_NODES:
                nodes, numbers = self._walk_few(nodes.tolist(), numbers.tolist(), found)
                continue
            states.need_rows(numbers)
            children, counts = vocabulary.below(nodes)
            numbers = states.table[np.repeat(numbers, counts), vocabulary.byte[children]]
            kept = numbers != NONE
            nodes, numbers = children[kept], numbers[kept]
            found.append(nodes)
            if sum(map(len, found)) > 2 * vocabulary.n_nodes:  # many were reached several times
                seen = np.zeros(vocabulary.n_nodes, bool)
                seen[np.concatenate(found)] = True
                found = [seen.nonzero()[0]]
        return np.concatenate(found)

    def _walk_few(self, nodes: list[int], numbers: list[int], found: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The same node by node, which is faster while they are few. What is reached goes to `found`; the nodes and states
        where it stopped: none, or more than FEW_NODES, or where counted parts were left.
        """
        byte, first, last = self.vocabulary.plain
        states, reached, counted = self._states, list[int](), dict[int, list[int]]()
        while 0 < len(nodes) <= FEW_NODES:
            to_nodes, to_numbers = list[int](), list[int]()
            for node, number in zip(nodes, numbers, strict=True):
                start, stop = first[node], last[node]
                if start == stop:
                    continue
                if states.is_inside[number]:
                    counted.setdefault(number, []).append(node)
                    continue
                for way in states.ways(number):  # children are in the order of their bytes
                    low, end = bisect_left(byte, way.first, start, stop), bisect_left(byte, way.end, start, stop)
                    if low < end:
                        reached += range(low, end)
                        to_nodes += range(low, end)
                        to_numbers += [states.follow(way)] * (end - low)
            nodes, numbers = to_nodes, to_numbers
        found.append(np.array(reached, np.int64))
        behind = [(np.array(nodes, np.int64), np.array(numbers, np.int64))]
        for number, at in counted.items():
            behind += self._past(np.array(at), number, found)
        return np.concatenate([at for at, _ in behind]), np.concatenate([at for _, at in behind])

    def _past(self, nodes: np.ndarray, number: int, found: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Through the counted parts that this state is in, each in one go: the nodes where it is left, and the states there."""
        states = self._states
        counted, others = states.split(states.by_number[number])
        if others:
            yield nodes, np.full(len(nodes), states.number(others))
        for stack, places in counted.items():
            i, times, below = states.frames[stack]
            least, most = states.bounds(i, times)
            for inside in self._inside(i, places, nodes, most):
                found.append(inside.nodes)
                ends = inside.nodes[inside.ends & (inside.needed >= least)]
                yield ends, np.full(len(ends), states.number_after(i, below))

    # ---- parts whose repetitions can be counted

    def _between(self, stack: int, places: State) -> Hashable:
        """Of a counted part all that its tokens depend on: most counts have the same bounds for all tokens that there are."""
        i, times, below = self._states.frames[stack]
        least, most = self._states.bounds(i, times)
        bounds = [(bisect_left(steps, least), bisect_right(steps, most)) for *_, steps in self._counts(i, places)]
        return i, places, below, *bounds

    def _repeated(self, stack: int, places: State, allowed: np.ndarray) -> None:
        """Allow the tokens that stay inside the counted part on top of the stack, and those that leave it. `places`: where in
        the part the text is.
        """
        i, times, below = self._states.frames[stack]
        least, most = self._states.bounds(i, times)
        for n, (needed, through, _) in enumerate(self._counts(i, places)):
            allowed |= needed <= most
            kept = self._leaving.get(key := (i, places, n, below))
            if kept is None:
                kept = self._leave(self._states.number_after(i, below), through)
                _keep(self._leaving, key, kept)
            fits = (kept.inner >= least) & (kept.inner <= most)
            if kept.is_plain or fits.all():
                allowed[kept.ids[(kept.before >= least) & (kept.before <= most)]] = True
            else:
                nodes = kept.nodes[fits]
                self._mark(np.concatenate([nodes, self._walk(nodes, kept.states[fits])]), allowed)

    def _leave(self, number: int, through: np.ndarray) -> Leaving:
        """The ways out of a part, to the state of this number behind it; `through` is that of `_counts`."""
        vocabulary, row = self.vocabulary, self._states.row(number)
        first = (row != NONE).nonzero()[0]
        if len(first) <= FEW_BYTES:
            nodes = vocabulary.with_bytes(first.tolist())
        else:
            nodes = 1 + (row[vocabulary.byte[1:]] != NONE).nonzero()[0]
        inner = through[vocabulary.parent[nodes]]
        nodes, inner = nodes[inner > 0], inner[inner > 0]
        states = row[vocabulary.byte[nodes]]
        reached = np.concatenate([nodes, self._walk(nodes, states)])
        position = np.empty(vocabulary.n_nodes, np.int32)
        position[reached] = np.arange(len(reached))
        before, above = np.full(len(reached), -1, np.int16), position[vocabulary.parent[reached]]
        before[: len(nodes)] = inner
        at = np.arange(len(nodes), len(reached))
        while len(at):  # as many as at the way out above: who does not know them yet looks twice as far up
            before[at] = found = before[above[at]]
            at = at[found < 0]
            above[at] = above[above[at]]
        ids, n = vocabulary.at(reached)
        is_plain = bool((position[nodes] < len(nodes)).all())
        return Leaving(nodes, states, inner, ids, np.repeat(before, n), is_plain)

    def _counts(self, i: int, places: State) -> list[tuple[np.ndarray, np.ndarray, list[int]]]:
        """`_inside` from the root, for every token and node.

        `needed`, int16 (n_vocab,): how many repetitions a token takes, FAR where it does not stay inside. `through`, int16
        (n_nodes,): how many are complete at a node where one has just ended, else 0.
        """
        vocabulary, key = self.vocabulary, self._inside_key(i, places)
        if (found := vocabulary.counted.get(key)) is None:
            found = []
            for inside in self._inside(i, places, ROOT, FAR):
                needed, through = np.full(vocabulary.n_nodes, FAR, np.int16), np.zeros(vocabulary.n_nodes, np.int16)
                needed[inside.nodes], through[inside.nodes] = inside.needed, inside.needed * inside.ends
                steps = np.bincount(inside.needed).nonzero()[0].tolist()
                found.append((needed[vocabulary.node_of], through, steps))  # tokens that may not come: the root's, which is FAR
            _keep(vocabulary.counted, key, found, MOST_COUNTED)
        return found

    def _inside(self, i: int, places: State, nodes: np.ndarray, most: int) -> list[Inside]:
        """What is below these nodes of the tree for a text that is at these places in part `i` and stays there for at most so
        many repetitions. Each place has an answer of its own, in their order, where one ends for some of them and goes on for
        others.
        """
        vocabulary, states = self.vocabulary, self._states
        key = self._inside_key(i, places), most, nodes.tobytes()
        if (found := vocabulary.insides.get(key)) is not None:
            return found
        again = states.number(states.reach((states.automaton.parts[i].start, BOTTOM)))
        numbers, counts = np.full(len(nodes), states.number(places)), np.zeros(len(nodes), np.int16)
        at, levels = nodes, [(nodes[:0], counts[:0], np.zeros(0, bool))]
        while len(at):
            states.need_rows(numbers)
            children, n = vocabulary.below(at)
            numbers, counts = states.table[np.repeat(numbers, n), vocabulary.byte[children]], np.repeat(counts, n)
            fits = (numbers != NONE) & (counts < most)
            at, numbers, counts = children[fits], numbers[fits], counts[fits]
            ends = states.is_whole[numbers]
            if len(places) > 1 and any(len(states.by_number[number]) > 1 for number in set(numbers[ends].tolist())):
                return [one for place in sorted(places) for one in self._inside(i, frozenset((place,)), nodes, most)]
            levels.append((at, counts + 1, ends))
            counts = counts + ends
            numbers = np.where(ends, again, numbers)
        found = [Inside(*map(np.concatenate, zip(*levels, strict=True)))]
        if len(found[0].nodes) <= MOST_INSIDE_NODES:
            _keep(vocabulary.insides, key, found, MOST_INSIDES)
        return found

    def _inside_key(self, i: int, places: State) -> Hashable:
        """What a walk inside a part depends on: at its beginning on what is repeated alone; strings of all forms share that."""
        part = self._states.automaton.parts[i]
        return part.body if places == self._states.reach((part.start, BOTTOM)) else (self._own, part.start, places)


def _keep(cache: dict[Any, Any], key: Hashable, value: Any, most: int = MOST_KEPT) -> None:
    """Keep it; a cache that is full is emptied first."""
    if len(cache) >= most:
        cache.clear()
    cache[key] = value
