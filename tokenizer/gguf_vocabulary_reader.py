"""The tokenizer of a GGUF file: its `tokenizer.ggml.*` keys in, a `Tokenizer` out. Knows nothing else of the file.

Keys: the GGUF document in the ggml repository. `pocketlm.tokenizer.*` are ours, written by the exporter where those
do not say enough: `kind` ("byte_bpe", "sentencepiece", "unigram", "characters"), the options by their
names, `strip_left` and `strip_right` (ids), `normal_form` and `replacements` (what, by what, what, by what, …),
`test_texts` and `test_ids` (each "1 2 3"), which are checked here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pocketlm.errors import FileError
from pocketlm.tokenizer import byte_bpe, sentencepiece, sentencepiece_bpe
from pocketlm.tokenizer.base import (
    BYTE,
    CONTROL,
    END_OF_TURN,
    NORMAL,
    UNKNOWN,
    NoTokenizer,
    Tokenizer,
    Vocabulary,
    make_vocabulary,
)
from pocketlm.tokenizer.characters import Characters
from pocketlm.tokenizer.charsmap import Rules
from pocketlm.tokenizer.gguf_vocabulary_writer import OURS, read_options
from pocketlm.tokenizer.merge import rank_table
from pocketlm.tokenizer.normalizer import make_normalizer
from pocketlm.tokenizer.pretokenize import WHOLE_WORDS_FIRST, check_name
from pocketlm.tokenizer.unigram import Unigram

_GGML = "tokenizer.ggml."
_NO_MODEL = ("", "no_vocab", "none")  # tokenizer.ggml.model of a file without one; llama.cpp's converters write the second
# tokenizer.ggml.model → the kind of tokenizer
_KINDS = {"gpt2": "byte_bpe", "llama": "sentencepiece", "t5": "unigram"}
# Hugging Face says this of Phi-3's markers and the GGUF format has no key for it; llama.cpp, too, goes by the name.
_STRIPPING_MODELS = ("phi-3", "phi3")
_USUAL_IDS = {"bos": 1, "eos": 2}  # Llama's, where its kind of tokenizer says none: llama.cpp takes them, too
_TESTED = 1 << 14  # characters; opening a stranger's file would take as long as its texts do
_NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")


class Keys:
    """Typed access to a mapping of GGUF keys; FileError where a value has the wrong type."""

    def __init__(self, metadata: Mapping[str, Any], path: object):
        self.metadata, self.path = metadata, path

    def _get(self, key: str, kind: type, what: str, default: Any) -> Any:
        value = self.metadata.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise FileError(self.path, f"{key} is not {what}")
        return value

    def text(self, key: str, default: str = "") -> str:
        return self._get(key, str, "a text", default)

    def flag(self, key: str, default: bool) -> bool:
        return self._get(key, bool, "true or false", default)

    def number(self, key: str) -> int | None:
        return self._get(key, int, "a whole number", None)

    def texts(self, key: str) -> list[str] | None:
        """A list of texts; None where the key is missing."""
        values = self._get(key, list, "a list of texts", None)
        if values is not None and set(map(type, values)) - {str}:
            raise FileError(self.path, f"{key} is not a list of texts")
        return values

    def numbers(self, key: str, kinds: str) -> Any:
        """A one-dimensional NumPy array whose dtype is of one of `kinds` ("iu", "iuf"); None if it is missing."""
        value = self.metadata.get(key)
        if value is None:
            return None
        try:
            array = np.asarray(value)
        except ValueError:
            array = np.empty((0, 0))
        if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
            raise FileError(self.path, f"{key} is not a list of numbers")
        return array


def from_metadata(metadata: Mapping[str, Any], path: object) -> Tokenizer:
    """The tokenizer that GGUF keys describe; `path` is for error messages.

    NoTokenizer, a FileError, where no key says anything of one. FileError where keys are missing, do not fit together,
    name a tokenizer or pre-tokenizer that is not supported, or where the texts the exporter put in do not give their ids.
    """
    keys = Keys(metadata, path)
    model = keys.text(_GGML + "model")
    if model in _NO_MODEL and not any(key in metadata for key in (_GGML + "tokens", OURS + "kind")):
        raise NoTokenizer(path)
    kind = keys.text(OURS + "kind") or _KINDS.get(model)
    if kind is None:
        said = f"its tokenizer is of the kind {model!r:.60}" if model else "it says no kind of tokenizer"
        raise FileError(path, said, "supported are " + ", ".join(_KINDS))
    if kind not in _MAKERS:
        raise FileError(path, f"{OURS}kind is {kind!r:.60}", "known are " + ", ".join(_MAKERS))
    tokens = keys.texts(_GGML + "tokens")
    if tokens is None:
        raise FileError(path, "it has no vocabulary (tokenizer.ggml.tokens)")
    tokenizer = _MAKERS[kind](keys, tokens, _types(keys, len(tokens)))
    _check_tests(keys, tokenizer)
    return tokenizer


def _types(keys: Keys, n_tokens: int) -> bytearray:
    types = keys.numbers(_GGML + "token_type", "iu")
    if types is None:
        return bytearray([NORMAL]) * n_tokens
    if types.size != n_tokens:
        raise FileError(keys.path, f"{types.size} token types for {n_tokens} tokens")
    if types.size and not 0 <= types.min() <= types.max() <= BYTE:
        raise FileError(keys.path, f"{_GGML}token_type holds a type that is not 1 to 6")
    return bytearray(np.maximum(types, NORMAL).astype(np.uint8).tobytes())


def _vocabulary(keys: Keys, tokens: list[str], types: bytearray, adds_bos: bool, unk_id: int | None = None) -> Vocabulary:
    sides = keys.texts(OURS + "replacements") or []
    if len(sides) % 2:
        raise FileError(keys.path, f"{OURS}replacements are no pairs")
    wanted = {name: keys.number(f"{_GGML}{name}_token_id") for name in ("bos", "eos", "eot", "eom", "unknown")}
    if keys.text(_GGML + "model") == "llama" and not keys.text(OURS + "kind"):
        usual = {name: i for name, i in _USUAL_IDS.items() if types[i : i + 1] == bytes([CONTROL])}
        wanted |= {name: i for name, i in usual.items() if wanted[name] is None}
    return make_vocabulary(
        keys.path,
        tokens,
        types,
        bos_id=wanted["bos"],
        eos_id=wanted["eos"],
        unk_id=unk_id if wanted["unknown"] is None else wanted["unknown"],
        end_ids=(wanted["eot"], wanted["eom"], *_ids(keys, "end_ids")),
        adds_bos=keys.flag(_GGML + "add_bos_token", adds_bos),
        strip_left=_ids(keys, "strip_left"),
        strip_right=_ids(keys, "strip_right") or _stripping(keys, tokens, types),
        normalizer=make_normalizer(
            keys.path, keys.text(OURS + "normal_form") or None, [*zip(sides[::2], sides[1::2], strict=True)]
        ),
        normalized=_ids(keys, "normalized"),
        ends_are_control=not keys.text(OURS + "kind"),  # they are often exported as text; llama.cpp, too, corrects that
    )


def _ids(keys: Keys, name: str) -> list[int]:
    ids = keys.numbers(OURS + name, "iu")
    return [] if ids is None else ids.tolist()


def _stripping(keys: Keys, tokens: list[str], types: bytearray) -> list[int]:
    if keys.text(OURS + "kind") or not any(name in keys.text("general.name").lower() for name in _STRIPPING_MODELS):
        return []
    return [
        i for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if (kind not in (NORMAL, BYTE) or token in END_OF_TURN) and token not in _NOT_STRIPPING
    ]  # fmt: skip


def _byte_bpe(keys: Keys, tokens: list[str], types: bytearray) -> Tokenizer:
    name = keys.text(OURS + "pre_tokenizer") or keys.text(_GGML + "pre", "default")
    check_name(name, keys.path)
    prefix = keys.flag(_GGML + "add_space_prefix", False)
    usual = byte_bpe.Options(name, whole_words_first=name in WHOLE_WORDS_FIRST, space_prefix=prefix)
    options = read_options(keys.metadata, keys.path, usual)
    vocabulary = _vocabulary(keys, tokens, types, adds_bos=name in WHOLE_WORDS_FIRST)
    merges = keys.texts(_GGML + "merges")
    if merges is None:
        raise FileError(keys.path, "it has no merges (tokenizer.ggml.merges)")
    table = rank_table(keys.path, vocabulary.tokens.__getitem__, vocabulary.index, merges, len(tokens))
    return byte_bpe.ByteBPE(vocabulary, table, options)


def _sentencepiece(keys: Keys, tokens: list[str], types: bytearray) -> Tokenizer:
    unknown = types.find(UNKNOWN)
    unigram = keys.text(OURS + "kind") == "unigram" or keys.text(_GGML + "model") == "t5"
    vocabulary = _vocabulary(keys, tokens, types, adds_bos=not unigram, unk_id=unknown if unknown >= 0 else None)
    scores, merges = keys.numbers(_GGML + "scores", "iuf"), keys.texts(OURS + "merges")
    if scores is None:
        raise FileError(keys.path, "it has no scores (tokenizer.ggml.scores)")
    charsmap = keys.numbers(_GGML + "precompiled_charsmap", "iu")
    exact = bool(keys.text(OURS + "kind"))
    usual = sentencepiece.Options(
        prefix="always" if keys.flag(_GGML + "add_space_prefix", True) else "never",
        rules=None if charsmap is None or not charsmap.size else Rules(keys.path, charsmap.astype("u1").tobytes()),
        collapse_spaces=keys.flag(_GGML + "remove_extra_whitespaces", False),
        symbols_in_text=exact,
        byte_fallback=BYTE in types,
        unknown_text=sentencepiece.UNKNOWN_TEXT if exact else "",
    )
    options = read_options(keys.metadata, keys.path, usual)
    if unigram:
        return Unigram(keys.path, vocabulary, scores.tolist(), options)
    if merges is not None:
        table = sentencepiece_bpe.merges_table(keys.path, vocabulary, merges)
    else:
        table = sentencepiece_bpe.score_table(keys.path, vocabulary, scores)
    return sentencepiece_bpe.SentencePieceBPE(keys.path, vocabulary, table, options)


def _characters(keys: Keys, tokens: list[str], types: bytearray) -> Tokenizer:
    if keys.text(_GGML + "model") == "gpt2":  # written in byte-level letters, so that llama.cpp, too, finds them
        try:
            pairs = zip(tokens, types, strict=True)
            tokens = [byte_bpe.from_letters(token).decode() if kind == NORMAL else token for token, kind in pairs]
        except (KeyError, UnicodeDecodeError):
            raise FileError(keys.path, "its characters are not written in byte-level letters") from None
    return Characters(_vocabulary(keys, tokens, types, adds_bos=False))


_MAKERS = {"byte_bpe": _byte_bpe, "sentencepiece": _sentencepiece, "unigram": _sentencepiece, "characters": _characters}


def _check_tests(keys: Keys, tokenizer: Tokenizer) -> None:
    """FileError when the exporter's test texts do not give the ids they gave in training."""
    texts, ids = keys.texts(OURS + "test_texts") or [], keys.texts(OURS + "test_ids") or []
    if len(texts) != len(ids):
        raise FileError(keys.path, f"{len(texts)} test texts with {len(ids)} lists of ids")
    if (n := sum(map(len, texts))) > _TESTED:
        raise FileError(keys.path, f"its test texts have {n} characters; {_TESTED} are possible")
    for text, expected in zip(texts, ids, strict=True):
        if " ".join(map(str, tokenizer.encode(text))) != expected:
            raise FileError(
                keys.path, f"the tokenizer does not give the ids it was exported with for {text[:40]!r}", "export it again"
            )
