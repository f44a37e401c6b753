"""An executor without a model: what comes next is a plain function of the ids in its cache, and what it is fed is recorded."""

from collections.abc import Callable
from types import SimpleNamespace

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
    def __init__(self, learned: bool):
        self.ids: list[int] = []
        self.learned = learned

    @property
    def length(self) -> int:
        return len(self.ids)

    def truncate(self, length: int) -> None:
        del self.ids[max(length, 0) :]

    def remove(self, start: int, stop: int) -> bool:
        if not self.learned:
            del self.ids[start:stop]
        return not self.learned


class FakeExecutor:
    """`choose(ids in the cache)` is the id whose logit is highest; `before(ids)` is called in the middle of a step."""

    name, n_threads, selection = "fake", 1, None

    def __init__(self, n_vocab: int = 300, n_ctx: int = 4096, learned: bool = False, choose: Choice = mixed):
        self.n_ctx, self.choose = n_ctx, choose
        self.hyper = SimpleNamespace(n_vocab=n_vocab, reaches=lambda n_positions: not learned)
        self.cache = FakeCache(learned)
        self.fed: list[int] = []  # how many ids each call got
        self.before = lambda ids: None

    def logits(self, ids: list[int]) -> np.ndarray:
        logits = np.zeros(self.hyper.n_vocab, np.float32)
        logits[self.choose(ids) % self.hyper.n_vocab] = 10
        return logits

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        check_ids(ids, self.hyper.n_vocab, self.cache.length, self.n_ctx)
        self.fed.append(len(ids))
        before = self.cache.ids.copy()
        self.cache.ids += ids.tolist()
        self.before(ids.tolist())
        starts = range(1, len(ids) + 1) if rows == "all" else [len(ids)]
        return np.stack([self.logits([*before, *ids.tolist()[:n]]) for n in starts])

    def close(self) -> None:
        self.closed = True
