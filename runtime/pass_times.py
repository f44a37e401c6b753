"""How long passes take by their number of tokens, and what a draft in one costs all who share it.

In: passes as they come, their tokens and seconds. Out: how much faster or slower everybody gets by more tokens in a pass. Knows
neither what is drafted nor the kernels, but that these take tokens in tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

TILE = 8  # tokens that a kernel takes at once; fewer are filled up to a power of two
# a pass of so many tokens takes the time of how many of one, until that is measured; in a larger one every tile is added
USUAL = {1: 1.0, 2: 1.25, 4: 1.6, 8: 2.7}
OF_NEW = 0.1  # weight of a new figure beside those before
OF_USUAL = 0.005  # what was not measured again is forgotten by this much with every pass
WORTH = 0.1  # of a token that the pass must bring more than it costs


def _size(tokens: int) -> int:
    """Tokens that the kernels compute for so many: passes of the same size take the same time."""
    rest = tokens % TILE
    return tokens - rest + (1 << (rest - 1).bit_length() if rest else 0)


def _usual(size: int) -> float:
    return size // TILE * USUAL[TILE] + USUAL.get(size % TILE, 0.0)


class PassTimes:
    """One thread measures at a time; others may ask meanwhile."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # by size; replaced, never changed

    def measured(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens, with logits of each, took so long. One that took very long tells of the machine."""
        size, known = _size(tokens), self._seconds
        before = known.get(size, seconds)
        now = before + OF_NEW * (min(seconds, 2 * before) - before)
        one = now / _usual(size)
        known = {other: time + OF_USUAL * (_usual(other) * one - time) for other, time in known.items()}
        known[size] = now
        self._seconds = known

    def ratio(self, tokens: int, more: int) -> float:
        """How many times as long a pass of `more` tokens takes as one of `tokens`."""
        return self._of(_size(more)) / self._of(_size(tokens))

    def _of(self, size: int) -> float:
        """Seconds, or what is usual beside the size that is known and next to it."""
        known = self._seconds
        if not known:
            return _usual(size)
        near = size if size in known else min(known, key=lambda other: abs(_usual(other) - _usual(size)))
        return known[near] * _usual(size) / _usual(near)


class Company(NamedTuple):
    """Who shares a text's next pass, as far as the last one tells."""

    times: PassTimes
    tokens: int = 0  # of other texts in a pass

    def best_length(self, chances: Sequence[float]) -> int:
        """How many tokens to draft, at most len(chances); 0 where that would not pay. `chances`: of each, that all up to it are
        right.

        A longer pass costs everybody in it: where it takes r times as long, there were r times as many tokens in the same
        time, of all n in it. So the draft brings what is expected of it, and costs n (r - 1) tokens.
        """
        alone = 1 + self.tokens
        best, gain, brings = 0, 1 + WORTH / alone, 0.0
        for n, chance in enumerate(chances, 1):
            brings += chance
            speed = (alone + brings) / (alone * self.times.ratio(alone, alone + n))  # of all together, beside that without
            if speed > gain:
                best, gain = n, speed
        return best
