"""Vocabularies that other libraries train, and what these libraries say of texts. Skips where one is not installed."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pocketlm.runtime.gguf_reader import open_gguf
from pocketlm.tokenizer.pretokenize import PRE_TOKENIZERS

BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
Ids = list[int]


class Reference(NamedTuple):
    """A library's answers: `encode(texts, special)`, `decode` where it is exact. `specials`: the ways it can be asked."""

    encode: Callable[[list[str], bool], list[Ids]]
    decode: Callable[[Ids], str] | None
    specials: tuple[bool, ...] = (False, True)


# ── tokenizers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def library() -> Any:
    return pytest.importorskip("tokenizers", reason="tokenizers is what is compared with")


def expressions(patterns: Iterable[str]) -> Any:
    """A pre-tokenizer that cuts texts by these, and writes bytes as letters."""
    pre = library().pre_tokenizers
    splits = [pre.Split(library().Regex(pattern), "isolated") for pattern in patterns]
    return pre.Sequence([*splits, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def pre_tokenizer(name: str) -> Any:
    """One of our names in the library's own parts where it has them; "space in front": GPT-2's, with a space put there."""
    pre = library().pre_tokenizers
    level = pre.ByteLevel(add_prefix_space=name == "space in front")
    if name in ("gpt-2", "space in front"):
        return level
    return pre.Sequence([pre.Digits(True), level]) if name == "smollm" else expressions(PRE_TOKENIZERS[name])


def byte_level(
    lines: Iterable[str], size: int, pre: Any = "gpt-2", special: Sequence[str] = (), normalizer: Any = None, **model: Any
) -> Any:
    """A byte-level BPE. `pre`: a name, or a pre-tokenizer of the library."""
    made = library().Tokenizer(library().models.BPE(**model))
    made.pre_tokenizer = pre_tokenizer(pre) if isinstance(pre, str) else pre
    made.decoder, made.normalizer = library().decoders.ByteLevel(), normalizer
    alphabet = library().pre_tokenizers.ByteLevel.alphabet()
    return _trained(made, lines, vocab_size=size, special_tokens=[*special], initial_alphabet=alphabet)


def metaspace(
    lines: Iterable[str], scheme: str, split: bool = False, byte_fallback: bool = True, fuse: bool = True, **training: Any
) -> Any:
    """A BPE that writes spaces as ▁. Its tokens for bytes are no markers, as in the files of models."""
    model, decoders = library().models.BPE(unk_token="<unk>", fuse_unk=fuse, byte_fallback=byte_fallback), library().decoders
    made = library().Tokenizer(model)
    made.pre_tokenizer = library().pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    stripped = [decoders.Strip(" ", 1, 0)] if scheme != "never" else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped])
    special = ["<unk>", "<s>", "</s>", *(BYTE_TOKENS if byte_fallback else ())]
    return unmarked(_trained(made, lines, special_tokens=special, **training))


def _trained(made: Any, lines: Iterable[str], **training: Any) -> Any:
    made.train_from_iterator(lines, library().trainers.BpeTrainer(show_progress=False, **training))
    return made


def unmarked(made: Any) -> Any:
    """The same, its tokens for bytes no markers any more."""
    file = json.loads(made.to_str())
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] not in BYTE_TOKENS]
    return library().Tokenizer.from_str(json.dumps(file))


def smollm2(path: Path) -> Any:
    """SmolLM2's, of what its GGUF says."""
    with open_gguf(path) as gguf:
        tokens, merges = gguf.metadata["tokenizer.ggml.tokens"], gguf.metadata["tokenizer.ggml.merges"]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    made = library().Tokenizer(library().models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    made.pre_tokenizer, made.decoder = pre_tokenizer("smollm"), library().decoders.ByteLevel()
    made.add_special_tokens(tokens[:17])
    return made


def asked_of_tokenizers(theirs: Any) -> Reference:
    def encode(some: list[str], special: bool) -> list[Ids]:
        theirs.encode_special_tokens = not special
        return [encoding.ids for encoding in theirs.encode_batch(some, add_special_tokens=False)]

    return Reference(encode, theirs.decode)


# ── tiktoken ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def rank_lines(words: Iterable[bytes]) -> bytes:
    """A file of ranks: these words, the first with rank 0."""
    return b"".join(base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(words))


def trained_ranks(text: str, size: int, pattern: str) -> bytes:
    educational = pytest.importorskip("tiktoken._educational", reason="tiktoken is what is compared with")
    return rank_lines(educational.bpe_train(text, size, pattern, visualise=None))


def encoding(ranks: bytes, pattern: str, special: Mapping[str, int]) -> Any:
    """tiktoken's Encoding of a file of ranks."""
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is what is compared with")
    words = {base64.b64decode(word): int(rank) for word, rank in map(bytes.split, ranks.splitlines())}
    return tiktoken.Encoding("theirs", pat_str=pattern, mergeable_ranks=words, special_tokens=dict(special))


def asked_of_tiktoken(theirs: Any) -> Reference:
    def encode(some: list[str], special: bool) -> list[Ids]:
        return [theirs.encode(text, allowed_special="all") if special else theirs.encode_ordinary(text) for text in some]

    return Reference(encode, theirs.decode)


# ── sentencepiece, llama.cpp ─────────────────────────────────────────────────────────────────────────────────────────


def asked_of_sentencepiece(model: bytes) -> Reference:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is what is compared with")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    return Reference(lambda some, special: theirs.encode(some, num_threads=1), theirs.decode, (False,))


def asked_of_llama_cpp(path: Path) -> Reference:
    """llama.cpp's answers for the vocabulary of a GGUF."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is what is compared with")
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)

    def encode(some: list[str], special: bool) -> list[Ids]:
        return [theirs.tokenize(text.encode(), add_bos=False, special=special) for text in some]

    return Reference(encode, None)
