"""SentencePiece BPE: neighbours in a prepared text merge, the pair whose token has the highest score first.

In: a vocabulary with scores (or merges), and `Options`. Out: a `Tokenizer`. Knows how pieces merge, not how a text is prepared.
"""

import re
from array import array
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from pocketlm.errors import FileError
from pocketlm.tokenizer.base import NORMAL, UNUSED, Vocabulary
from pocketlm.tokenizer.merge import NO_MERGE, MergeTable, concatenation_table, merge, rank_table
from pocketlm.tokenizer.sentencepiece import SPACE, WORDS, Options, SentencePiece, mergeable

_CODE_POINTS = 0x110000


def score_table(path: object, vocabulary: Vocabulary, scores: Sequence[float]) -> MergeTable:
    """Merges by score, the highest first. FileError for scores that do not fit the vocabulary."""
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


class _Symbols(dict[str, int]):
    """Character → its symbol: the id of its token, or a number beyond the vocabulary that says which character."""

    def __missing__(self, character: str) -> int:
        return self.beyond + ord(character)

    beyond = 0


class SentencePieceBPE(SentencePiece):
    """Tokenizer of SentencePiece's BPE kind, also as Llama 1 and 2, Phi-3 and Mistral carry it in GGUF files.

    `table` and `options` are what it was made with.
    """

    def __init__(self, path: object, vocabulary: Vocabulary, table: MergeTable, options: Options):
        super().__init__(path, vocabulary, options)
        self.table = table

    def symbol(self, text: str) -> int | None:
        """A text's symbol in the merge table: its token's id, or a number of its own for a character without a token."""
        return self._symbols[text] if len(text) == 1 else self.vocabulary.index.get(text)

    def _encode_prepared(self, text: str) -> list[int]:
        ids: list[int] = []
        end = 0
        if self.options.symbols_in_text:
            for begin, stop, token_id in self._symbols_in_text.find(text):
                ids += self._encode_piece(text[end:begin])
                ids.append(token_id)
                end = stop
        last = self._encode_piece(text[end:] if end else text)
        return ids + last if ids else last

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
        return merge(list(map(self._symbols.__getitem__, text)), table)

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

    @cached_property
    def _symbols(self) -> _Symbols:
        symbols = _Symbols({token: i for token, i in mergeable(self.vocabulary).pairs() if len(token) == 1})
        symbols.beyond = self.n_vocab
        return symbols

    @cached_property
    def _has_unused(self) -> bool:
        return UNUSED in self.vocabulary.types

    @cached_property
    def _cut(self) -> re.Pattern[str] | None:
        """Cuts a text where no piece of the vocabulary can reach across, so that words can be remembered."""
        if self.options.split_spaces:
            return WORDS
        if any(SPACE in token.lstrip(SPACE) for token in mergeable(self.vocabulary)):
            return None
        return re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
