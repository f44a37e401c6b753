"""The errors a user may see. Each is one line: which file, what is wrong, what to do.

Everything that can go wrong because of a file, a flag or the machine is raised as one of these; the command
line prints the line and ends with `exit_status`. Any other exception is a defect of the package.
"""

import copyreg
import itertools
import operator
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def did_you_mean(
    word: str, words: Iterable[str], sign: str = "", cutoff: float = 0.5, others: Mapping[str, str] | None = None
) -> str:
    """The hint ", did you mean q4_k?" if `word` is close to one of `words`, else "". Ignores case.

    `sign`: printed before the word, as "/" or "--". `others`: a name in other programs → the word here.
    """
    from difflib import get_close_matches

    known = {known.lower(): known for known in words}
    found = (others or {}).get(word.lower(), "")
    near = [found] if found in known else get_close_matches(word.lower(), known, 1, cutoff)
    return f", did you mean {sign}{known[near[0]]}?" if near else ""


def one_of(flag: str, value: str, words: Collection[str]) -> str:
    """`value`, if it is one of `words`. Raises UsageError: "--to guff: expected one of gguf, onnx, …"."""
    if value not in words:
        raise UsageError(f"{flag} {value}: expected one of {', '.join(words)}{did_you_mean(str(value), words)}")
    return value


def quoted(name: object, limit: int = 100) -> str:
    """A name from a file, for an error message: one line of printable ASCII, at most `limit` characters."""
    text = str(name)
    whole = ascii(text[: limit + 1])[1:-1]
    if len(text) <= limit and len(whole) <= limit:
        return whole
    escapes = [ascii(character)[1:-1] for character in text[:limit]]
    ends = itertools.accumulate(map(len, escapes))
    return "".join(escape for escape, end in zip(escapes, ends, strict=True) if end <= limit - 3) + "..."


class PocketlmError(Exception):
    """The work failed for a reason outside the program. One line for the user; exit status 1."""

    exit_status = 1

    def __reduce__(self) -> tuple[Any, ...]:  # workers send errors as pickles; the arguments of subclasses differ
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # pyright: ignore[reportAttributeAccessIssue]


class UsageError(PocketlmError):
    """The request makes no sense: an unknown flag value, a text the tokenizer cannot encode. Exit status 2."""

    exit_status = 2


def whole_number(name: str, value: Any, low: int, high: int, why: str = "") -> int:
    """`value` as a Python int. Raises UsageError for anything but a whole number from `low` to `high`; a bool is none."""
    try:
        number = operator.index(value) if not isinstance(value, bool) else low - 1
    except TypeError:
        number = low - 1
    if not low <= number <= high:
        raise UsageError(f"{name} {value!s:.40}: expected {low} to {high}{why}")
    return number


def decimal(text: str) -> float:
    """The number that was typed, with a point or, as most of Europe writes it, a comma. Raises ValueError for anything else,
    and for what may mean thousands, as 10,000 does.
    """
    if re.fullmatch(r"[-+]?[1-9]\d{0,2},\d{3}", text.strip()):
        raise ValueError(text)
    return float(text.replace(",", "."))


class FileError(PocketlmError):
    """Something is wrong with one file."""

    def __init__(self, path: object, problem: str, advice: str = ""):
        """`path` names the file, `problem` says what is wrong with it, `advice` what to do (one clause, may be empty)."""
        self.path, self.problem, self.advice = path, problem, advice
        line = f"{path}: {problem}" + (f"; {advice}" if advice else "")
        # names of files may hold line breaks, and so may what is told of their contents
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


@contextmanager
def needed(what: str, package: str, install: str = "") -> Iterator[None]:
    """Turn an ImportError in the block into a PocketlmError: "--plot needs matplotlib; get it with: pip install …"."""
    try:
        yield
    except ImportError:
        raise PocketlmError(f"{what} needs {package}; get it with: pip install {install or package}") from None


@contextmanager
def refused(
    path: object, advice: str = "", problem: str = "cannot be read", kinds: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[None]:
    """Turn an error of these `kinds` in the block into a FileError about `path`: "x: cannot be read (why); advice".

    A UnicodeDecodeError becomes one, too, with the offset of the first invalid byte.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise FileError(path, f"byte {error.start} is not UTF-8", "convert the text to UTF-8") from None
    except kinds as error:
        raise FileError(path, f"{problem} ({getattr(error, 'strerror', None) or error})", advice) from None
