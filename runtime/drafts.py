"""Drafts without a model: what a text may go on with, looked up in the text itself (prompt lookup), and whether it pays to try.

In: the ids so far, and who shares the next pass (pass_times.py). Out: ids that may come next, to be verified in one pass. Knows
no model. A draft changes no answer: a token of it stays only where it is the one that would have been drawn.

Every token is compared with what the text so far foretold, whether or not that was made a draft of. So it is known how often
drafts would have been right before the first is tried, and a text that is not foretold costs nothing but the comparison.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate, count
from math import prod
from operator import mul

from pocketlm.runtime.pass_times import Company

SHORTEST = 2  # how many of the last tokens must occur earlier, at least, for what followed there to be a draft
LONGEST = 7  # of a draft: with the token before it, it fills a tile of 8
MOST_ROWS = 1 + LONGEST
CLASSES = 1, 3, 4, 6, 9, 17  # of matches, by how many tokens were the same: below these numbers, and those from the last on
PRIOR = 0.3, 0.4, 0.35, 0.5, 0.6, 0.75, 0.85  # how often a match of each class is right, until that is known
OF_NEW = 0.1  # weight of what was seen last
LIKELY = 0.25  # how likely a text must be to get to where a draft may pay, for passes in a row to end there


class Odds:
    """How often drafts were right lately: of one session, whatever it writes."""

    def __init__(self) -> None:
        self._right = list(PRIOR)

    def note(self, match: int, was_right: bool) -> None:
        """The token that followed a match of this length was the foretold one, or not."""
        at = _class(match)
        self._right[at] += OF_NEW * (was_right - self._right[at])

    def of_getting_to(self, match: int, longer: int) -> float:
        """How likely a match of one length becomes one of another, larger one."""
        return prod(self._right[_class(at)] for at in range(match, longer))

    def best_length(self, match: int, company: Company) -> int:
        """How many tokens to draft after a match of this length; 0 where that would not pay."""
        return company.best_length(list(accumulate((self._right[_class(match + i)] for i in range(LONGEST)), mul)))


def _class(match: int) -> int:
    return bisect_right(CLASSES, match)


class Drafts:
    """What a growing text foretells of itself."""

    def __init__(self, odds: Odds):
        self.odds = odds
        self.drafted = self.accepted = 0  # tokens that were tried, and that were right
        self._index: dict[tuple[int, ...], int] = {}  # tokens in a row -> where the one after them stands
        self._seen = self._at = self._match = 0
        self._text = array("i")

    def after(self, text: array[int], room: int, company: Callable[[], Company]) -> list[int]:
        """The draft that is worth a try after `text`, at most `room` ids; often none. The text may have grown or be another.
        `company` tells who shares the pass.
        """
        if text is not self._text or self._seen > len(text):
            self._begin(text)
        while self._seen < len(text):
            self._take(text)
        if not self._at or room < 1:
            return []
        n = min(room, self.odds.best_length(self._match, company()))
        draft = text[self._at : self._at + n].tolist()
        while len(draft) < n:  # it has come to its own end: the text repeats itself
            draft += draft[: n - len(draft)]
        return draft

    def may_pay_after(self, company: Callable[[], Company], most: int) -> int:
        """How many tokens to draw, at most `most`, before a draft is looked for again, where none pays now.

        A longer match makes a draft more likely to be right: so many tokens must follow as foretold until one may pay. `most`
        where no length would pay, or it is not likely that the match gets so long.
        """
        if self._at:
            shared = company()
            for limit in CLASSES:
                if limit > self._match and self.odds.best_length(limit, shared):
                    return min(most, limit - self._match) if self.odds.of_getting_to(self._match, limit) > LIKELY else most
        return most

    def passed(self, draft: list[int], n_drawn: int) -> None:
        """So many tokens were drawn from a pass of a token and this draft."""
        self.drafted += len(draft)
        self.accepted += n_drawn - 1

    def _begin(self, text: array[int]) -> None:
        self._text, self._seen, self._at, self._match = text, len(text), 0, 0
        grams = zip(*(text[i:] for i in range(SHORTEST)), strict=False)
        self._index = dict(zip(grams, range(SHORTEST, len(text)), strict=False))  # the last token has none after it
        self._look_up(text)

    def _take(self, text: array[int]) -> None:
        """One more token."""
        at = self._seen
        self._seen = at + 1
        if self._at:
            right = text[self._at] == text[at]
            self.odds.note(self._match, right)
            # one wrong token may stand for another; after two in a row the text goes another way
            self._at = self._at + 1 if right or self._match else 0
            self._match = self._match + 1 if right else 0
        if at >= SHORTEST:
            self._index[tuple(text[at - SHORTEST : at])] = at
        if self._match < SHORTEST:
            self._look_up(text)

    def _look_up(self, text: array[int]) -> None:
        end = self._seen
        if end <= SHORTEST or not (found := self._index.get(tuple(text[end - SHORTEST : end]))):
            return
        self._at, self._match = found, SHORTEST
        for back in count(SHORTEST + 1):
            if found < back or back > CLASSES[-1] or text[found - back] != text[end - back]:
                return
            self._match = back
