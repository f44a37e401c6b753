"""A tokenizer as Hugging Face's `tokenizer.json`, which the `tokenizers` library runs; huggingface.py reads it again.

In: a `Tokenizer`. Out: the file's content as plain data. A tokenizer that the library would give other ids than pocketlm does
is refused with the reason.
"""

from __future__ import annotations

import base64
from typing import Any

from pocketlm.errors import FileError
from pocketlm.tokenizer.base import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, Tokenizer
from pocketlm.tokenizer.byte_bpe import ByteBPE
from pocketlm.tokenizer.gguf_vocabulary_writer import filled, merges
from pocketlm.tokenizer.pretokenize import PRE_TOKENIZERS
from pocketlm.tokenizer.sentencepiece import SPACE
from pocketlm.tokenizer.sentencepiece_bpe import SentencePieceBPE
from pocketlm.tokenizer.unigram import Unigram

REPLACE_SPACES: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND: dict[str, Any] = {"type": "Prepend", "prepend": SPACE}
# SentencePiece's remove_extra_whitespaces: runs of spaces become one, and there are none at either end
COLLAPSE_SPACES: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
    for pattern, content in ((" {2,}", " "), (r"\A +", ""), (rf"[ {SPACE}]+\z", ""))
]
_GRAPHEMES = "tokenizer.json normalises whole graphemes: combining marks and control characters may get other ids"
INDIVIDUAL_DIGITS: dict[str, Any] = {"type": "Digits", "individual_digits": True}


def to_tokenizer_json(tokenizer: Tokenizer, n_vocab: int, path: object) -> tuple[dict[str, Any], list[str]]:
    """The content of `tokenizer.json`, its vocabulary filled up to `n_vocab` tokens, and what the user should know of it.

    `path` is for the error message. Raises FileError where the library would not give the same ids.
    """
    if isinstance(tokenizer, Unigram):
        raise _refused(path, "scores of a unigram vocabulary that are added up in single precision")
    vocabulary = tokenizer.vocabulary
    byte_level = isinstance(tokenizer, ByteBPE)
    sentencepiece = isinstance(tokenizer, SentencePieceBPE)
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(filled(vocabulary.tokens, n_vocab))},
        "merges": [],
    }  # fmt: skip
    if byte_level or sentencepiece:
        model["merges"] = merges(tokenizer)
    if tokenizer.unk_id is not None and not (byte_level and not tokenizer.options.unknown):
        model["unk_token"] = vocabulary.tokens[tokenizer.unk_id]
    if byte_level:
        steps, own = _byte_level(tokenizer, path)
    elif sentencepiece:
        _check_unused(tokenizer, model["merges"], path)
        steps, own = _sentencepiece(tokenizer, path)
    else:
        steps, own = {"decoder": {"type": "Fuse"}, "normalizer": _sequence("normalizers", _normalizers(tokenizer, path))}, {}
    added = [
        {
            "id": i, "content": vocabulary.tokens[i], "single_word": False, "lstrip": i in vocabulary.strip_left,
            "rstrip": i in vocabulary.strip_right, "normalized": i in vocabulary.normalized,
            "special": vocabulary.types[i] != USER_DEFINED,
        }
        for i in vocabulary.ids_of(CONTROL, UNKNOWN, USER_DEFINED)
        if vocabulary.tokens[i]
    ]  # fmt: skip
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": None, "post_processor": _leading(tokenizer), "decoder": None, **steps, "model": {**model, **own},
    }  # fmt: skip
    return content, [_GRAPHEMES] if sentencepiece and tokenizer.options.rules else []


def _byte_level(tokenizer: ByteBPE, path: object) -> tuple[dict[str, Any], dict[str, Any]]:
    options = tokenizer.options
    patterns = PRE_TOKENIZERS[options.pre_tokenizer]
    own_split = patterns in (PRE_TOKENIZERS["gpt-2"], PRE_TOKENIZERS["smollm"])  # those that the library splits by itself
    if options.space_prefix and patterns != PRE_TOKENIZERS["gpt-2"]:
        raise _refused(path, f"the pre-tokenizer {options.pre_tokenizer} with a space in front of the text")
    letters = {"type": "ByteLevel", "add_prefix_space": options.space_prefix, "trim_offsets": True, "use_regex": own_split}
    before = [INDIVIDUAL_DIGITS] if patterns == PRE_TOKENIZERS["smollm"] else []
    if not own_split:
        before = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} for pattern in patterns
        ]
    steps = {
        "normalizer": _sequence("normalizers", _normalizers(tokenizer, path)),
        "pre_tokenizer": _sequence("pretokenizers", [*before, letters]),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }
    return steps, {"ignore_merges": options.whole_words_first, "fuse_unk": options.fuse_unknown}


def _sentencepiece(tokenizer: SentencePieceBPE, path: object) -> tuple[dict[str, Any], dict[str, Any]]:
    options, vocabulary = tokenizer.options, tokenizer.vocabulary
    if options.symbols_in_text and vocabulary.ids_of(USER_DEFINED):
        raise _refused(path, "user-defined symbols that are found in the text after it was normalised")
    if options.prefix == "always" and (options.prefix_first_only or options.split_spaces):
        raise _refused(path, f"{SPACE} in front of every text together with words that are split or markers that end it")
    normalizers = _normalizers(tokenizer, path)
    if options.rules:
        table = base64.b64encode(options.rules.charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": table})
    if options.collapse_spaces:
        normalizers += COLLAPSE_SPACES
    if options.prefix == "always":
        normalizers.append(PREPEND)
    metaspace = None
    if options.prefix == "missing" or options.split_spaces:
        scheme = "never" if options.prefix == "never" else "first" if options.prefix_first_only else "always"
        metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": options.split_spaces}
    else:
        normalizers.append(REPLACE_SPACES)
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if options.prefix != "never" or options.collapse_spaces:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    steps = {
        "normalizer": _sequence("normalizers", normalizers),
        "pre_tokenizer": metaspace,
        "decoder": _sequence("decoders", decoders),
    }
    return steps, {"byte_fallback": options.byte_fallback, "fuse_unk": options.fuse_unknown}


def _normalizers(tokenizer: Tokenizer, path: object) -> list[dict[str, Any]]:
    """A normal form, then replacements, which the library makes one after the other and not all at once."""
    normalizer, touched = tokenizer.vocabulary.normalizer, set()
    parts: list[dict[str, Any]] = [{"type": normalizer.form}] if normalizer.form else []
    for what, by in normalizer.replacements:
        if touched & set(what):
            raise _refused(path, "replacements that share characters")
        touched |= {*what, *by}
        parts.append({"type": "Replace", "pattern": {"String": what}, "content": by})
    return parts


def _check_unused(tokenizer: Tokenizer, merges: list[str], path: object) -> None:
    vocabulary = tokenizer.vocabulary
    unused = {vocabulary.tokens[i] for i in vocabulary.ids_of(UNUSED)}
    if any(merge.replace(" ", "") in unused for merge in merges):
        raise _refused(path, "unused pieces that are made on the way to others")


def _leading(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The template that puts the beginning-of-sequence token in front."""
    if not tokenizer.adds_bos or tokenizer.bos_id is None:
        return None
    bos = tokenizer.vocabulary.tokens[tokenizer.bos_id]

    def pattern(*numbers: int) -> list[dict[str, Any]]:
        pairs = zip("AB", numbers, strict=False)
        return [
            part
            for name, number in pairs
            for part in (
                {"SpecialToken": {"id": bos, "type_id": number}}, {"Sequence": {"id": name, "type_id": number}}
            )
        ]  # fmt: skip

    special = {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": pattern(0), "pair": pattern(0, 1), "special_tokens": special}


def _sequence(name: str, parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    return {"type": "Sequence", name: parts} if len(parts) > 1 else parts[0] if parts else None


def _refused(path: object, what: str) -> FileError:
    return FileError(path, f"its tokenizer cannot be said in a tokenizer.json ({what})", "export a GGUF")
