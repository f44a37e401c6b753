"""An executor without a model: what comes next is a plain function of the ids in its cache, and what it is fed is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from pocketlm.runtime.ids import check_ids

Choice = Callable[[list[int]], int]


def mixed(ids: list[int]) -> int:
    """A number that depends on every id and its place."""
    n = 7
    for id in ids:
        n = (n * 31 + id + 1) % 1_000_003
    return n


class FakeCache:
    def __init__(self, learned: bool, n_ctx: int):
        self.ids: list[int] = []
        self.learned, self.n_ctx = learned, n_ctx

    @property
    def length(self) -> int:
        return len(self.ids)

    def fork(self, length: int) -> FakeCache:
        other = FakeCache(self.learned, self.n_ctx)
        other.ids = self.ids[:length]
        return other

    def release(self) -> None:
        self.ids = []

    def truncate(self, length: int) -> None:
        del self.ids[max(length, 0) :]

    def remove(self, start: int, stop: int) -> bool:
        if not self.learned:
            del self.ids[start:stop]
        return not self.learned


class FakeExecutor:
    """`choose(ids in the cache)` is the id whose logit is highest; `before(ids)` is called in the middle of a step for each
    text. `fed`: how many ids each text got, `passes`: the same for each pass.
    """

    block = 512
    same_bits = False  # no drafts unless a test is about them: the others count passes

    name, arithmetic, n_threads = "fake", "fake", 1

    def __init__(self, n_vocab: int = 300, n_ctx: int = 4096, learned: bool = False, choose: Choice = mixed):
        self.n_ctx, self.choose, self._learned = n_ctx, choose, learned
        self.hyper = SimpleNamespace(
            n_vocab=n_vocab, position="learned" if learned else "rope", reaches=lambda n_positions: not learned
        )
        self.cache = self.new_cache()
        self.fed: list[int] = []
        self.passes: list[list[int]] = []
        self.before = lambda ids: None
        self._memory = np.zeros((self.block, n_vocab), np.float32)  # every pass writes over the logits of the one before

    def new_cache(self, n_ctx: int | None = None) -> FakeCache:
        return FakeCache(self._learned, n_ctx or self.n_ctx)

    def new_selection(self) -> None:
        pass

    def logits(self, ids: list[int]) -> np.ndarray:
        logits = np.zeros(self.hyper.n_vocab, np.float32)
        logits[self.choose(ids) % self.hyper.n_vocab] = 10
        return logits

    def step(self, work: Sequence[tuple[Any, np.ndarray, int]], *_: object) -> tuple[list[np.ndarray], int]:
        assert sum(len(ids) for _, ids, _ in work) <= self.block
        assert len({id(cache) for cache, _, _ in work}) == len(work)
        checked = [(cache, check_ids(ids, self.hyper.n_vocab, cache.length, cache.n_ctx), rows) for cache, ids, rows in work]
        self.passes.append([len(ids) for _, ids, _ in work])
        self._memory[:] = np.nan
        results, row = [], 0
        for cache, ids, rows in checked:
            self.fed.append(len(ids))
            first = len(cache.ids) + len(ids) - rows + 1
            cache.ids += ids.tolist()
            self.before(ids.tolist())
            for n in range(first, first + rows):
                self._memory[row + n - first] = self.logits(cache.ids[:n])
            results.append(self._memory[row : row + rows])
            row += rows
        return results, 1

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        checked = check_ids(ids, self.hyper.n_vocab, self.cache.length, self.n_ctx)
        return self.step([(self.cache, checked, len(checked) if rows == "all" else 1)])[0][0].copy()

    def close(self) -> None:
        self.closed = True
