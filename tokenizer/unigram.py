"""Unigram: of all ways to cut a prepared text into pieces of the vocabulary, the likeliest.

In: a vocabulary with the logarithm of each piece's probability, and `Options`. Out: a `Tokenizer`. Source: Kudo 2018, "Subword
Regularization". The SentencePiece library and Hugging Face's tokenizers find the same best way, the one adding up in single
precision, the other in double.
"""

from array import array
from collections.abc import Sequence

from pocketlm.errors import FileError
from pocketlm.tokenizer.base import NORMAL, UNUSED, USER_DEFINED, Vocabulary
from pocketlm.tokenizer.sentencepiece import WORDS, Options, SentencePiece, mergeable

_UNKNOWN_BELOW = 10.0  # how far below the worst piece's score that of an unknown character is
_PER_BYTE = 0.1  # of a user-defined symbol, behind its first: all others have logarithms below 0 (measured with version 0.2.3)


class Unigram(SentencePiece):
    """Tokenizer of SentencePiece's own default kind. `scores` and `options` are what it was made with."""

    def __init__(self, path: object, vocabulary: Vocabulary, scores: Sequence[float], options: Options):
        """FileError for scores that do not fit the vocabulary."""
        super().__init__(path, vocabulary, options)
        self.scores = scores = [float(score) for score in scores]
        if len(scores) != len(vocabulary.tokens):
            raise FileError(path, f"{len(scores)} scores for {len(vocabulary.tokens)} tokens")
        if bad := next((i for i, score in enumerate(scores) if not -1e30 < score < 1e30), None):
            raise FileError(path, f"the score of token {bad} is {scores[bad]}")
        types = vocabulary.types
        learnt = [score for score, kind in zip(scores, types, strict=True) if kind == NORMAL] or [0.0]
        self._kind = "f" if options.symbols_in_text else "d"
        self._unknown_score = array(self._kind, [min(learnt) - _UNKNOWN_BELOW])[0]
        self._scored: dict[str, tuple[float, int]] = {}
        lengths: dict[str, set[int]] = {}
        for text, i in mergeable(vocabulary).pairs():
            symbol = types[i] == USER_DEFINED and options.symbols_in_text
            if types[i] != UNUSED:
                self._scored[text] = _PER_BYTE * (len(text.encode()) - 1) if symbol else scores[i], i
                lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(found) for first, found in lengths.items()}

    def _encode_prepared(self, text: str) -> list[int]:
        words = WORDS.findall(text) if self.options.split_spaces else [text]
        return self._without_unknown([symbol for word in words for symbol in self._best(word)])

    def _best(self, text: str) -> list[int]:
        """The likeliest pieces; a character that is in none as the number `n_vocab` plus its own."""
        scored, lengths, n = self._scored, self._lengths, len(text)
        best, rounded = array(self._kind, [0.0]) * (n + 1), array(self._kind, [0.0])
        ending, symbols = [-1] * (n + 1), [0] * (n + 1)  # where the best piece that ends here begins, and its symbol
        for start, first in enumerate(text):
            if start and ending[start] < 0:
                continue
            here, alone = best[start], False
            for length in lengths.get(first, ()):
                end = start + length
                if end > n:
                    break
                found = scored.get(text[start:end])
                if found is not None:
                    alone = alone or length == 1
                    rounded[0] = found[0] + here
                    score = rounded[0]
                    if ending[end] < 0 or score > best[end]:
                        best[end], ending[end], symbols[end] = score, start, found[1]
            if not alone:
                rounded[0] = self._unknown_score + here
                score = rounded[0]
                if ending[start + 1] < 0 or score > best[start + 1]:
                    best[start + 1], ending[start + 1], symbols[start + 1] = score, start, self.n_vocab + ord(first)
        ids: list[int] = []
        while n:
            ids.append(symbols[n])
            n = ending[n]
        return ids[::-1]
