"""Markers, tokens such as <|im_end|> that steer a model: how to encode a conversation so that only the template's count.

In: a tokenizer, the pieces of text that a template writes. Out: where markers are in a text, and ids in which a marker that
somebody typed is spelled letter by letter. Knows no template and no roles.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from itertools import pairwise

from pocketlm.tokenizer import Tokenizer
from pocketlm.tokenizer.base import CONTROL, UNKNOWN, USER_DEFINED

Place = tuple[int, int, int]  # of a marker in a text: start, stop, id


class Markers:
    """The markers of a vocabulary: control tokens, ends of a turn, and user-defined `<…>` or `[…]` that the template writes.

    Other user-defined symbols, such as runs of spaces, are ordinary text.
    """

    _BRACKETED = re.compile(r"<.+>|\[.+\]", re.DOTALL)

    def __init__(self, tokenizer: Tokenizer, template_parts: Set[str]):
        self.made_of = tokenizer, template_parts
        self._tokenizer = tokenizer
        vocabulary = tokenizer.vocabulary
        ids = {i for part in template_parts for i in tokenizer.encode(part, special=True)}
        written = {i for i in ids if vocabulary.types[i] == USER_DEFINED and self._BRACKETED.fullmatch(self.text(i))}
        self._ids = {*vocabulary.ids_of(CONTROL, UNKNOWN), *tokenizer.end_ids, *written}
        self._in_template: dict[str, list[Place]] = {}

    def __contains__(self, token_id: int) -> bool:
        return token_id in self._ids

    def text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def end_of_turn(self) -> str:
        """The text of some marker, "" where the vocabulary has none."""
        texts = ((i, self.text(i)) for i in sorted(self._tokenizer.end_ids))
        return next((text for i, text in texts if self._tokenizer.encode(text, special=True) == [i]), "")

    def find(self, text: str) -> Iterator[Place]:
        """(start, stop, id) of the markers that the tokenizer reads in `text`."""
        return self.places(text, self._tokenizer.encode(text, special=True))

    def places(self, text: str, ids: list[int]) -> Iterator[Place]:
        """The same, for a text whose ids are known."""
        position, markers = 0, self._ids
        for token_id in ids:
            if token_id in markers:
                marker = self.text(token_id)
                start = text.find(marker, position)
                if start >= 0:
                    position = start + len(marker)
                    yield start, position, token_id

    def in_template(self, part: str) -> list[Place]:
        """The same, cached: for the few texts that a template writes between contents."""
        if part not in self._in_template:
            self._in_template[part] = list(self.find(part))
        return self._in_template[part]


def encode_between(text: str, own: list[Place], tokenizer: Tokenizer, markers: Markers, bos: bool) -> list[int]:
    """Ids of `text` in which only the markers at the places `own` are tokens."""
    ids = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    before, position = "", 0
    for start, stop, token_id in own:
        ids += [*_spelled(text[position:start], before, tokenizer, markers), token_id]
        before, position = markers.text(token_id), stop
    return ids + _spelled(text[position:], before, tokenizer, markers)


def _spelled(text: str, before: str, tokenizer: Tokenizer, markers: Markers) -> list[int]:
    """Ids of `text`, which follows the marker `before`, with every marker in it spelled letter by letter.

    Encoding it as plain text does that, except in two cases: user-defined symbols are tokens in plain text, too, and
    SentencePiece may put a space in front of a plain text that it does not put in front of a continuation. Then the text is
    encoded in pieces, cut behind the first letter of each marker.
    """
    if not text:
        return []
    n_before = len(tokenizer.encode(before, special=True))
    cuts = [start + 1 for start, stop, _ in markers.find(text) if stop - start > 1]
    if not cuts:
        return tokenizer.encode(before + text, special=True)[n_before:]
    plain = tokenizer.encode(text)
    starts_alike = tokenizer.encode(before + "a", special=True)[n_before:] == tokenizer.encode("a")
    if starts_alike and not any(i in markers for i in plain):
        return plain
    pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    inner = before or markers.end_of_turn()
    ids = _spelled(pieces[0], before, tokenizer, markers)
    return ids + [i for piece in pieces[1:] for i in _spelled(piece, inner, tokenizer, markers)]


def without_markers(messages: list[dict[str, str]], tokenizer: Tokenizer) -> list[dict[str, str]]:
    """The messages with a zero-width space inside every marker that a content spells.

    For templates that change the contents, so that the rendered text does not show which letters are whose.
    """
    markers = Markers(tokenizer, frozenset())

    def broken(content: str) -> str:
        cuts = [0, *(start + 1 for start, _, _ in markers.find(content)), len(content)]
        return "\u200b".join(content[start:stop] for start, stop in pairwise(cuts))

    return [{**message, "content": broken(message["content"])} for message in messages]
