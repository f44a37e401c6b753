"""The tokens of a vocabulary as a tree of their bytes, in arrays that are walked a level at a time.

In: the bytes of each token; none for tokens that may not come, such as control tokens. Out: the tree. Knows no model.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any

import numpy as np


class Vocabulary:
    """Node 0 is the root. Children of a node are neighbours, in the order of their bytes; a level follows the one above it.

    Arrays: `byte`, `parent`, `first_child`, `n_children` [n_nodes]; `node_of` [n_vocab], the node where each token ends,
    the root for those that may not come; `end_ids`, the tokens that end a text. `insides`, `counted`: caches of `Masks`.
    """

    def __init__(self, tokens: Sequence[bytes], end_ids: Sequence[int], n_vocab: int):
        """`n_vocab`: of the model, which may have rows beyond its tokens."""
        self.n_vocab = n_vocab
        self.end_ids = np.array(sorted(end_ids), np.intp)
        self.tokens = tokens
        self.insides: dict[Hashable, Any] = {}
        self.counted: dict[Hashable, Any] = {}
        ids = np.array(sorted([id for id, data in enumerate(tokens) if data], key=tokens.__getitem__), np.intp)
        sizes = np.fromiter(map(len, tokens), np.int64, len(tokens))
        starts = (np.cumsum(sizes) - sizes)[ids]
        sizes, data = sizes[ids], np.frombuffer(b"".join(tokens), np.uint8)
        self.node_of = np.zeros(n_vocab, np.intp)
        node = np.zeros(len(ids), np.int64)  # of each token, as far as we have come
        alive = np.arange(len(ids))
        bytes_, parents, n_nodes = [np.zeros(1, np.uint8)], [np.zeros(1, np.int64)], 1
        for depth in range(int(sizes.max(initial=0))):
            alive = alive[sizes[alive] > depth]
            byte, parent = data[starts[alive] + depth], node[alive]
            # in sorted tokens, those of one node are neighbours
            is_new = np.ones(len(alive), bool)
            is_new[1:] = (byte[1:] != byte[:-1]) | (parent[1:] != parent[:-1])
            node[alive] = n_nodes - 1 + np.cumsum(is_new)
            bytes_.append(byte[is_new])
            parents.append(parent[is_new])
            n_nodes += int(is_new.sum())
            over = alive[sizes[alive] == depth + 1]
            self.node_of[ids[over]] = node[over]
        self.n_nodes = n_nodes
        self.byte, self.parent = np.concatenate(bytes_), np.concatenate(parents)
        self.n_children = np.bincount(self.parent[1:], minlength=n_nodes)
        self.first_child = 1 + np.cumsum(self.n_children) - self.n_children

    def below(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All children of the nodes, and how many each node has."""
        counts = self.n_children[nodes]
        return _ranges(self.first_child[nodes], counts), counts

    def at(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all tokens that end at the nodes, and how many end at each."""
        order, first, n = self._by_node
        counts = n[nodes]
        return order[_ranges(first[nodes], counts)], counts

    def with_bytes(self, values: Sequence[int]) -> np.ndarray:
        """All nodes that one of these bytes leads to, int64 [k]."""
        order, starts = self._by_byte
        return np.concatenate([order[:0], *(order[starts[value] : starts[value + 1]] for value in values)])

    @cached_property
    def plain(self) -> tuple[bytes, array[int], array[int]]:
        """`byte`, `first_child` and the end of the children, to be looked up one by one."""
        ends = self.first_child + self.n_children
        return self.byte.tobytes(), array("q", self.first_child.tobytes()), array("q", ends.tobytes())

    @cached_property
    def _by_node(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids in the order of their nodes, and for each node where its own begin, and how many they are."""
        n = np.bincount(self.node_of, minlength=self.n_nodes)
        order, n[0] = np.argsort(self.node_of, kind="stable")[n[0] :], 0  # the root's have no bytes
        return order, np.cumsum(n) - n, n

    @cached_property
    def _by_byte(self) -> tuple[np.ndarray, np.ndarray]:
        order = 1 + np.argsort(self.byte[1:], kind="stable")
        return order, np.searchsorted(self.byte[order], np.arange(257))


def _ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The ranges [first, first + count) one behind the other, int64."""
    ends = np.cumsum(counts)
    return np.repeat(first - ends + counts, counts) + np.arange(int(ends[-1]) if len(ends) else 0)
