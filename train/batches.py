"""The batches of every step: how many sequences each part gives, and which.

In: a corpus and the shares of `--mix`. Out: blocks. What the parts have given so far is the whole state: parts may come, go
and change places, and shares may change, in the middle of a run, and each part goes on where it was.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from pocketlm.errors import UsageError, did_you_mean
from pocketlm.train.data import Block, Corpus

USAGE = "expected FILE=SHARE, FILE=FIRST..LAST or @STEP, as in: --mix wiki.txt=90..50 talk.txt=10..50 @5000 talk.txt=1"


@dataclass(frozen=True)
class Stage:
    """From step `start` on: the share of each file or pattern of files, at the stage's start and at its end."""

    start: int
    shares: dict[str, tuple[float, float]]


def read_mix(words: Sequence[str]) -> list[Stage]:
    """The stages of `--mix a.txt=50 b.txt=30..10 @3000 a.txt=1`. Raises UsageError."""
    stages = [Stage(0, {})]
    for word in words:
        if re.fullmatch(r"@\d{1,12}", word):
            stages.append(Stage(int(word[1:]), {}))
        elif match := re.fullmatch(r"(.+)=(\d{1,9}(?:\.\d+)?)(?:\.\.(\d{1,9}(?:\.\d+)?))?", word):
            stages[-1].shares[match[1]] = (float(match[2]), float(match[3] or match[2]))
        else:
            raise UsageError(f"--mix {word}: {USAGE}")
    starts = [stage.start for stage in stages]
    if starts != sorted(set(starts)) or not all(any(map(any, stage.shares.values())) for stage in stages if words):
        raise UsageError(f"--mix {' '.join(words)}: every stage needs shares above 0 and a later @STEP than the one before")
    return stages if words else []


def mixed_files(stages: Sequence[Stage], files: Sequence[str]) -> list[str]:
    """`files` and those that the mix alone names."""
    names = dict.fromkeys(name for stage in stages for name in stage.shares)
    return [*files, *(name for name in names if not _found(name, files) and not {*"*?["} & {*name})]


def _found(name: str, files: Sequence[str]) -> list[str]:
    """The files that a name of the mix means: a path, a file's name without its folder, or a pattern of either."""
    return [file for file in files if any(name == own or fnmatchcase(own, name) for own in (file, Path(file).name))]


class Feed:
    """Deals a corpus to steps of `size` sequences. Without a mix each part has the share of its length.

    Of every part an epoch shows each block once, in an order and cut at a place that (seed, epoch) decide.
    """

    def __init__(self, corpus: Corpus, size: int, seed: int, stages: Sequence[Stage] = (), steps: int = 1):
        self.corpus, self.size, self.seed, self.stages, self.steps = corpus, size, seed, stages, steps
        self.parts = corpus.parts()
        self.n_blocks = np.array([part.n_blocks(corpus.context - 1) for part in self.parts.values()])
        self.given = np.zeros(len(self.parts), np.int64)  # sequences of each part so far
        self.owed = np.zeros(len(self.parts))  # by how much each is behind its share: between -1 and 1
        self._orders: dict[int, tuple[int, int, np.ndarray]] = {}
        self._gone: dict[str, list[float]] = {}  # `given` and `owed` of parts that are no longer there
        for name in (name for stage in stages for name in stage.shares if not self._of(name)):
            raise UsageError(f"--mix {name}: is none of the texts to learn{did_you_mean(name, corpus.files)}")

    def _of(self, name: str) -> list[int]:
        """The parts that a name of the mix means."""
        return [i for i, part in enumerate(self.parts.values()) if _found(name, part.files)]

    @property
    def position(self) -> dict[str, list[float]]:
        """Plain data: sequences given and owed, by part."""
        pairs = zip(self.given.tolist(), self.owed.tolist(), strict=True)
        return {**self._gone, **dict(zip(self.parts, map(list, pairs), strict=True))}

    @position.setter
    def position(self, position: dict[str, list[float]]) -> None:
        for i, name in enumerate(self.parts):
            self.given[i], self.owed[i] = position.get(name, (0, 0.0))
        self._gone = {name: pair for name, pair in position.items() if name not in self.parts}

    @property
    def epochs(self) -> float:
        """How often the corpus was seen, on average."""
        return float(self.given.sum() / self.n_blocks.sum())

    def shares(self, step: int) -> np.ndarray:
        """The share of every part at a step: float64 [parts], which add up to 1."""
        shares = self.n_blocks.astype(np.float64)
        if began := [i for i, stage in enumerate(self.stages) if stage.start <= step]:
            stage, later = self.stages[began[-1]], self.stages[began[-1] + 1 :]
            end = later[0].start if later else self.steps
            done = min((step - stage.start) / max(end - 1 - stage.start, 1), 1.0)
            shares = np.zeros(len(self.parts))
            for name, (first, last) in stage.shares.items():
                of = self._of(name)  # a pattern's share is that of all its files
                shares[of] += (first + (last - first) * done) * self.n_blocks[of] / max(self.n_blocks[of].sum(), 1)
        if not shares.sum():
            raise UsageError(f"--mix leaves nothing to learn at step {step}; give a longer text a share above 0")
        return shares / shares.sum()

    def batch(self, step: int) -> list[Block]:
        """The blocks of a step, and the position behind them."""
        shares, parts = self.shares(step), [*self.parts.values()]
        blocks = []
        for _ in range(self.size):
            self.owed += shares
            i = int(np.where(shares > 0, self.owed, -np.inf).argmax())
            self.owed[i] -= 1
            epoch, place = divmod(int(self.given[i]), int(self.n_blocks[i]))
            shift, order = self._order(i, epoch)
            blocks.append(parts[i].block(int(order[place]), shift))
            self.given[i] += 1
        return blocks

    def _order(self, i: int, epoch: int) -> tuple[int, np.ndarray]:
        if i not in self._orders or self._orders[i][0] != epoch:
            random = np.random.default_rng([self.seed, epoch])
            self._orders[i] = epoch, int(random.integers(self.corpus.context)), random.permutation(int(self.n_blocks[i]))
        return self._orders[i][1:]
