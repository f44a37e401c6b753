"""Makes vocabularies with the libraries of the field.

In: texts. Out: a tokenizer's files in a folder, which `pocketlm.tokenizer` reads: the ids of training are the runtime's.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pocketlm import tokenizer
from pocketlm.errors import FileError, PocketlmError
from pocketlm.runtime.atomic import replacing_file
from pocketlm.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
END = "<|endoftext|>"  # between documents, and in front of a conversation
ROLE_LETTERS = "".join(ROLES) + "\n"  # with them a model of texts in any script can be taught conversations later
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # of which each kind writes one


def _byte_bpe(texts: Iterable[str], n_vocab: int, markers: Sequence[str], folder: Path) -> None:
    """`tokenizers`: byte-level BPE with GPT-2's pre-tokenizer."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model: Any = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer
    options = {"vocab_size": n_vocab, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    model.train_from_iterator(texts, trainer(special_tokens=[END, *markers], **options))
    write(folder / "tokenizer_config.json", json.dumps({"bos_token": END, "eos_token": END, "add_bos_token": True}))
    write(folder / "tokenizer.json", model.to_str())


def _sentencepiece(texts: Iterable[str], n_vocab: int, markers: Sequence[str], folder: Path) -> None:
    """`sentencepiece`: BPE with byte fallback; markers are user-defined symbols, </s> ends a document."""
    import sentencepiece

    lines = (line for text in texts for line in text.splitlines() if line.strip())
    model = io.BytesIO()
    options = {"model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False, "character_coverage": 0.9995}
    text = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, vocab_size=n_vocab, user_defined_symbols=list(markers), minloglevel=2,
            max_sentence_length=1 << 16, **options, **text,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        raise PocketlmError(f"sentencepiece made no vocabulary of {n_vocab}: {str(error).splitlines()[-1][:200]}") from None
    write(folder / "tokenizer.model", model.getvalue())


def _characters(texts: Iterable[str], n_vocab: int, markers: Sequence[str], folder: Path) -> None:
    """Every character of the texts, in order of their codes; with markers also those that stand between markers."""
    found = sorted({character for text in texts for character in text}.union(ROLE_LETTERS if markers else ""))
    write(folder / "vocab.json", json.dumps([END, *markers, *found], ensure_ascii=False))


KINDS: dict[str, Callable[[Iterable[str], int, Sequence[str], Path], None]] = {
    "bytes": _byte_bpe,
    "sentencepiece": _sentencepiece,
    "characters": _characters,
}


def write(path: Path, content: str | bytes) -> None:
    with replacing_file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def make_tokenizer(kind: str, texts: Iterable[str], n_vocab: int, markers: Sequence[str], folder: Path) -> Tokenizer:
    """Train a tokenizer of KINDS on `texts` and read it back. Raises PocketlmError without the library."""
    try:
        KINDS[kind](texts, n_vocab, markers, folder)
    except ImportError as error:
        raise PocketlmError(f"training needs the package {error.name}; get it with: pip install 'pocketlm[train]'") from None
    return tokenizer.load(folder)


def check_markers(tok: Tokenizer, markers: Sequence[str], path: object) -> None:
    """Raises FileError for a chat marker that is more than one token: a model would learn its letters and never stop."""
    for marker in markers:
        pieces = tok.encode(marker, special=True)
        if tok.token_id(marker) != pieces[-1]:  # a SentencePiece vocabulary may put a space in front
            problem = f"the chat marker {marker} splits into {len(pieces)} tokens of this vocabulary"
            raise FileError(path, problem, "register it as a special token, or choose other markers with --chat")
