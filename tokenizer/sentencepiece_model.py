"""SentencePiece `.model` files: the protobuf read directly, a `Tokenizer` out.

Only what encoding needs is read: the pieces, the trainer's kind of model and unknown surface, the normaliser; and what a
Hugging Face folder says of it beside the file: tokens that were added, markers, whether a text begins with one. Field
numbers: sentencepiece_model.proto of the SentencePiece library; wire format: the Protocol Buffers encoding document.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pocketlm.errors import FileError
from pocketlm.tokenizer.base import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Tokenizer, make_vocabulary
from pocketlm.tokenizer.charsmap import Rules
from pocketlm.tokenizer.huggingface_beside import Beside, with_added
from pocketlm.tokenizer.sentencepiece import UNKNOWN_TEXT, Options
from pocketlm.tokenizer.sentencepiece_bpe import SentencePieceBPE, score_table
from pocketlm.tokenizer.unigram import Unigram

_MODEL_KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
T = TypeVar("T", int, bytes)


class _Damaged(Exception):
    """The bytes are no protobuf."""


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, where it ends) of the number at `at`."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise _Damaged


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) in the file's order; numbers as int, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, at = _varint(data, at)
        if size is None or size > len(data) - at:
            raise _Damaged
        yield key >> 3, data[at : at + size]
        at += size


def _piece(data: bytes) -> tuple[str, float, int]:
    """Text, score and type."""
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


def read(path: Path, data: bytes) -> Tokenizer:
    """The tokenizer of a `.model`. FileError for one that is damaged or of a kind that is not supported."""
    pieces: list[tuple[str, float, int]] = []
    messages: dict[int, dict[int, int | bytes]] = {2: {}, 3: {}, 5: {}}  # trainer, normaliser, denormaliser
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number in messages and isinstance(value, bytes):
                messages[number].update(_fields(value))
    except (_Damaged, UnicodeDecodeError):
        raise FileError(path, "is a damaged SentencePiece model, or none at all") from None
    trainer, normaliser, denormaliser = messages.values()

    def said(message: dict[int, int | bytes], field: int, default: T) -> T:
        value = message.get(field, default)
        if not isinstance(value, type(default)):
            raise FileError(path, "is a damaged SentencePiece model")
        return value

    kind = said(trainer, 3, 1)
    if kind not in (1, 2):
        supported = "BPE and unigram are supported"
        raise FileError(path, f"is a SentencePiece model of the kind {_MODEL_KINDS.get(kind, kind)}", supported)
    if said(trainer, 24, 0) or not said(normaliser, 5, 1) or said(denormaliser, 2, b""):
        raise FileError(path, "is a SentencePiece model that writes spaces as suffixes or changes text when decoding")
    types = [kind for *_, kind in pieces]
    if set(types) - set(range(NORMAL, BYTE + 1)) or types.count(UNKNOWN) != 1:
        raise FileError(path, "is a SentencePiece model with a type of piece there is not, or without one unknown piece")
    tokens = [text for text, *_ in pieces]
    if "" in tokens:
        raise FileError(path, f"its piece {tokens.index('')} is empty")

    def role(field: int, usual: str) -> int | None:
        """The id of the bos or eos piece: a control piece of the name the trainer says."""
        text = said(trainer, field, usual.encode()).decode(errors="replace")
        at = tokens.index(text) if text in tokens else None
        return at if at is not None and types[at] == CONTROL else None

    beside, scores = Beside(path), [score for _, score, _ in pieces]
    added = beside.added()
    ids, unk_id, symbols_in_text = {text: i for i, text in enumerate(tokens)}, types.index(UNKNOWN), True
    if added:
        tokens = with_added(path, ids, added)
        types += [UNUSED] * (len(tokens) - len(types))
        scores += [0.0] * (len(tokens) - len(scores))
        symbols_in_text = USER_DEFINED in types  # Hugging Face cuts its own out of the text before
        for token in added:
            if types[token["id"]] in (NORMAL, CONTROL, UNUSED, USER_DEFINED):
                types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    for i in beside.specials(ids):
        types[i] = types[i] if types[i] == UNKNOWN else CONTROL
    vocabulary = make_vocabulary(
        path, tokens, bytes(types), bos_id=ids.get(beside.said("bos_token"), role(46, "<s>")),
        eos_id=ids.get(beside.said("eos_token"), role(47, "</s>")), unk_id=unk_id, adds_bos=beside.adds_bos(),
        strip_left=[token["id"] for token in added if token.get("lstrip")],
        strip_right=[token["id"] for token in added if token.get("rstrip")],
    )  # fmt: skip
    first_only = beside.said("legacy") is False
    charsmap = said(normaliser, 2, b"")
    options = Options(
        prefix="never" if not said(normaliser, 3, 1) else "missing" if first_only else "always",
        prefix_first_only=first_only,
        rules=Rules(path, charsmap) if charsmap else None,
        collapse_spaces=bool(said(normaliser, 4, 1)),
        symbols_in_text=symbols_in_text,
        byte_fallback=bool(said(trainer, 35, 0)),
        unknown_text=said(trainer, 44, UNKNOWN_TEXT.encode()).decode(errors="replace"),
    )
    if kind == 1:
        return Unigram(path, vocabulary, scores, options)
    return SentencePieceBPE(path, vocabulary, score_table(path, vocabulary, scores), options)
