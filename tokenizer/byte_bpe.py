"""Byte-level BPE: a text is cut into words, each word is bytes, neighbours merge by rank.

In: a vocabulary in the byte-level letters of GPT-2, a merge table, the name of a pre-tokenizer. Out: a
`Tokenizer`. Source: Radford et al. 2019 (GPT-2); the letters stand for bytes so that every token is printable.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pocketlm.tokenizer.base import CONTROL, UNKNOWN, USER_DEFINED, Tokenizer, Vocabulary
from pocketlm.tokenizer.merge import MergeTable, merge
from pocketlm.tokenizer.pretokenize import splitter


def _letters() -> str:
    """The letter of each byte: printable Latin-1 as itself, the 68 others from U+0100 on in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


LETTERS = _letters()
BYTE_OF = {letter: byte for byte, letter in enumerate(LETTERS)}
_VALUES = np.array([BYTE_OF.get(chr(code), -1) for code in range(0x201)], np.int16)  # by the letter's code point
TO_LETTERS = dict(enumerate(LETTERS))  # for `str.translate` of bytes read as Latin-1


def from_letters(token: str) -> bytes:
    """The bytes of a token written in letters. KeyError for a character that is no letter."""
    return bytes(map(BYTE_OF.__getitem__, token))


@dataclass(frozen=True)
class Options:
    """How a byte-level vocabulary is used."""

    pre_tokenizer: str  # a name of PRE_TOKENIZERS
    whole_words_first: bool = False  # a word that is a token needs no merges
    space_prefix: bool = False  # a space goes before a text that does not begin with one
    unknown: bool = False  # bytes the vocabulary lacks become the unknown token, else they are left out
    fuse_unknown: bool = False  # a run of them is one unknown token


class ByteBPE(Tokenizer):
    """Tokenizer of GPT-2's kind. A text never has an unknown token when all 256 bytes are in the vocabulary.

    `table` and `options` are what it was made with.
    """

    def __init__(self, vocabulary: Vocabulary, table: MergeTable, options: Options):
        super().__init__(vocabulary)
        self.table, self.options = table, options

    @cached_property
    def _byte_ids(self) -> list[int | None]:
        return [self.vocabulary.index.get(letter) for letter in LETTERS]

    def symbol(self, text: str) -> int | None:
        """What the merge table calls a text: the id of its token."""
        return self.vocabulary.index.get(text)

    def _encode_text(self, text: str, start: bool) -> list[int]:
        options = self.options
        if options.space_prefix and not text.startswith(" "):
            text = " " + text
        return self._encode_words(splitter(options.pre_tokenizer)(text))

    def _encode_word(self, word: str) -> list[int]:
        data = word.encode()
        return self._whole_word(data) or self._merge(data)

    def _whole_word(self, data: bytes) -> list[int] | None:
        if not self.options.whole_words_first:
            return None
        found = self.vocabulary.index.get("".join(map(LETTERS.__getitem__, data)))
        # a marker's text is reached by `special=True` only
        return None if found is None or self.vocabulary.types[found] in (CONTROL, UNKNOWN, USER_DEFINED) else [found]

    def _merge(self, data: bytes) -> list[int]:
        symbols = list(map(self._byte_ids.__getitem__, data))
        if None in symbols:
            unknown = self.unk_id if self.options.unknown else None
            symbols = [unknown if symbol is None else symbol for symbol in symbols]
            fused = self.options.fuse_unknown
            symbols = [s for at, s in enumerate(symbols) if not (fused and at and s == unknown == symbols[at - 1])]
            symbols = [symbol for symbol in symbols if symbol is not None]
        return merge(symbols, self.table)  # type: ignore[arg-type]

    def _token_bytes(self, token_id: int) -> bytes:
        token = self.vocabulary.tokens[token_id]
        if self.vocabulary.types[token_id] == USER_DEFINED:
            return token.encode()
        try:
            return from_letters(token)
        except KeyError:  # a token that was added in plain text
            return token.encode()

    def _split(self, data: bytes) -> list[bytes] | None:
        codes = np.frombuffer(data.decode().encode("utf-32-le"), np.uint32)
        values = _VALUES[np.minimum(codes, len(_VALUES) - 1)]
        ends = [*np.flatnonzero(codes == 0).tolist(), len(codes)]
        blob, start, found = values.astype(np.uint8).tobytes(), 0, list[bytes]()
        for end in ends:
            found.append(blob[start:end])
            start = end + 1
        odd = np.flatnonzero((values < 0) & (codes != 0))  # letters of tokens that were added in plain text
        for i in set(np.searchsorted(ends, odd).tolist()):
            found[i] = self._token_bytes(i)
        return found
