"""What every plain text goes through before it is encoded: a Unicode normal form, then a table of replacements.

In: the table of a tokenizer's file or of who trains one, which may be a stranger's. Out: `Normalizer`. Knows no tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pocketlm.errors import FileError, UsageError, refused
from pocketlm.tokenizer.markers import Markers

NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]
NORMAL_FORMS: dict[str, NormalForm] = {"NFC": "NFC", "NFD": "NFD", "NFKC": "NFKC", "NFKD": "NFKD"}
_MOST, _LONGEST = 4096, 64  # replacements, characters of each side: a text becomes at most 64 times as long


@dataclass(frozen=True)
class Normalizer:
    """A normal form, then all replacements in one pass: at each place the longest, and no result is replaced again."""

    form: NormalForm | None = None
    replacements: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        return self.form is not None or bool(self.replacements)

    def __call__(self, text: str) -> str:
        if self.form:
            from unicodedata import normalize

            text = normalize(self.form, text)
        if self.replacements:
            pieces, done = list[str](), 0
            for start, end, i in self._places.find(text):
                pieces += text[done:start], self.replacements[i][1]
                done = end
            text = "".join([*pieces, text[done:]])
        return text

    @cached_property
    def _places(self) -> Markers:
        """An expression of all would try each of them at every place: half a megabyte of a stranger's table took an hour."""
        return Markers({what: i for i, (what, _) in enumerate(self.replacements)})


AS_IT_IS = Normalizer()


def make_normalizer(path: object, form: str | None, pairs: Sequence[tuple[str, str]]) -> Normalizer:
    """Check a normal form and replacements (what, by what). FileError for what cannot be."""
    if form is not None and form not in NORMAL_FORMS:
        raise FileError(path, f"its normal form is {form[:40]!r}", f"known are {', '.join(NORMAL_FORMS)}")
    if len(pairs) > _MOST or any(len(side) > _LONGEST for pair in pairs for side in pair):
        raise FileError(path, f"its replacements are more than {_MOST}, or longer than {_LONGEST} characters")
    if len({what for what, _ in pairs}) != len(pairs) or any(not what for what, _ in pairs):
        raise FileError(path, "it replaces nothing by something, or one text in two ways")
    return Normalizer(NORMAL_FORMS[form] if form else None, tuple(pairs))


def read_normalizer(names: Sequence[str]) -> Normalizer:
    """A normal form by its name, and tables in files, with lines `what TAB by what`. Raises FileError naming the line."""
    forms = [name.upper() for name in names if name.upper() in NORMAL_FORMS]
    if len(forms) > 1:
        raise UsageError(f"{forms[1].lower()}: a text has one normal form, and {forms[0].lower()} is given already")
    pairs: list[tuple[str, str]] = []
    for path in (Path(name) for name in names if name.upper() not in NORMAL_FORMS):
        for number, line in read_lines(path):
            what, tab, by = line.partition("\t")
            if not tab or not what:
                raise FileError(path, f"line {number} is no replacement", "write what, a tab, and by what")
            pairs.append((what, by))
    return make_normalizer(", ".join(names), forms[0] if forms else None, pairs)


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, line) of every line of a file that is not empty. Raises FileError."""
    with refused(path, "check the path"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
