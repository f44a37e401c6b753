"""SentencePiece BPE: the text is normalised, spaces become ▁, neighbours merge by the score of what they give.

In: a vocabulary with scores (or merges), and `Options` that say how the text is prepared. Out: a
`Tokenizer`. Source: Kudo and Richardson 2018, "SentencePiece". The `.model` files of that library, GGUF vocabularies
of the kind `llama` and Hugging Face's form of them differ in small things only, and those are `Options`.
"""

import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal

from pocketlm.errors import FileError
from pocketlm.tokenizer.base import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Markers, Tokenizer, Vocabulary
from pocketlm.tokenizer.merge import LONG, NO_MERGE, MergeTable, concatenation_table, merge, merge_long, rank_table
from pocketlm.tokenizer.normalize import NormalForm, Rules
from pocketlm.tokenizer.texts import TextIndex

SPACE = "▁"
UNKNOWN_TEXT = " ⁇ "  # what the SentencePiece library decodes an unknown token to
_CODE_POINTS = 0x110000


@dataclass(frozen=True)
class Options:
    """How the text is prepared and what becomes of characters that are not in the vocabulary."""

    prefix: Literal["always", "missing", "never"] = "always"  # ▁ before the text; "missing": if it begins with none
    prefix_first_only: bool = False  # not before what follows a marker
    rules: Rules | None = None  # replacements of the precompiled normaliser
    normal_form: NormalForm | None = None
    collapse_spaces: bool = False  # runs of spaces become one, none at either end
    symbols_in_text: bool = False  # user-defined symbols are found in the normalised text (the SentencePiece library),
    #                                or cut out of the text before (llama.cpp, Hugging Face)
    split_spaces: bool = False  # each ▁ begins a word of its own
    byte_fallback: bool = True  # a character that is not in the vocabulary becomes its bytes, else unknown
    fuse_unknown: bool = True  # a run of unknown characters is one unknown token
    unknown_text: str = ""  # what the unknown token is decoded to


def score_table(path: object, vocabulary: Vocabulary, scores: Sequence[float]) -> MergeTable:
    """Merges by score, the highest first. FileError for scores that do not fit the vocabulary."""
    import numpy as np

    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (len(vocabulary.tokens),):
        raise FileError(path, f"{values.size} scores for {len(vocabulary.tokens)} tokens")
    if not np.isfinite(values).all():
        raise FileError(path, f"the score of token {int(np.argmin(np.isfinite(values)))} is not a finite number")
    types = np.frombuffer(vocabulary.types, dtype=np.uint8)
    ranks = np.unique(-values, return_inverse=True)[1]
    merged = [i for i in np.flatnonzero((types == NORMAL) | (types == UNUSED)).tolist() if len(vocabulary.tokens[i]) > 1]
    ties = len(set(ranks[merged].tolist())) < len(merged)
    n_symbols = len(vocabulary.tokens) + _CODE_POINTS
    order = array("i", ranks.astype("i").tobytes())
    return concatenation_table(_text_of(vocabulary), mergeable(vocabulary), order, n_symbols, ties)


def merges_table(path: object, vocabulary: Vocabulary, merges: Sequence[str]) -> MergeTable:
    """Merges "left right" in their order, as Hugging Face writes them. FileError for pieces that do not exist."""
    n_symbols = len(vocabulary.tokens) + _CODE_POINTS
    return rank_table(path, _text_of(vocabulary), vocabulary.index, merges, n_symbols)


def _text_of(vocabulary: Vocabulary) -> Callable[[int], str]:
    """Symbol → text: a token, or a character that is none and has its number beyond the vocabulary."""
    tokens, n_vocab = vocabulary.tokens, len(vocabulary.tokens)
    return lambda symbol: tokens[symbol] if symbol < n_vocab else chr(symbol - n_vocab)


def mergeable(vocabulary: Vocabulary) -> TextIndex:
    """Token → id of all that plain text can become: no control, unknown or byte tokens."""
    return vocabulary.index.without(vocabulary.ids_of(CONTROL, UNKNOWN, BYTE))


class _Symbols(dict[str, int]):
    """Character → its symbol: the id of its token, or a number beyond the vocabulary that says which character."""

    def __missing__(self, character: str) -> int:
        return self.beyond + ord(character)

    beyond = 0


class SentencePieceBPE(Tokenizer):
    """Tokenizer of SentencePiece's BPE kind, also as Llama 1 and 2, Phi-3 and Mistral carry it in GGUF files.

    `table` and `options` are what it was made with.
    """

    def __init__(self, path: object, vocabulary: Vocabulary, table: MergeTable, options: Options):
        super().__init__(vocabulary)
        self.table, self.options = table, options
        self._unknown_text = options.unknown_text.encode()
        if options.symbols_in_text:
            self._plain_markers, self._special_markers = (), (CONTROL, UNKNOWN)
        self._byte_values = _byte_values(path, vocabulary)
        if options.byte_fallback and not self._byte_values:
            raise FileError(path, "byte fallback is asked for, but the vocabulary has no byte tokens")

    def symbol(self, text: str) -> int | None:
        """What the merge table calls a text: the id of its token, or the number of a character that is none."""
        return self._symbols[text] if len(text) == 1 else self.vocabulary.index.get(text)

    # ── encoding ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _encode_text(self, text: str, start: bool) -> list[int]:
        text = self._prepare(text, start)
        ids: list[int] = []
        end = 0
        if self.options.symbols_in_text:
            for begin, stop, token_id in self._symbols_in_text.find(text):
                ids += self._encode_piece(text[end:begin])
                ids.append(token_id)
                end = stop
        last = self._encode_piece(text[end:] if end else text)
        ids = ids + last if ids else last
        if self.options.fuse_unknown and self.unk_id in ids:
            unk_id = self.unk_id
            ids = [i for at, i in enumerate(ids) if i != unk_id or not at or ids[at - 1] != unk_id]
        return ids

    def _prepare(self, text: str, start: bool) -> str:
        """Normalised, with ▁ for spaces and in front."""
        options = self.options
        if options.normal_form:
            from unicodedata import normalize

            text = normalize(options.normal_form, text)
        if options.rules:
            text = options.rules.apply(text, self._symbols_in_text)
        if options.collapse_spaces:
            text = re.sub("  +", " ", text).lstrip(" ")
            if not text:
                return text
        text = text.replace(" ", SPACE)
        wanted = options.prefix == "always" or (options.prefix == "missing" and not text.startswith(SPACE))
        if wanted and (start or not options.prefix_first_only):
            text = SPACE + text
        return text.rstrip(SPACE) if options.collapse_spaces else text

    def _encode_piece(self, text: str) -> list[int]:
        """Ids of a prepared text without user-defined symbols."""
        return self._encode_words(self._cut.findall(text) if self._cut else [text] * bool(text))

    def _encode_word(self, word: str) -> list[int]:
        symbols = self._merge(word, self.table)
        if self._has_unused:
            symbols = self._without_unused(symbols)
        if max(symbols) >= self.n_vocab:
            symbols = self._without_unknown(symbols)
        return symbols

    def _merge(self, text: str, table: MergeTable) -> list[int]:
        symbols = self._symbols
        if len(text) < LONG:
            return merge([symbols[character] for character in text], table)
        import numpy as np

        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        return merge_long(codes, lambda code: symbols[chr(code)], table)

    def _without_unused(self, symbols: list[int]) -> list[int]:
        """Unused pieces taken apart again into the two they were merged from."""
        types, tokens, n_vocab, table = self.vocabulary.types, self.vocabulary.tokens, self.n_vocab, self.table
        ids: list[int] = []
        waiting = symbols[::-1]
        while waiting:
            symbol = waiting.pop()
            if symbol >= n_vocab or types[symbol] != UNUSED or len(tokens[symbol]) == 1:
                ids.append(symbol)
                continue

            def resolve(left: int, right: int, whole: int = symbol) -> int:
                value = table[left * table.stride + right]
                return NO_MERGE if value & 0xFFFFFFFF == whole else value

            parts = MergeTable(table.stride, resolve, table.ties)
            waiting += self._merge(tokens[symbol], parts)[::-1]
        return ids

    def _without_unknown(self, symbols: list[int]) -> list[int]:
        """Characters that are not in the vocabulary as bytes or as the unknown token."""
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
    def _symbols(self) -> _Symbols:
        symbols = _Symbols({token: i for token, i in mergeable(self.vocabulary).pairs() if len(token) == 1})
        symbols.beyond = self.n_vocab
        return symbols

    @cached_property
    def _symbols_in_text(self) -> Markers:
        """The user-defined symbols that are found in the text itself."""
        return self._markers_of((USER_DEFINED,) if self.options.symbols_in_text else ())

    @cached_property
    def _has_unused(self) -> bool:
        return UNUSED in self.vocabulary.types

    @cached_property
    def _cut(self) -> re.Pattern[str] | None:
        """Cuts a text where no piece of the vocabulary can reach across, so that words can be remembered."""
        if self.options.split_spaces:
            return re.compile(f"{SPACE}?[^{SPACE}]+|{SPACE}")
        if any(SPACE in token.lstrip(SPACE) for token in mergeable(self.vocabulary)):
            return None
        return re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")

    # ── decoding ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _token_bytes(self, token_id: int) -> bytes:
        byte = self._byte_values.get(token_id)
        if byte is not None:
            return bytes([byte])
        token = self.vocabulary.tokens[token_id]
        literal = self.vocabulary.types[token_id] == USER_DEFINED and not self.options.symbols_in_text
        return (token if literal else token.replace(SPACE, " ")).encode()

    def _at_start(self, token_id: int, data: bytes) -> tuple[bytes, bool]:
        options = self.options
        if not data:
            return data, True
        if self.vocabulary.types[token_id] in (BYTE, UNKNOWN) or not data.startswith(b" "):
            return data, False
        if options.prefix == "never" and not options.collapse_spaces:
            return data, False
        return data[1:], options.collapse_spaces and len(data) == 1

    def _starts_anew_after(self, token_id: int) -> bool:
        options, kind = self.options, self.vocabulary.types[token_id]
        if options.prefix == "never" or options.prefix_first_only:
            return False
        return kind == CONTROL or (kind == USER_DEFINED and not options.symbols_in_text)

    @cached_property
    def _byte_ids(self) -> list[int]:
        return [i for _, i in sorted((byte, i) for i, byte in self._byte_values.items())]


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
