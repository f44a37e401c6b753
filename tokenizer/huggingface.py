"""Hugging Face's `tokenizer.json` (and the older `vocab.json` with `merges.txt`): the parsed file in, a `Tokenizer` out.

Supported: BPE, byte-level or in the manner of SentencePiece (Metaspace, or Prepend and Replace as normaliser), and Unigram.
Each part of the file is matched against what is known here; a part that is not is refused by its name, so nothing is
silently left out. Patterns are compared as text and never compiled from the file.
"""

import base64
from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from pocketlm.errors import FileError, refused
from pocketlm.tokenizer import byte_bpe, sentencepiece, sentencepiece_bpe
from pocketlm.tokenizer.base import (
    BYTE,
    CONTROL,
    HOLE,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Tokenizer,
    Vocabulary,
    make_vocabulary,
)
from pocketlm.tokenizer.characters import Characters
from pocketlm.tokenizer.charsmap import Rules
from pocketlm.tokenizer.huggingface_beside import Beside, with_added
from pocketlm.tokenizer.huggingface_writer import COLLAPSE_SPACES, INDIVIDUAL_DIGITS, PREPEND, REPLACE_SPACES
from pocketlm.tokenizer.merge import rank_table
from pocketlm.tokenizer.normalizer import NORMAL_FORMS, Normalizer, make_normalizer
from pocketlm.tokenizer.pretokenize import PRE_TOKENIZERS, matches_all, name_of_patterns
from pocketlm.tokenizer.sentencepiece import SPACE
from pocketlm.tokenizer.unigram import Unigram

AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def from_tokenizer_json(path: Path, file: dict[str, Any], beside: Beside | None = None) -> Tokenizer:
    """The tokenizer of a parsed `tokenizer.json`. Which tokens are bos and eos is read from `tokenizer_config.json`
    beside it, where there is one. FileError for anything that is not supported or does not fit together.
    """
    try:
        return _Reader(path, file, beside or Beside(path)).read()
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise FileError(path, f"is not a tokenizer.json as the tokenizers library writes it ({error!r:.80})") from None


def from_vocab_and_merges(path: Path, vocab: Any, merges_path: Path, merges: bytes) -> Tokenizer:
    """GPT-2's two files: byte-level BPE with the `gpt-2` pre-tokenizer, or that of the class that is named beside them.

    FileError as above.
    """
    with refused(merges_path):
        lines = [line for line in merges.decode().splitlines() if line and not line.startswith("#version")]
    if not isinstance(vocab, dict):
        raise FileError(path, "is not a table from tokens to ids")
    beside = Beside(path)
    of_qwen = beside.kind() == "Qwen2Tokenizer"
    letters = {"type": "ByteLevel", "use_regex": not of_qwen, "add_prefix_space": False}
    split = {"type": "Split", "pattern": {"Regex": PRE_TOKENIZERS["qwen2"][0]}, "behavior": "Isolated", "invert": False}
    markers = [{"id": vocab[name], "content": name, "special": True} for name in vocab if name in _MARKERS]
    file: dict[str, Any] = {
        "model": {"vocab": vocab, "merges": lines}, "added_tokens": [*markers, *beside.added()],
        "normalizer": {"type": "NFC"} if of_qwen else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, letters]} if of_qwen else letters,
    }  # fmt: skip
    return from_tokenizer_json(path, file, beside)


_MARKERS = ("<s>", "</s>", "<pad>", "<unk>", "<mask>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>", "<eos>")


class _Reader:
    def __init__(self, path: Path, file: dict[str, Any], beside: Beside):
        self.path, self.file, self.model, self.beside = path, file, file["model"], beside

    def refuse(self, what: str) -> FileError:
        return FileError(self.path, f"its {what} is not supported")

    def read(self) -> Tokenizer:
        model = self.model
        if model.get("type", "BPE") not in ("BPE", "Unigram"):
            raise self.refuse(f"model {str(model.get('type'))[:40]!r}")
        for part in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(part):
                raise self.refuse(f"model with {part}")
        normalizers, pre_tokenizers = _sequence(self.file, "normalizer"), _sequence(self.file, "pre_tokenizer")
        if model.get("type") == "Unigram":
            return self.sentencepiece(normalizers, pre_tokenizers)
        if not pre_tokenizers and not model["merges"] and REPLACE_SPACES not in normalizers:
            return self.characters(normalizers)
        byte_level = any(part["type"] == "ByteLevel" for part in pre_tokenizers)
        return (self.byte_level if byte_level else self.sentencepiece)(normalizers, pre_tokenizers)

    # ── the two families ──────────────────────────────────────────────────────────────────────────────────────────

    def byte_level(self, normalizers: list[dict[str, Any]], pre_tokenizers: list[dict[str, Any]]) -> Tokenizer:
        name, space_prefix = self.pre_tokenizer(pre_tokenizers)
        options = byte_bpe.Options(
            name,
            whole_words_first=bool(self.model.get("ignore_merges")),
            space_prefix=space_prefix,
            unknown=True,
            fuse_unknown=bool(self.model.get("fuse_unk")),
        )
        vocabulary = self.vocabulary(self.normalizer(normalizers), byte_tokens=False)
        index = vocabulary.index
        if self.model.get("byte_fallback") and "<0x00>" in index and any(letter not in index for letter in byte_bpe.LETTERS):
            raise self.refuse("byte fallback of a byte-level vocabulary that lacks some bytes")
        tokens = vocabulary.tokens
        table = rank_table(self.path, tokens.__getitem__, index, self.merges(), len(tokens))
        return byte_bpe.ByteBPE(vocabulary, table, options)

    def sentencepiece(self, normalizers: list[dict[str, Any]], pre_tokenizers: list[dict[str, Any]]) -> Tokenizer:
        prefix, first_only, split, unigram = "never", False, False, self.model.get("type") == "Unigram"
        collapses = [part for part in normalizers if part in COLLAPSE_SPACES] == COLLAPSE_SPACES
        known = (PREPEND, REPLACE_SPACES, *(COLLAPSE_SPACES if collapses else ()))
        tables = [part["precompiled_charsmap"] for part in normalizers if part["type"] == "Precompiled"]
        rest = [part for part in normalizers if part not in known and part["type"] != "Precompiled"]
        self.check_order(normalizers, known)
        if PREPEND in normalizers:
            prefix = "always"
        if pre_tokenizers == [AT_SPACES] and REPLACE_SPACES in normalizers:
            pre_tokenizers = []  # Gemma's: no space is left for it
        if pre_tokenizers:
            part = pre_tokenizers[0]
            if len(pre_tokenizers) > 1 or part["type"] != "Metaspace" or part["replacement"] != SPACE:
                raise self.refuse(f"pre-tokenizer {_types(pre_tokenizers)}")
            scheme = part.get("prepend_scheme") or ("always" if part.get("add_prefix_space", True) else "never")
            prefix, first_only = ("never" if scheme == "never" else "missing"), scheme == "first"
            split = part.get("split", True)
        elif REPLACE_SPACES not in normalizers:
            raise self.refuse("pre-tokenizer null without a normalizer that writes spaces as ▁")
        if REPLACE_SPACES in normalizers and not (tables or collapses or prefix == "always") and self.normalized():
            rest.append(REPLACE_SPACES)  # they are looked for afterwards
        if len(tables) > 1:
            raise self.refuse(f"normalizer {_types(normalizers)}")
        byte_fallback = bool(self.model.get("byte_fallback"))
        options = sentencepiece.Options(
            prefix=prefix,  # type: ignore[arg-type]
            prefix_first_only=first_only,
            rules=Rules(self.path, base64.b64decode(tables[0])) if tables else None,
            collapse_spaces=collapses,
            split_spaces=split,
            byte_fallback=byte_fallback,
            fuse_unknown=bool(self.model.get("fuse_unk", unigram)),
        )
        vocabulary = self.vocabulary(self.normalizer(rest), byte_tokens=byte_fallback)
        if unigram:
            scores = [score for _, score in self.model["vocab"]]
            return Unigram(self.path, vocabulary, scores + [0.0] * (len(vocabulary.tokens) - len(scores)), options)
        table = sentencepiece_bpe.merges_table(self.path, vocabulary, self.merges())
        return sentencepiece_bpe.SentencePieceBPE(self.path, vocabulary, table, options)

    def check_order(self, parts: list[dict[str, Any]], known: tuple[dict[str, Any], ...]) -> None:
        """Refuse a normalizer whose steps come in another order than theirs here."""
        spaces = (PREPEND, REPLACE_SPACES)
        stages = [3 if part in spaces else 2 if part in known else 1 if part["type"] == "Precompiled" else 0 for part in parts]
        if stages != sorted(stages):
            raise self.refuse(f"normalizer {_types(parts)} in this order")

    def normalizer(self, parts: list[dict[str, Any]]) -> Normalizer:
        """One normal form, then replacements of texts, where they may as well be made all at once."""
        form = parts[0]["type"] if parts and parts[0]["type"] in NORMAL_FORMS else None
        pairs: list[tuple[str, str]] = []
        for part in parts[form is not None :]:
            if part["type"] != "Replace" or not isinstance(what := part["pattern"].get("String"), str):
                raise self.refuse(f"normalizer '{_types(parts)}'")
            if any(set(what) & {*before, *by} for before, by in pairs):
                raise self.refuse(f"normalizer, in which {what[:40]!r} is replaced in what was replaced before,")
            pairs.append((what, part["content"]))
        return make_normalizer(self.path, form, pairs)

    def characters(self, normalizers: list[dict[str, Any]]) -> Tokenizer:
        """Every token that is no marker is a character."""
        vocabulary = self.vocabulary(self.normalizer(normalizers), byte_tokens=False)
        types = bytearray(vocabulary.types)
        for i in vocabulary.ids_of(NORMAL):
            if HOLE.fullmatch(vocabulary.tokens[i]):
                types[i] = UNUSED
            elif len(vocabulary.tokens[i]) > 1:
                raise self.refuse(f"token {vocabulary.tokens[i][:40]!r} without a merge that makes it")
        return Characters(replace(vocabulary, types=bytes(types)))

    def pre_tokenizer(self, parts: list[dict[str, Any]]) -> tuple[str, bool]:
        """The name in the table of a byte-level pre-tokenizer, and whether it puts a space in front."""
        *before, last = parts
        unknown = self.refuse(f"pre-tokenizer {_types(parts)}")
        if last["type"] != "ByteLevel":
            raise unknown
        use_regex, space_prefix = last.get("use_regex", True), last.get("add_prefix_space", True)
        if not before and use_regex:
            return "gpt-2", space_prefix
        if not before or space_prefix:
            raise unknown
        if before == [INDIVIDUAL_DIGITS] and use_regex:
            return "smollm", False
        if any(part["type"] != "Split" for part in before) or use_regex:
            raise unknown
        name = name_of_patterns(*(split["pattern"].get("Regex", "") for split in before))
        if name is None:
            raise self.refuse(f"pre-tokenizer pattern {', '.join(str(split['pattern'])[:80] for split in before[:4])!r}")
        same = (("Isolated", False), ("Removed", True))[: 1 + matches_all(name)]  # what lies between the matches is lost
        for split in before:
            if (split["behavior"], split["invert"]) not in same:
                raise self.refuse(f"pre-tokenizer with the behaviour {str(split['behavior'])[:40]!r}")
        return name, False

    # ── the vocabulary ────────────────────────────────────────────────────────────────────────────────────────────

    def merges(self) -> list[str]:
        """Each as "left right"; newer files have them as pairs."""
        merges = self.model["merges"]
        for i, merge in enumerate(merges):
            if type(merge) is list and len(merge) == 2 and " " in merge[0] + merge[1]:
                raise self.refuse(f"merge {i} of pieces with spaces")
        return [merge if type(merge) is str else " ".join(merge) for merge in merges]

    def vocabulary(self, normalizer: Normalizer, byte_tokens: bool) -> Vocabulary:
        vocab, added = self.model["vocab"], self.file.get("added_tokens") or []
        ids = {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
        tokens = with_added(self.path, ids, added)
        types = bytearray(NORMAL if token else UNUSED for token in tokens)
        for token in added:
            types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
        for i in self.beside.specials(ids):
            types[i] = CONTROL
        if byte_tokens:  # who trains with `tokenizers` gives them as special tokens
            for byte in range(256):
                if (i := ids.get(f"<0x{byte:02X}>")) is not None:
                    types[i] = BYTE
        unk_id = self.model["unk_id"] if isinstance(vocab, list) else ids.get(self.model.get("unk_token"))
        if unk_id is not None:
            types[unk_id] = UNKNOWN
        leading = self.leading()
        bos_id = leading[0] if leading else ids.get(self.beside.said("bos_token"))
        return make_vocabulary(
            self.path,
            tokens,
            bytes(types),
            bos_id=bos_id,
            eos_id=ids.get(self.beside.said("eos_token")),
            unk_id=unk_id,
            adds_bos=bool(leading) or (self.beside.said("add_bos_token") is True and bos_id is not None),
            strip_left=[token["id"] for token in added if token.get("lstrip")],
            strip_right=[token["id"] for token in added if token.get("rstrip")],
            normalizer=normalizer,
            normalized=self.normalized(),
        )

    def leading(self) -> list[int]:
        """The ids of the markers that the file puts in front of a text: one, or none."""
        whole: dict[str, Any] = self.file.get("post_processor") or {"type": "ByteLevel"}
        parts: list[dict[str, Any]] = whole["processors"] if whole["type"] == "Sequence" else [whole]
        if any(part["type"] not in _LEADING for part in parts):
            raise self.refuse(f"post-processor {_types(parts)}")
        ids = [i for part in parts for i in _LEADING[part["type"]](part)]
        if len(ids) > 1 or any(type(i) is not int for i in ids):
            raise self.refuse(f"post-processor {_types(parts)} with {len(ids)} tokens in front of a text")
        return ids

    def normalized(self) -> list[int]:
        """The added tokens that are looked for in the normalised text."""
        return [token["id"] for token in self.file.get("added_tokens") or [] if token.get("normalized")]


def _sequence(file: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its parts."""
    value = file.get(part)
    if value is None:
        return []
    inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}[part]
    return value[inner] if value["type"] == "Sequence" else [value]


def _types(parts: list[dict[str, Any]]) -> str:
    return " + ".join(str(part.get("type"))[:40] for part in parts[:5])


def _of_template(part: dict[str, Any]) -> list[int]:
    markers = takewhile(lambda piece: "SpecialToken" in piece, part["single"])
    return [i for piece in markers for i in part["special_tokens"][piece["SpecialToken"]["id"]]["ids"]]


def _classifying(part: dict[str, Any]) -> list[int]:
    return [part["cls"][1]]


# a post-processor's type → the ids that it puts in front of a text
_LEADING: dict[str, Callable[[dict[str, Any]], list[int]]] = {
    "ByteLevel": lambda part: [], "TemplateProcessing": _of_template, "BertProcessing": _classifying,
    "RobertaProcessing": _classifying,
}  # fmt: skip
