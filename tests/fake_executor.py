"""An executor without a model: what comes next is a plain function of the ids in its cache, and what it is fed is recorded."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

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
        del self.ids[length:]

    def remove(self, start: int, stop: int) -> bool:
        if not self.learned:
            del self.ids[start:stop]
        return not self.learned


class FakeExecutor:
    """`choose(ids in the cache)` is the id whose logit is highest; `before(ids)` is called in the middle of a step."""

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
        assert rows == "last"
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert self.cache.length + len(ids) <= self.n_ctx, "fed more than the context holds"
        self.fed.append(len(ids))
        self.cache.ids += ids.tolist()
        self.before(ids.tolist())
        return self.logits(self.cache.ids)[None]
