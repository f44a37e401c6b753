"""What every tokenizer has in common: the vocabulary, markers in a text, decoding whole and as a stream.

In: a validated `Vocabulary` and, from each kind of tokenizer, how plain text becomes ids. Out: `Tokenizer`.
Knows no file format (`readers`) and no model.
"""

import codecs
import operator
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pocketlm.errors import FileError, UsageError
from pocketlm.tokenizer.markers import Markers
from pocketlm.tokenizer.normalizer import AS_IT_IS, Normalizer
from pocketlm.tokenizer.texts import TextIndex, Texts, index_of

# token types, as GGUF and SentencePiece number them
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
HOLE = re.compile(r"\[(UNUSED|PAD)[0-9]+\]")  # what GGUFs call ids that stand for nothing

# texts of tokens that end a turn wherever a vocabulary marks them as control or user-defined
END_OF_TURN = (
    "</s>", "<eos>", "<EOT>", "<|im_end|>", "<|end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>",
    "<|end_of_text|>", "<end_of_turn>", "<|eot|>", "<|return|>", "<|assistant_end|>",
)  # fmt: skip

_LONGEST_TOKEN = 4096  # characters; what is done for every part of a token would take a stranger's file for ever
_USUAL_TOKEN = 256  # characters
_LENGTHS = 1 << 16  # of the tokens that begin alike, all together: some kinds look for each of them at every place of a text
_CACHED_WORDS = 1 << 16
_CACHED_LENGTH = 32
_CACHED_TEXT = 1 << 14  # characters of a text between two markers: a message
_CACHED_TEXTS = 1 << 18  # and of all that are remembered

# Unicode's White_Space; Python's own `strip` also takes U+001C to U+001F
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


class NoTokenizer(FileError):
    """A model file without a vocabulary: its model can be run with token ids only."""

    def __init__(self, path: object):
        advice = f"give it one: pocketlm export {path} -o OUT.gguf --tokenizer FILE"
        super().__init__(path, "it has no tokenizer, so it takes token ids and no text", advice)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model and what they are for. Made by `make_vocabulary`, which checks it."""

    tokens: Texts  # as the file writes them: byte-level letters, ▁ for a space, <0x0A> for a byte
    types: bytes  # one of the types above for each token
    index: TextIndex  # token → id, holes apart
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    end_ids: frozenset[int]
    adds_bos: bool
    strip_left: frozenset[int]  # markers that swallow white space before them
    strip_right: frozenset[int]  # and after them
    normalizer: Normalizer = AS_IT_IS  # applied to plain text first
    normalized: frozenset[int] = frozenset()  # markers that are looked for in normalised text, and are normalised themselves

    def ids_of(self, *types: int) -> list[int]:
        """The ids of all tokens of these types, in order."""
        wanted = set(types)
        return [i for i, kind in enumerate(self.types) if kind in wanted] if wanted & set(self.types) else []


def make_vocabulary(
    path: object,
    tokens: Sequence[str],
    types: bytes | bytearray,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    unk_id: int | None = None,
    end_ids: Iterable[int | None] = (),
    adds_bos: bool = False,
    strip_left: Collection[int] = (),
    strip_right: Collection[int] = (),
    ends_are_control: bool = False,
    normalizer: Normalizer = AS_IT_IS,
    normalized: Collection[int] = (),
) -> Vocabulary:
    """Check the parts of a vocabulary against each other; FileError names what does not fit.

    Tokens with an empty text are holes: ids that exist and stand for nothing. `ends_are_control`: tokens that are written
    like an end of turn are control tokens, whatever `types` says.
    """
    if not tokens:
        raise FileError(path, "its vocabulary is empty")
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:
        broken = next(i for i, token in enumerate(tokens) if any("\ud800" <= c <= "\udfff" for c in token))
        raise FileError(path, f"token {broken} is not valid Unicode") from None
    if len(longest := max(tokens, key=len)) > _LONGEST_TOKEN:
        raise FileError(path, f"token {tokens.index(longest)} has {len(longest)} characters; {_LONGEST_TOKEN} are possible")
    if len(longest) > _USUAL_TOKEN:
        lengths = Counter[str]()
        for first, length in {(token[:1], len(token)) for token in tokens}:
            lengths[first] += length
        [(first, total)] = lengths.most_common(1)
        if total > _LENGTHS:
            raise FileError(path, f"its tokens that begin with {first!r} have too many lengths")
    index = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(index) != len(tokens):
        for i, token in enumerate(tokens):
            if token and index[token] != i:
                raise FileError(path, f"tokens {i} and {index[token]} are both {token[:40]!r}")
    ends = set(end_ids) | {eos_id}
    markers = [*(("stripping", i) for i in (*strip_left, *strip_right)), *(("normalised", i) for i in normalized)]
    for what, token_id in (("bos", bos_id), ("unknown", unk_id), *(("end", i) for i in ends), *markers):
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise FileError(path, f"{what} token id {token_id} is not in the vocabulary of {len(tokens)}")
    named = [index[text] for text in END_OF_TURN if text in index]
    if ends_are_control:
        types = bytearray(types)
        for i in named:
            types[i] = CONTROL
    ends |= {i for i in named if types[i] in (CONTROL, USER_DEFINED)}
    texts, numbers = index_of(tokens)
    return Vocabulary(
        texts, bytes(types), numbers, bos_id, eos_id, unk_id,
        frozenset(i for i in ends if i is not None), adds_bos, frozenset(strip_left), frozenset(strip_right),
        normalizer, frozenset(normalized if normalizer else ()),
    )  # fmt: skip


class Tokenizer:
    """Text to ids and back. Subclasses say how plain text becomes ids and what bytes a token stands for."""

    # types of tokens that are cut out of the text before anything else: always, and with special=True
    _plain_markers: tuple[int, ...] = (USER_DEFINED,)
    _special_markers: tuple[int, ...] = (CONTROL, UNKNOWN, USER_DEFINED)
    # what an unknown token is decoded to
    _unknown_text = b""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.n_vocab = len(vocabulary.tokens)
        self.bos_id, self.eos_id, self.unk_id = vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id
        self.end_ids, self.adds_bos = vocabulary.end_ids, vocabulary.adds_bos
        self._bytes: dict[int, bytes] = {}
        self._words: dict[str, list[int]] = {}
        self._texts: dict[tuple[str, bool], list[int]] = {}
        self._texts_length = 0

    # to be given by each kind
    def _encode_text(self, text: str, start: bool) -> list[int]:
        """Ids of a text without markers, not empty; `start` says that nothing stands before it."""
        raise NotImplementedError

    def _encode_word(self, word: str) -> list[int]:
        """Ids of a word, for the kinds whose `_encode_text` cuts a text into words that do not touch each other."""
        raise NotImplementedError

    def _token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token that is neither control nor unknown."""
        raise NotImplementedError

    def _split(self, data: bytes) -> list[bytes] | None:
        """The bytes of all plain tokens, whose texts these are, with a NUL between each two. None: not to be had so."""
        return data.split(b"\0")

    def _at_start(self, token_id: int, data: bytes) -> tuple[bytes, bool]:
        """The bytes of the first token of a text, and whether the token after it still counts as the first."""
        return data, False

    def starts_anew_after(self, token_id: int) -> bool:
        """Whether the text after this token was encoded like the start of a text."""
        return False

    def _encode_words(self, words: list[str]) -> list[int]:
        """Ids of all words; short ones are remembered."""
        if len(words) == 1:
            return self._encode_word(words[0])
        ids: list[int] = []
        cache = self._words
        for word in words:
            found = cache.get(word)
            if found is None:
                found = self._encode_word(word)
                if len(word) <= _CACHED_LENGTH:
                    if len(cache) >= _CACHED_WORDS:
                        cache.clear()
                    cache[word] = found
            ids += found
        return ids

    def _encode_message(self, text: str, start: bool) -> list[int]:
        """As `_encode_text`. A conversation is encoded again with every question: what stands between two markers, where
        nothing reaches across, is remembered.
        """
        if len(text) > _CACHED_TEXT:
            return self._encode_text(text, start)
        found = self._texts.get((text, start))
        if found is None:
            found = self._encode_text(text, start)
            if self._texts_length + len(text) > _CACHED_TEXTS:
                self._texts, self._texts_length = {}, 0
            self._texts[text, start] = found
            self._texts_length += len(text)
        return found.copy()

    def _known(self, text: str) -> str:
        """A text without markers and without the characters that `_encode_text` refuses."""
        return text

    def encode(self, text: str, *, special: bool = False, bos: bool = False, errors: str = "strict") -> list[int]:
        """Text to ids.

        `special` reads the control markers in the text (`<|im_start|>`) as their tokens, the longest first;
        otherwise they are text like any other. User-defined symbols are always one token. `bos` puts the
        beginning-of-sequence token in front, where the vocabulary has one.

        `errors`, as in `str.encode`: "strict" raises UsageError for a text that is no valid Unicode (lone surrogates)
        or, in vocabularies without an unknown token, has characters they do not hold; "ignore" leaves those out.
        """
        if errors not in ("strict", "ignore"):
            raise UsageError(f"errors is {errors!r}; it must be 'strict' or 'ignore'")
        if not isinstance(text, str):
            raise UsageError(f"the tokenizer takes a text, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if errors == "strict":
                raise UsageError(
                    f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at position {error.start}: "
                    "not valid Unicode"
                ) from None
            text = text.encode(errors="ignore").decode()
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        encode_text = self._encode_message if special else self._encode_text
        for piece, start, token_id in self._pieces(text, special):
            if errors == "ignore":
                piece = self._known(piece)
            if piece:
                found = encode_text(piece, start)
                if ids:
                    ids += found
                else:  # a long text without markers is not copied
                    ids = found
            if token_id is not None:
                ids.append(token_id)
        return ids

    def _pieces(self, text: str, special: bool) -> Iterator[tuple[str, bool, int | None]]:
        """(normalised text, whether nothing stands before it, the marker behind it or None at the end), in order."""
        normalised = self.vocabulary.normalizer
        markers, afterwards = self._all_markers if special else self._always_markers
        for piece, start, token_id in self._cut_out(markers, text):
            if not afterwards:
                yield normalised(piece), start, token_id
                continue
            for inner, first, found in self._cut_out(afterwards, normalised(piece)):
                yield inner, start and first, token_id if found is None else found

    def _cut_out(self, markers: Markers, text: str) -> Iterator[tuple[str, bool, int | None]]:
        """What `_pieces` yields, for `markers` only and with the text as it is."""
        vocabulary, end = self.vocabulary, 0
        for start, stop, token_id in markers.find(text):
            if start < end:  # swallowed together with the white space after the marker before
                continue
            piece = text[end:start]
            piece = piece.rstrip(_WHITE_SPACE) if token_id in vocabulary.strip_left else piece
            yield piece, end == 0, token_id
            end = stop
            if token_id in vocabulary.strip_right:
                end = len(text) - len(text[stop:].lstrip(_WHITE_SPACE))
        yield text[end:] if end else text, end == 0, None

    def unknown(self, text: str, *, special: bool = False) -> str:
        """The characters of `text`, once normalised, for which the vocabulary has no ids, each once."""
        lost: list[str] = []
        for piece, _, _ in self._pieces(text, special):
            known = self._known(piece)
            if len(known) < len(piece):
                held = set(known)
                lost += [character for character in piece if character not in held]
        return "".join(dict.fromkeys(lost))

    def encodable(self, text: str) -> str:
        """`text` without those characters, normalised where it has any."""
        lost = self.unknown(text)
        return self.vocabulary.normalizer(text).translate(dict.fromkeys(map(ord, lost))) if lost else text

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Ids to text; bytes that are no UTF-8 become U+FFFD. `special` shows control tokens, else they are silent.

        UsageError for an id that is not in the vocabulary.
        """
        if not isinstance(ids, Iterable):
            raise UsageError(f"the tokenizer takes a list of ids, not {type(ids).__name__}")
        stream = self.stream_decoder(special=special)
        return "".join([stream.push(i) for i in ids]) + stream.flush()

    def stream_decoder(self, *, special: bool = False, continues: bool = False) -> "StreamDecoder":
        """A decoder to be given one id after the other. `continues`: the text goes on after other text."""
        return StreamDecoder(self, special, continues)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; a marker's own text; none of an id that only fills the vocabulary up.

        UsageError for an id that is not in the vocabulary.
        """
        found = self._bytes.get(token_id)
        if found is None:
            self._check(token_id)
            token, kind = self.vocabulary.tokens[token_id], self.vocabulary.types[token_id]
            found = token.encode() if kind in (CONTROL, UNKNOWN) else self._token_bytes(token_id)
            if kind == UNUSED and HOLE.fullmatch(token):
                found = b""
            self._bytes[token_id] = found
        return found

    def all_bytes(self) -> list[bytes]:
        """`token_bytes` of every id, in a tenth of the time that it takes to ask for each; they are not remembered."""
        data = self.vocabulary.tokens.data
        found = None if data is None else self._split(data)
        if found is None:
            return [self.token_bytes(i) for i in range(self.n_vocab)]
        for i in self.special_ids():
            found[i] = self.token_bytes(i)
        return found

    def special_ids(self) -> list[int]:
        """The ids of all tokens that are not plain text: control, unknown, byte and user-defined ones, and holes."""
        return np.flatnonzero(np.frombuffer(self.vocabulary.types, np.uint8) != NORMAL).tolist()

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written so in the vocabulary, None where there is none."""
        return self.vocabulary.index.get(text)

    def is_control(self, token_id: int) -> bool:
        """Whether decoding is silent about the token. UsageError for an id that is not in the vocabulary."""
        self._check(token_id)
        return self.vocabulary.types[token_id] in (CONTROL, UNKNOWN)

    def _check(self, token_id: int) -> None:
        try:
            known = 0 <= operator.index(token_id) < self.n_vocab
        except TypeError:
            known = False
        if not known:
            raise UsageError(f"token id {token_id} is not in the vocabulary: ids go from 0 to {self.n_vocab - 1}")

    def _markers_of(self, types: tuple[int, ...]) -> tuple[Markers, Markers | None]:
        """Those that are looked for in the text as it is written, and in the normalised one."""
        tokens, afterwards = self.vocabulary.tokens, self.vocabulary.normalized
        ids = [i for i in self.vocabulary.ids_of(*types) if tokens[i]]
        found = {self.vocabulary.normalizer(tokens[i]): i for i in ids if i in afterwards}
        return Markers({tokens[i]: i for i in ids if i not in afterwards}), Markers(found) if found else None

    @cached_property
    def _always_markers(self) -> tuple[Markers, Markers | None]:
        return self._markers_of(self._plain_markers)

    @cached_property
    def _all_markers(self) -> tuple[Markers, Markers | None]:
        return self._markers_of(self._special_markers)


class StreamDecoder:
    """Ids in, text out as soon as it is certain: incomplete UTF-8 waits for its other bytes.

    All that `push` and `flush` return, joined, is what `Tokenizer.decode` returns for the same ids.
    """

    def __init__(self, tokenizer: Tokenizer, special: bool, continues: bool):
        self._tokenizer, self._special = tokenizer, special
        self._at_start = not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that is certain after this id; may be empty. UsageError for an id that is not in the vocabulary."""
        tokenizer = self._tokenizer
        data = tokenizer.token_bytes(token_id)
        kind = tokenizer.vocabulary.types[token_id]
        if not self._special and kind in (CONTROL, UNKNOWN):
            if kind == CONTROL:
                return ""
            data = tokenizer._unknown_text
        if self._at_start:
            data, self._at_start = tokenizer._at_start(token_id, data)
        if tokenizer.starts_anew_after(token_id):
            self._at_start = True
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What was held back, as U+FFFD: its other bytes never came."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
