"""A grammar as a pushdown automaton over bytes: nodes with edges for ranges of bytes, and parts that are entered and left.

In: a `Grammar`. Out: an `Automaton` without dead ends: from every node of it a whole text can be reached. Knows no tokens.

A `Part` works as a call does: its nodes are gone through as often as it says, then the text goes on at the node after it. Parts
that are entered and not yet left are a stack, whose frames count the repetitions. So a rule may hold itself, and a bound of
4,000 characters takes no 4,000 nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pocketlm.constrain.encoding import Bytes, sequences
from pocketlm.constrain.grammar import (
    EMPTY,
    EVERY,
    Chars,
    Choice,
    Either,
    Grammar,
    Listed,
    Node,
    Repeat,
    Rule,
    Sequence,
    union,
    width,
    without,
)  # fmt: skip
from pocketlm.errors import UsageError

MOST_NODES = 50_000
MOST_FLAT = 8  # characters of what is repeated, up to which it holds no counted parts itself
END = 0  # the node at the end of a part that was entered, or of the text


@dataclass(frozen=True)
class Part:
    """`body`, gone through `least` to `most` times (None: no end) from node `start`; then the text goes on at node `after`.
    `is_even`: every repetition has the same number of characters, so that there is one way to count them.
    """

    start: int
    after: int
    least: int
    most: int | None
    is_even: bool
    body: Node


@dataclass
class Automaton:
    start: int = END
    edges: list[list[tuple[int, int, int]]] = field(default_factory=lambda: [[]])  # first byte, last byte, node
    skips: list[list[int]] = field(default_factory=lambda: [[]])  # nodes reached without a byte
    entries: list[list[int]] = field(default_factory=lambda: [[]])  # parts that begin here
    parts: list[Part] = field(default_factory=list)


def build(grammar: Grammar) -> Automaton:
    """Raises UsageError where the grammar is too large, or no text has the form that it asks for."""
    builder = _Builder(grammar)
    try:
        start = builder.add(grammar.top, END)
        builder.finish()
    except RecursionError:
        raise UsageError(f"{grammar.of} is nested too deeply") from None
    made = builder.made
    alive = _prune(made)
    if not alive[start]:
        raise UsageError(f"no text can be what {grammar.of} asks for")
    made.start = start
    return made


class _Builder:
    """From the end to the beginning: a part is built once it is known which node it leads to."""

    def __init__(self, grammar: Grammar):
        self.made = Automaton()
        self._grammar = grammar
        self._chains: dict[tuple[Bytes, int], int] = {}  # (bytes, node) -> the node from which these bytes lead there
        self._bodies: dict[Node, int] = {}  # of what is repeated, and of rules
        self._waiting: list[Rule] = []
        self._nullable: dict[Node, bool] = {}

    def node(self) -> int:
        made = self.made
        if len(made.edges) >= MOST_NODES:
            raise UsageError(f"{self._grammar.of} is too large: more than {MOST_NODES} states")
        for table in (made.edges, made.skips, made.entries):
            table.append([])
        return len(made.edges) - 1

    def finish(self) -> None:
        """The rules that were named, and those that they name."""
        while self._waiting:
            rule = self._waiting.pop()
            start = self.add(self._grammar.rules[rule.name], END)
            self.made.skips[self._bodies[rule]].append(start)

    def add(self, node: Node, end: int) -> int:
        """A node from which all texts of the grammar's `node` lead to `end`."""
        made = self.made
        if isinstance(node, Chars):
            return self._chars(node, end)
        if isinstance(node, Sequence):
            for part in reversed(node.parts):
                end = self.add(part, end)
            return end
        if isinstance(node, Either):
            start = self.node()
            made.skips[start] = [self.add(part, end) for part in node.parts]
            return start
        if isinstance(node, Choice):
            return self._choice(node, end)
        if isinstance(node, Listed):
            return self._listed(node, end)
        if isinstance(node, Rule):
            return self._enter(node, 1, 1, end)
        return self._repeat(node, end)

    def _chars(self, chars: Chars, end: int) -> int:
        start = self.node()
        for spans in sequences(chars):
            self._chain(start, spans, end)
        return start

    def _chain(self, start: int, spans: Bytes, end: int) -> None:
        """Let these bytes lead from start to end. Ways with the same last bytes share the nodes of these."""
        for at in range(len(spans) - 1, 0, -1):
            key = spans[at:], end
            found = self._chains.get(key)
            if found is None:
                found = self._chains[key] = self.node()
                self.made.edges[found] = [(*span, self._chains.get((spans[at + 1 :], end), end)) for span in spans[at]]
        target = self._chains.get((spans[1:], end), end)
        self.made.edges[start] += [(*span, target) for span in spans[0]]

    def _repeat(self, node: Repeat, end: int) -> int:
        body, least, most = node.body, node.least, node.most
        if most == 0:
            return end
        if (least, most) == (1, 1):
            return self.add(body, end)
        if (least, most) == (0, 1):
            start = self.node()
            self.made.skips[start] = [end, self.add(body, end)]
            return start
        if not self.nullable(body):
            return self._enter(body, least, most, end)
        if most is None:  # a body that may be empty: it may as well be left out
            start = self.node()
            self.made.skips[start] = [end, self.add(body, start)]
            return start
        after = end
        for _ in range(most):
            start = self.node()
            self.made.skips[start] = [end, self.add(body, after)]
            after = start
        return after

    def _enter(self, body: Node, least: int, most: int | None, end: int) -> int:
        even = not isinstance(body, Rule) and width(body)
        if even and even <= MOST_FLAT:
            body = _flat(body)
        found = self._bodies.get(body)
        if found is None:
            if isinstance(body, Rule):
                found = self._bodies[body] = self.node()
                self._waiting.append(body)
            else:
                found = self._bodies[body] = self.add(body, END)
        start = self.node()
        self.made.entries[start].append(len(self.made.parts))
        self.made.parts.append(Part(found, end, least, most, bool(even), body))
        return start

    def _choice(self, node: Choice, end: int) -> int:
        """A tree by the characters of the texts, so that many cost no more than they are long."""
        quoted, others = node.quoted, node.others
        tree: dict[str, dict] = {}
        for text in node.texts:
            here = tree
            for character in text:
                here = here.setdefault(character, {})
            here[""] = {}
        order, work, made = list[dict[str, dict]](), [tree], dict[int, int]()
        while work:
            order.append(here := work.pop())
            work += [below for character, below in here.items() if character]
        anything = self.add(Repeat(Chars(EVERY, quoted), 0, None), end) if others else END
        for here in reversed(order):
            start = made[id(here)] = self.node()
            if ("" in here) is not others:
                self.made.skips[start].append(end)
            known = sorted((ord(character), below) for character, below in here.items() if character)
            for code, below in known:
                for spans in sequences(Chars(((code, code),), quoted, quoted and not others)):
                    self._chain(start, spans, made[id(below)])
            if others:
                unknown = without(EVERY, union((code, code) for code, _ in known))
                self.made.skips[start].append(self.add(Chars(unknown, quoted), anything))
        return made[id(tree)]

    def _listed(self, node: Listed, end: int) -> int:
        """Two rows of nodes: where no part is there yet, and where one is and a separator has to come before the next."""
        none, some = end, end
        for part, is_required in reversed(node.parts):
            entry = self.add(part, some)
            parted = self.add(node.separator, entry)
            before_none, before_some = self.node(), self.node()
            self.made.skips[before_none] = [entry] if is_required else [entry, none]
            self.made.skips[before_some] = [parted] if is_required else [parted, some]
            none, some = before_none, before_some
        return none

    def nullable(self, node: Node) -> bool:
        """Whether it may be empty. Rules never are."""
        if isinstance(node, Chars | Rule):
            return False
        if isinstance(node, Choice):
            return ("" in node.texts) is not node.others
        if isinstance(node, Listed):
            return not any(is_required for _, is_required in node.parts)
        if node not in self._nullable:
            if isinstance(node, Repeat):
                found = node.least == 0 or self.nullable(node.body)
            else:
                found = (all if isinstance(node, Sequence) else any)(self.nullable(part) for part in node.parts)
            self._nullable[node] = found
        return self._nullable[node]


def _flat(node: Node) -> Node:
    """The same without repetitions of a fixed number. A counted part in another has a way out for each count of that one."""
    if isinstance(node, Sequence | Either):
        return type(node)(tuple(map(_flat, node.parts)))
    if width(node) == 0:  # however often it is repeated
        return EMPTY
    if isinstance(node, Repeat) and node.least == node.most:
        return Sequence((_flat(node.body),) * node.least)
    return node


def _prune(made: Automaton) -> list[bool]:
    """Take out what leads nowhere; returns which nodes lead to the end, bool [n_nodes]."""
    n = len(made.edges)
    before: list[list[int]] = [[] for _ in range(n)]  # nodes that may come alive when this one does
    for node in range(n):
        for target in {*(edge[2] for edge in made.edges[node]), *made.skips[node]}:
            before[target].append(node)
        for part in (made.parts[i] for i in made.entries[node]):
            before[part.after].append(node)
            before[part.start].append(node)
    alive = [False] * n
    alive[END] = True

    def comes_alive(node: int) -> bool:
        if any(alive[edge[2]] for edge in made.edges[node]) or any(alive[target] for target in made.skips[node]):
            return True
        return any(alive[p.after] and (p.least == 0 or alive[p.start]) for p in (made.parts[i] for i in made.entries[node]))

    work = before[END].copy()
    while work:
        node = work.pop()
        if not alive[node] and comes_alive(node):
            alive[node] = True
            work += before[node]
    for node in range(n):
        made.edges[node] = [edge for edge in made.edges[node] if alive[edge[2]]]
        made.skips[node] = [target for target in made.skips[node] if alive[target]]
        kept = []
        for i in made.entries[node]:
            part = made.parts[i]
            if alive[part.after] and alive[part.start]:
                kept.append(i)
            elif alive[part.after] and part.least == 0:
                made.skips[node].append(part.after)
        made.entries[node] = kept
    return alive
