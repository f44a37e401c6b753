"""Numbers between bounds, as JSON writes them: which digits may come.

In: bounds, as whole numbers of 10^-DIGITS, the last decimal place (a packed program has no `decimal`). Out: a `Node`. A number
has at most DIGITS digits before its point and as many behind it; its exponent, where it may have one, has at most two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from pocketlm.constrain.encoding import between
from pocketlm.constrain.grammar import EMPTY, Chars, Either, Node, Repeat, Sequence, literal, optional
from pocketlm.errors import UsageError, quoted

DIGITS = 19
ONE = 10**DIGITS
_DIGIT = Chars(((48, 57),))
_WHOLE = Either((literal("0"), Sequence((Chars(((49, 57),)), Repeat(_DIGIT, 0, DIGITS - 1)))))
_SIGN = optional(literal("-"))
_POINT = literal(".")
_EXPONENT = Sequence((Chars(((69, 69), (101, 101))), optional(Chars(((43, 43), (45, 45)))), Repeat(_DIGIT, 1, 2)))
INTEGER = Sequence((_SIGN, _WHOLE))
NUMBER = Sequence((_SIGN, _WHOLE, optional(Sequence((_POINT, Repeat(_DIGIT, 1, DIGITS)))), optional(_EXPONENT)))


@dataclass(frozen=True)
class Bounds:
    """`least` to `most`, None where there is no bound."""

    least: int | None = None
    most: int | None = None


def fixed(number: float) -> int:
    """The number in units of the last place. Raises UsageError for one that has more digits than a number may have."""
    mantissa, _, exponent = f"{number!r}".partition("e")
    whole, _, fraction = mantissa.partition(".")
    shift = DIGITS - len(fraction) + int(exponent or 0)
    digits = int(whole + fraction)
    units = digits * 10 ** min(shift, 1000) if shift >= 0 else digits // 10 ** min(-shift, 1000)
    if abs(units) >= ONE * ONE or (shift < 0 and digits % 10 ** min(-shift, 1000)):
        raise UsageError(f"{quoted(number)} has more than {DIGITS} digits")
    return units


def above(bound: int, is_whole: bool) -> int:
    """The least number above an exclusive bound, also for programs that read numbers as float64: to these a number is the bound
    itself unless it is nearer to the next float, so this one lies behind the middle of the two. (Of whole numbers
    it is simply the next, which beyond 2^53 such programs may not tell from the bound.)
    """
    if is_whole:
        return (bound // ONE + 1) * ONE
    (n, divisor), (m, other) = (x.as_integer_ratio() for x in (bound / ONE, math.nextafter(bound / ONE, math.inf)))
    return (n * other + m * divisor) * ONE // (2 * divisor * other) + 1


def integers(bounds: Bounds) -> Node:
    if bounds == Bounds():
        return INTEGER
    return _both_signs(bounds, _whole)


def numbers(bounds: Bounds) -> Node:
    """Without exponents where there is a bound."""
    if bounds == Bounds():
        return NUMBER
    return _both_signs(bounds, _decimals)


def _both_signs(bounds: Bounds, not_negative: Callable[[int, int | None], Node]) -> Node:
    """`not_negative(least, most)`: numbers from 0 <= least to most."""
    least, most, found = bounds.least, bounds.most, list[Node]()
    if most is None or most >= 0:
        found.append(not_negative(max(least or 0, 0), most))
    if least is None or least < 0:
        below = not_negative(max(-(most or 0), 1), None if least is None else -least)
        found.append(Sequence((literal("-"), below)))
    return Either(tuple(found))


def _whole(least: int, most: int | None) -> Node:
    return _digits(-(-least // ONE), ONE - 1 if most is None else most // ONE)


def _digits(least: int, most: int) -> Node:
    """The whole numbers from 0 <= least to most."""
    found: list[Node] = []
    for n in range(len(str(least)), len(str(max(most, 0))) + 1):
        low, high = max(least, 10 ** (n - 1) if n > 1 else 0), min(most, 10**n - 1)
        if low <= high:
            for ranges in between(tuple(map(int, str(low))), tuple(map(int, str(high))), 0, 9):
                found.append(Sequence(tuple(Chars(((48 + a, 48 + b),)) for a, b in ranges)))
    return Either(tuple(found))


def _split(bound: int) -> tuple[int, str]:
    """What is before the point, and the digits behind it."""
    return bound // ONE, f"{bound % ONE:0{DIGITS}}".rstrip("0")


def _decimals(least: int, most: int | None) -> Node:
    low, low_end = _split(least)
    if most is None:
        return Either((_with(low, low_end, None), _free(low + 1, ONE - 1)))
    high, high_end = _split(most)
    if low > high:
        return Either(())
    if low == high:
        return _with(low, low_end, high_end)
    return Either((_with(low, low_end, None), _free(low + 1, high - 1), _with(high, None, high_end)))


def _free(least: int, most: int) -> Node:
    return Sequence((_digits(least, most), optional(Sequence((_POINT, Repeat(_DIGIT, 1, DIGITS))))))


def _with(whole: int, low: str | None, high: str | None) -> Node:
    """This whole number, with fractions between the bounds."""
    part = Sequence((_POINT, _fractions(low, high, DIGITS)))
    return Sequence((literal(str(whole)), part if low else optional(part)))


@lru_cache(1024)
def _fractions(low: str | None, high: str | None, n: int) -> Node:
    """One to n digits of a fraction between the bounds, which are digits; None where there is no bound."""
    if low is None and high is None:
        return Repeat(_DIGIT, 1, n) if n else Either(())
    found: list[Node] = []
    for digit in range(10) if n else ():
        fits, below, above = True, low, high
        if low is not None:
            first = int(low[:1] or 0)
            fits = digit >= first
            below = None if digit > first else low[1:] or None
        if high is not None:
            first = int(high[:1] or 0)
            fits = fits and digit <= first
            above = None if digit < first else high[1:]
        if fits:
            after = _fractions(below, above, n - 1)
            found.append(Sequence((literal(str(digit)), after if below else Either((EMPTY, after)))))
    return Either(tuple(found))
