"""What the kinds of SentencePiece tokenizers share: how a text is prepared, and how ids become text again.

In: a vocabulary, and `Options` that say how the text is prepared. The kinds (sentencepiece_bpe.py, unigram.py) say which pieces
a prepared text is cut into. Source: Kudo and Richardson 2018, "SentencePiece". The `.model` files of that library, GGUF
vocabularies and Hugging Face's form of them differ in small things only, and those are `Options`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal

from pocketlm.errors import FileError
from pocketlm.tokenizer.base import BYTE, CONTROL, UNKNOWN, USER_DEFINED, Tokenizer, Vocabulary
from pocketlm.tokenizer.charsmap import Rules
from pocketlm.tokenizer.markers import Markers
from pocketlm.tokenizer.texts import TextIndex

SPACE = "▁"
WORDS = re.compile(f"{SPACE}?[^{SPACE}]+|{SPACE}")  # each ▁ begins a word
UNKNOWN_TEXT = " ⁇ "  # what the SentencePiece library decodes an unknown token to


@dataclass(frozen=True)
class Options:
    """How the text is prepared and what becomes of characters that are not in the vocabulary."""

    prefix: Literal["always", "missing", "never"] = "always"  # ▁ before the text; "missing": if it begins with none
    prefix_first_only: bool = False  # not before what follows a marker
    rules: Rules | None = None  # replacements of the precompiled normaliser
    collapse_spaces: bool = False  # runs of spaces become one, none at either end
    symbols_in_text: bool = False  # user-defined symbols are found in the normalised text (the SentencePiece library),
    #                                or cut out of the text before (llama.cpp, Hugging Face)
    split_spaces: bool = False  # each ▁ begins a word of its own
    byte_fallback: bool = True  # a character that is not in the vocabulary becomes its bytes, else unknown
    fuse_unknown: bool = True  # a run of unknown characters is one unknown token
    unknown_text: str = ""  # what the unknown token is decoded to


def mergeable(vocabulary: Vocabulary) -> TextIndex:
    """Token → id of all that plain text can become: no control, unknown or byte tokens."""
    return vocabulary.index.without(vocabulary.ids_of(CONTROL, UNKNOWN, BYTE))


class SentencePiece(Tokenizer):
    """The base of both kinds. `options` are what it was made with."""

    def __init__(self, path: object, vocabulary: Vocabulary, options: Options):
        super().__init__(vocabulary)
        self.options = options
        self._unknown_text = options.unknown_text.encode()
        if options.symbols_in_text:
            self._plain_markers, self._special_markers = (), (CONTROL, UNKNOWN)
        self._byte_values = _byte_values(path, vocabulary)
        if options.byte_fallback and not self._byte_values:
            raise FileError(path, "byte fallback is asked for, but the vocabulary has no byte tokens")

    # ── encoding ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _encode_text(self, text: str, start: bool) -> list[int]:
        ids = self._encode_prepared(self._prepare(text, start))
        if self.options.fuse_unknown and self.unk_id in ids:
            unk_id = self.unk_id
            ids = [i for at, i in enumerate(ids) if i != unk_id or not at or ids[at - 1] != unk_id]
        return ids

    def _prepare(self, text: str, start: bool) -> str:
        """Normalised, with ▁ for spaces and in front."""
        options, symbols = self.options, self._symbols_in_text
        if options.collapse_spaces and self._has_wide_symbols:
            text = _collapsed(options.rules.pieces(text, symbols) if options.rules else symbols.cut(text))
        else:
            text = options.rules.apply(text, symbols) if options.rules else text
            text = re.sub("  +", " ", text).lstrip(" ") if options.collapse_spaces else text
        if options.collapse_spaces and not text:
            return text
        text = text.replace(" ", SPACE)
        wanted = options.prefix == "always" or (options.prefix == "missing" and not text.startswith(SPACE))
        if wanted and (start or not options.prefix_first_only):
            text = SPACE + text
        return text.rstrip(SPACE) if options.collapse_spaces else text

    def _encode_prepared(self, text: str) -> list[int]:
        """Ids of a text as `_prepare` leaves it. Each kind has its own."""
        raise NotImplementedError

    def _without_unknown(self, symbols: list[int]) -> list[int]:
        """Characters that are not in the vocabulary, as the number `n_vocab` plus their own, become bytes or unknown."""
        n_vocab, unknown = self.n_vocab, [] if self.unk_id is None else [self.unk_id]
        becomes: dict[int, list[int]] = {}
        for symbol in set(symbols):
            if symbol < n_vocab:
                becomes[symbol] = [symbol]
            elif self.options.byte_fallback:
                becomes[symbol] = [self._byte_ids[byte] for byte in chr(symbol - n_vocab).encode()]
            else:
                becomes[symbol] = unknown
        return list(chain.from_iterable(map(becomes.__getitem__, symbols)))

    @cached_property
    def _symbols_in_text(self) -> Markers:
        """The user-defined symbols that are found in the text itself."""
        return self._markers_of((USER_DEFINED,) if self.options.symbols_in_text else ())[0]

    @cached_property
    def _has_wide_symbols(self) -> bool:
        """Whether some of them hold two spaces, which stay two."""
        return self.options.symbols_in_text and any(
            "  " in self.vocabulary.tokens[i] for i in self.vocabulary.ids_of(USER_DEFINED)
        )

    # ── decoding ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _token_bytes(self, token_id: int) -> bytes:
        byte = self._byte_values.get(token_id)
        if byte is not None:
            return bytes([byte])
        token = self.vocabulary.tokens[token_id]
        literal = self.vocabulary.types[token_id] == USER_DEFINED and not self.options.symbols_in_text
        return (token if literal else token.replace(SPACE, " ")).encode()

    def _split(self, data: bytes) -> list[bytes]:
        return data.replace(SPACE.encode(), b" ").split(b"\0")

    def _at_start(self, token_id: int, data: bytes) -> tuple[bytes, bool]:
        options = self.options
        if not data:
            return data, True
        if self.vocabulary.types[token_id] in (BYTE, UNKNOWN) or not data.startswith(b" "):
            return data, False
        if options.prefix == "never" and not options.collapse_spaces:
            return data, False
        return data[1:], options.collapse_spaces and len(data) == 1

    def starts_anew_after(self, token_id: int) -> bool:
        options, kind = self.options, self.vocabulary.types[token_id]
        if options.prefix == "never" or options.prefix_first_only:
            return False
        return kind == CONTROL or (kind == USER_DEFINED and not options.symbols_in_text)

    @cached_property
    def _byte_ids(self) -> list[int]:
        return [i for _, i in sorted((byte, i) for i, byte in self._byte_values.items())]


def _collapsed(pieces: Iterable[tuple[str, bool]]) -> str:
    """Runs of spaces as one, none at the beginning; pieces that are whole lose only those behind another space."""
    parts, after_space = [], True
    for text, is_whole in pieces:
        text = text if is_whole else re.sub("  +", " ", text)
        text = text.lstrip(" ") if after_space else text
        after_space = text.endswith(" ") if text else after_space
        parts.append(text)
    return "".join(parts)


def _byte_values(path: object, vocabulary: Vocabulary) -> dict[int, int]:
    """Id → byte of all byte tokens; FileError unless they are all 256 or none."""
    values: dict[int, int] = {}
    for i in vocabulary.ids_of(BYTE):
        match = re.fullmatch("<0x([0-9A-Fa-f]{2})>", vocabulary.tokens[i])
        if not match:
            raise FileError(path, f"token {i} is a byte by its type, but is written {vocabulary.tokens[i][:40]!r}")
        values[i] = int(match[1], 16)
    if values and sorted(values.values()) != list(range(256)):
        raise FileError(path, f"its byte tokens do not name each of the 256 bytes once ({len(values)} of them)")
    return values
