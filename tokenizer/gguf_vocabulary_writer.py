"""A tokenizer as keys of a model file, from which `gguf_vocabulary_reader.from_metadata` makes it again.

In: a `Tokenizer`. Out: `tokenizer.ggml.*` for everybody, and `pocketlm.tokenizer.*` for what those keys cannot say: every
field of the tokenizer's `Options`, by the field's name. Knows no file. What llama.cpp makes of the keys is export's.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np

from pocketlm.errors import FileError
from pocketlm.tokenizer.base import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, Tokenizer
from pocketlm.tokenizer.byte_bpe import TO_LETTERS, ByteBPE
from pocketlm.tokenizer.merge import NO_MERGE
from pocketlm.tokenizer.normalizer import Normalizer
from pocketlm.tokenizer.pretokenize import PRE_TOKENIZERS
from pocketlm.tokenizer.sentencepiece import SentencePiece
from pocketlm.tokenizer.sentencepiece_bpe import SentencePieceBPE
from pocketlm.tokenizer.unigram import Unigram

OURS = "pocketlm.tokenizer."
# options that are texts → what they may be (None: anything); all others are true or false
_CHOICES = {"pre_tokenizer": PRE_TOKENIZERS, "prefix": ("always", "missing", "never"),
            "unknown_text": None}  # fmt: skip
_ELSEWHERE = "rules"  # in tokenizer.ggml.precompiled_charsmap
T = TypeVar("T")


# ── options ⇄ keys ───────────────────────────────────────────────────────────────────────────────────────────────────


def option_keys(options: Any) -> dict[str, Any]:
    """The key of every option that is set; the split pattern is written out beside its name."""
    values = {field.name: getattr(options, field.name) for field in fields(options) if field.name != _ELSEWHERE}
    if name := values.get("pre_tokenizer"):
        values["split_pattern"] = list(PRE_TOKENIZERS[name])
    return {OURS + name: value for name, value in values.items() if value is not None}


def read_options(metadata: Mapping[str, Any], path: object, usual: T) -> T:
    """`usual` with the options that the keys give instead. FileError for values that are none."""
    options = {field.name: getattr(usual, field.name) for field in fields(usual)}  # type: ignore[arg-type]
    for name in options.keys() - {_ELSEWHERE}:
        value, choices = metadata.get(OURS + name), _CHOICES.get(name, ())
        if value is None:
            continue
        if not isinstance(value, str if name in _CHOICES else bool) or (choices and value not in choices):
            known = "any text" if choices is None else ", ".join(choices or ("true", "false"))
            raise FileError(path, f"{OURS}{name} is {str(value)[:40]!r}", f"known are {known}")
        options[name] = value
    name, written = options.get("pre_tokenizer"), metadata.get(OURS + "split_pattern")
    if name and written is not None and not (isinstance(written, list) and written == list(PRE_TOKENIZERS[name])):
        raise FileError(path, f"{OURS}split_pattern is not what this version calls {name!r}", "export it again")
    return type(usual)(**options)


# ── a tokenizer → keys ───────────────────────────────────────────────────────────────────────────────────────────────


def to_metadata(tokenizer: Tokenizer, n_vocab: int) -> dict[str, Any]:
    """The keys of a tokenizer, filled up to `n_vocab` tokens."""
    vocabulary = tokenizer.vocabulary
    tokens = filled(vocabulary.tokens, n_vocab)
    types = np.full(n_vocab, UNUSED, np.int32)
    types[: tokenizer.n_vocab] = np.frombuffer(vocabulary.types, np.uint8)
    keys: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    for name, token_id in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("unknown", tokenizer.unk_id)):
        if token_id is not None:
            keys[f"tokenizer.ggml.{name}_token_id"] = token_id
    keys["tokenizer.ggml.add_bos_token"] = tokenizer.adds_bos
    for name in ("strip_left", "strip_right", "normalized"):
        if ids := getattr(vocabulary, name):
            keys[OURS + name] = np.array(sorted(ids), np.int32)
    keys |= normalizer_keys(vocabulary.normalizer)
    if isinstance(tokenizer, ByteBPE):
        return keys | _byte_bpe(tokenizer)
    if isinstance(tokenizer, SentencePieceBPE):
        return keys | _prepared(tokenizer) | _sentencepiece(tokenizer, n_vocab)
    if isinstance(tokenizer, Unigram):
        return keys | _prepared(tokenizer) | _unigram(tokenizer, n_vocab)
    return keys | _characters(tokens, vocabulary.types)


def normalizer_keys(normalizer: Normalizer) -> dict[str, Any]:
    """What a normalizer adds to the keys of a tokenizer."""
    sides = [side for pair in normalizer.replacements for side in pair]
    keys = {OURS + "normal_form": normalizer.form, OURS + "replacements": sides}
    return {key: value for key, value in keys.items() if value}


def with_markers(tokenizer: Tokenizer, markers: Sequence[str], ends: Sequence[str]) -> dict[str, Any]:
    """The keys of a tokenizer in which each of `markers` is one control token, and a text has an end: its own, or the first of
    `ends` that it knows as one, or else `ends[0]`. What is not there yet is added behind all other tokens.
    """
    end = next((name for name in ends if tokenizer.token_id(name) in tokenizer.end_ids), ends[0])
    wanted = dict.fromkeys([*[end] * (tokenizer.eos_id is None), *markers])
    missing = [name for name in wanted if tokenizer.token_id(name) is None]
    keys = to_metadata(tokenizer, tokenizer.n_vocab + len(missing))
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    tokens[tokenizer.n_vocab :] = missing
    for name in wanted:
        if name in missing or not is_one_token(tokenizer, name):
            types[tokens.index(name)] = CONTROL
    if tokenizer.eos_id is None:
        keys["tokenizer.ggml.eos_token_id"] = tokens.index(end)
    return keys


def is_one_token(tokenizer: Tokenizer, marker: str) -> bool:
    """Whether a marker is read as its token; a SentencePiece vocabulary may put a space in front."""
    return tokenizer.token_id(marker) == tokenizer.encode(marker, special=True)[-1]


def _kind(kind: str, model: str, pre_tokenizer: str = "default") -> dict[str, Any]:
    """What kind of tokenizer it is, for pocketlm and for others."""
    return {"tokenizer.ggml.model": model, "tokenizer.ggml.pre": pre_tokenizer, OURS + "kind": kind}


def _byte_bpe(tokenizer: ByteBPE) -> dict[str, Any]:
    return {
        **_kind("byte_bpe", "gpt2", tokenizer.options.pre_tokenizer),
        "tokenizer.ggml.merges": merges(tokenizer),
        "tokenizer.ggml.add_space_prefix": tokenizer.options.space_prefix,
        **option_keys(tokenizer.options),
    }


def _sentencepiece(tokenizer: SentencePieceBPE, n_vocab: int) -> dict[str, Any]:
    """Scores are minus the best rank: their order is all that counts. By scores a token is made of any two pieces;
    where that is not so, the merges go along.
    """
    splits = list(_splits(tokenizer))
    scores, ranks = np.zeros(n_vocab, np.float32), {}
    for rank, left, right in splits:
        ranks.setdefault(left + right, set()).add(rank)
    for token, values in ranks.items():
        scores[tokenizer.vocabulary.index[token]] = -float(min(values))
    keys = {**_kind("sentencepiece", "llama"), "tokenizer.ggml.scores": scores}
    if any(len(values) > 1 or NO_MERGE in values for values in ranks.values()):
        keys[OURS + "merges"] = _in_order(splits)
    return keys


def _unigram(tokenizer: Unigram, n_vocab: int) -> dict[str, Any]:
    exact = np.array(tokenizer.scores)
    scores = np.zeros(n_vocab, np.float32 if (exact.astype(np.float32) == exact).all() else np.float64)
    scores[: len(exact)] = exact
    return {**_kind("unigram", "t5"), "tokenizer.ggml.scores": scores}


def _prepared(tokenizer: SentencePiece) -> dict[str, Any]:
    """How a text is prepared, for both kinds."""
    options = tokenizer.options
    keys: dict[str, Any] = {
        "tokenizer.ggml.add_space_prefix": options.prefix != "never",
        "tokenizer.ggml.remove_extra_whitespaces": options.collapse_spaces,
        **option_keys(options),
    }
    if options.rules:
        keys["tokenizer.ggml.precompiled_charsmap"] = np.frombuffer(options.rules.charsmap, np.uint8)
    return keys


def _characters(tokens: list[str], types: bytes) -> dict[str, Any]:
    """Byte-level BPE whose merges build each character from its bytes: so llama.cpp, too, finds every one of them."""
    letters, starts = list(tokens), set()
    for i, kind in enumerate(types):
        if kind == NORMAL and len(tokens[i]) == 1:
            letters[i] = tokens[i].encode().decode("latin-1").translate(TO_LETTERS)
            starts.update(letters[i][:end] for end in range(2, len(letters[i]) + 1))
    merges = [f"{start[:-1]} {start[-1]}" for start in sorted(starts, key=lambda start: (len(start), start))]
    return {**_kind("characters", "gpt2", "gpt-2"), "tokenizer.ggml.tokens": letters, "tokenizer.ggml.merges": merges}


def filled(tokens: Sequence[str], n_vocab: int) -> list[str]:
    """The tokens by id, with a name of their own for ids that stand for nothing; `n_vocab` of them."""
    names = [token or f"[UNUSED{i}]" for i, token in enumerate(tokens)]
    return names + [f"[PAD{i}]" for i in range(len(names), n_vocab)]


def merges(tokenizer: ByteBPE | SentencePieceBPE) -> list[str]:
    """Every merge as "left right", the best first."""
    return _in_order(_splits(tokenizer))


def _splits(tokenizer: ByteBPE | SentencePieceBPE) -> Iterator[tuple[int, str, str]]:
    """(rank, left, right) of every way to make a token of two symbols; the rank is NO_MERGE where it is not made so."""
    table, symbol, vocabulary = tokenizer.table, tokenizer.symbol, tokenizer.vocabulary
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        for i in range(1, len(token)) if kind not in (CONTROL, UNKNOWN, BYTE) else ():
            left, right = symbol(token[:i]), symbol(token[i:])
            if left is not None and right is not None:
                value = table[left * table.stride + right]
                yield value if value == NO_MERGE else value >> 32, token[:i], token[i:]


def _in_order(splits: Iterable[tuple[int, str, str]]) -> list[str]:
    return [f"{left} {right}" for rank, left, right in sorted(splits) if rank != NO_MERGE]
