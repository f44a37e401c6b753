"""The vocabulary of a run: made with the libraries of the field, or taken from somebody's file.

In: texts, or the file of a tokenizer. Out: a tokenizer's file in the run's folder, which `pocketlm.tokenizer` reads: the ids
of training are the runtime's.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pocketlm import tokenizer
from pocketlm.errors import FileError, PocketlmError, UsageError, quoted
from pocketlm.runtime.atomic import write_file
from pocketlm.tokenizer import Tokenizer
from pocketlm.tokenizer.gguf_vocabulary_writer import is_one_token, with_markers
from pocketlm.tokenizer.normalizer import AS_IT_IS, Normalizer

ROLES = ("system", "user", "assistant")
END = "<|endoftext|>"  # between documents, and in front of a conversation
OTHER_ENDS = ("</s>", "<|end_of_text|>", "<eos>")  # as others call it
ROLE_LETTERS = "".join(ROLES) + "\n"  # with them a model of texts in any script can be taught conversations later
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # of which a run has one
MADE_OF = "vocabulary_of.json"  # beside it: what it was made of
MOST_BYTES = 1 << 26  # of texts, evenly drawn, that a vocabulary is made of: more takes memory, and changes little
LONGEST_LINE = 1 << 14  # characters; sentencepiece leaves longer ones out


@dataclass(frozen=True)
class Wanted:
    """What a vocabulary shall hold. `symbols` are one token in every text, `markers` only where a chat writes them."""

    n_vocab: int
    markers: tuple[str, ...] = ()
    symbols: tuple[str, ...] = ()
    coverage: float = 0.9995  # share of all characters that get a token (sentencepiece); others become bytes
    normalizer: Normalizer = AS_IT_IS  # of every text, now and later


def _byte_bpe(texts: Iterable[str], wanted: Wanted, folder: Path) -> None:
    """`tokenizers`: byte-level BPE with GPT-2's pre-tokenizer."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model: Any = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer
    options = {"vocab_size": wanted.n_vocab, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    model.train_from_iterator(texts, trainer(special_tokens=[END, *wanted.markers, *wanted.symbols], **options))
    file = json.loads(model.to_str())
    for token in file["added_tokens"]:
        token["special"] = token["content"] not in wanted.symbols
    write_file(folder / "tokenizer_config.json", json.dumps({"bos_token": END, "eos_token": END, "add_bos_token": True}))
    write_file(folder / "tokenizer.json", json.dumps(file, ensure_ascii=False))


def _sentencepiece(texts: Iterable[str], wanted: Wanted, folder: Path) -> None:
    """`sentencepiece`: BPE with byte fallback; markers are user-defined symbols, </s> ends a document."""
    import sentencepiece

    lines = (line for text in texts for line in text.splitlines() if line.strip())
    cut = (line[start : start + LONGEST_LINE] for line in lines for start in range(0, len(line), LONGEST_LINE))
    model = io.BytesIO()
    options = {"model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False, "character_coverage": wanted.coverage}
    text = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=cut, model_writer=model, vocab_size=wanted.n_vocab, minloglevel=2, max_sentence_length=1 << 16,
            user_defined_symbols=[*wanted.markers, *wanted.symbols], **options, **text,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[-1][:200]
        raise PocketlmError(f"sentencepiece made no vocabulary of {wanted.n_vocab}: {reason}") from None
    write_file(folder / "tokenizer.model", model.getvalue())


def _characters(texts: Iterable[str], wanted: Wanted, folder: Path) -> None:
    """Every character of the texts, in order of their codes; with markers also those that stand between markers."""
    found = {character for text in texts for character in text}.union(ROLE_LETTERS if wanted.markers else "")
    longer = [symbol for symbol in wanted.symbols if len(symbol) > 1]
    alphabet = sorted(found.union(symbol for symbol in wanted.symbols if len(symbol) == 1))
    write_file(folder / "vocab.json", json.dumps([END, *wanted.markers, *longer, *alphabet], ensure_ascii=False))


KINDS: dict[str, Callable[[Iterable[str], Wanted, Path], None]] = {
    "bytes": _byte_bpe,
    "sentencepiece": _sentencepiece,
    "characters": _characters,
}


def kept_or_made(folder: Path, options: dict[str, Any], texts: Sequence[Path], make: Callable[[Path], Any]) -> Tokenizer:
    """The run's tokenizer; where there is none, or no step was made with it and another is asked for, what `make` puts into the
    folder that it is given. Raises UsageError for other options than those that the weights were trained with.
    """
    path, was = folder / MADE_OF, None
    with suppress(OSError, ValueError):
        was = json.loads(path.read_text("utf-8"))
    files = [(str(text.resolve()), text.stat().st_size, text.stat().st_mtime_ns) for text in texts if text.exists()]
    made_of = json.loads(json.dumps({**options, "texts": files}))
    if here := _file_of(folder):
        if not isinstance(was, dict) or was.pop("file", None) != _digest(here):
            return tokenizer.load(folder)  # somebody has put it there
        wrong = [name for name in made_of if was.get(name) != made_of[name]]
        if has_weights(folder):
            if wrong := [name for name in wrong if name != "texts"]:
                said = "; ".join(f"{name} = {quoted(was.get(name))}, not {quoted(made_of[name])}" for name in wrong)
                raise UsageError(f"{folder} has a vocabulary of {said}; choose another folder with -o")
            return tokenizer.load(folder)
        if not wrong:  # a run was ended before its first step
            return tokenizer.load(folder)
    with TemporaryDirectory(prefix=".vocabulary-", dir=folder) as temporary:
        make(Path(temporary))
        lost = was.get("file") if isinstance(was, dict) and not here and has_weights(folder) else None
        if lost and lost != _digest(_file_of(Path(temporary)) or path):
            problem = "has lost the tokenizer that its weights were trained with, and these texts make another"
            raise FileError(folder, problem, "put it back, or choose another folder with -o")
        for name in (*FILES, "tokenizer_config.json", "data/state.json", MADE_OF):  # of an attempt with another text, say
            (folder / name).unlink(missing_ok=True)
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)
    made = _file_of(folder)
    assert made is not None
    write_file(path, json.dumps({**made_of, "file": _digest(made)}, ensure_ascii=False, indent=1))
    return tokenizer.load(folder)


def has_weights(folder: Path) -> bool:
    """Whether a run has made a step: its weights know its vocabulary."""
    return any(folder.glob("*.pt"))


def _file_of(folder: Path) -> Path | None:
    return next((path for name in FILES if (path := folder / name).exists()), None)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_tokenizer(kind: str, texts: Iterable[str], wanted: Wanted, folder: Path) -> Tokenizer:
    """Train a tokenizer of KINDS on `texts` and read it back. Raises PocketlmError without the library."""
    wanted = replace(wanted, symbols=tuple(dict.fromkeys(s for s in wanted.symbols if s not in (END, *wanted.markers))))
    if changed := [token for token in (*wanted.markers, *wanted.symbols) if wanted.normalizer(token) != token]:
        raise UsageError(f"--normalize replaces {changed[0]}, which is a token of its own: take it out of one of the two")
    try:
        with TemporaryDirectory() as temporary:
            place = Path(temporary) if wanted.normalizer else folder  # the libraries' files cannot say every normalisation
            KINDS[kind](map(wanted.normalizer, texts), wanted, place)
            if wanted.normalizer:
                keys = tokenizer.to_metadata(made := tokenizer.load(place), made.n_vocab)
                write_file(folder / "vocab.json", tokenizer.to_json(keys | tokenizer.normalizer_keys(wanted.normalizer)))
    except ImportError as error:
        raise PocketlmError(f"training needs the package {error.name}; get it with: pip install 'pocketlm[train]'") from None
    return tokenizer.load(folder)


def taken_as(taken: Tokenizer, markers: Sequence[str]) -> str:
    """A tokenizer made elsewhere as a run's vocab.json: with a token that ends a text, and `markers`."""
    return tokenizer.to_json(with_markers(taken, markers, (END, *OTHER_ENDS)))


def check_markers(tok: Tokenizer, markers: Sequence[str], path: object) -> None:
    """Raises FileError for a chat marker that is more than one token: a model would learn its letters and never stop."""
    for marker in markers:
        if not is_one_token(tok, marker):
            n_tokens = len(tok.encode(marker, special=True))
            problem = f"the chat marker {marker} splits into {n_tokens} tokens of this vocabulary"
            raise FileError(path, problem, "add it with --add-markers, or choose other markers with --chat")
