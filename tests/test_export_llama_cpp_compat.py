"""What stock llama.cpp makes of an exported tokenizer: the same ids, or exactly what the export says instead.

llama.cpp is asked for the ids of a thousand texts of every kind: words, Unicode, emoji, combining marks, runs of white
space, digits, code, random bytes read as Latin-1, markers as plain text.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import peer_tokenizers as peers
import pytest
from canonical_models import make_hyper, make_model
from llama_reference import LlamaReference
from tokenizer_texts import PROSE, texts, train_sentencepiece

from pocketlm import tokenizer
from pocketlm.export.export import export
from pocketlm.export.llama_cpp_compat import stock_encoder
from pocketlm.export.tokenizer_data import with_tests
from pocketlm.tokenizer.characters import from_table

MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "<|user|>", "<0x41>"]
LINES = PROSE.split("\n") * 5


@cache
def samples() -> list[str]:
    chance = random.Random(3)
    some_bytes = [bytes(chance.choices(range(256), k=chance.randrange(1, 30))).decode("latin-1") for _ in range(100)]
    return texts(900, 80, MARKERS) + some_bytes


def sentencepiece(**options: Any) -> tokenizer.Tokenizer:
    from pocketlm.tokenizer import sentencepiece_model

    return sentencepiece_model.read(Path("t.model"), train_sentencepiece(LINES, 900, **options))


def byte_level(pre: str = "gpt-2", normalizer: str = "", prefix: bool = False, alphabet: bool = True) -> tokenizer.Tokenizer:
    library = pytest.importorskip("tokenizers", reason="trains the tokenizer")
    from pocketlm.tokenizer.huggingface import from_tokenizer_json

    made = getattr(library.normalizers, normalizer)() if normalizer else None
    if alphabet:
        peer = peers.byte_level(LINES, 900, "space in front" if prefix else pre, MARKERS[:3], made)
    else:
        peer = library.Tokenizer(library.models.BPE())
        peer.pre_tokenizer = peers.pre_tokenizer(pre)
        trainer = library.trainers.BpeTrainer(vocab_size=200, special_tokens=MARKERS[:3], show_progress=False)
        peer.train_from_iterator(["some plain text in ASCII"] * 3, trainer)
    return from_tokenizer_json(Path("tokenizer.json"), json.loads(peer.to_str()))


def metaspace(scheme: str, byte_fallback: bool = True) -> tokenizer.Tokenizer:
    from pocketlm.tokenizer.huggingface import from_tokenizer_json

    peer = peers.metaspace(LINES, scheme, byte_fallback=byte_fallback, vocab_size=1500, limit_alphabet=500)
    return from_tokenizer_json(Path("tokenizer.json"), json.loads(peer.to_str()))


def characters(*markers: str) -> tokenizer.Tokenizer:
    alphabet = [*sorted({*PROSE, "😀", "▁"} - {"✅"}), *markers]
    return from_table("meta.pkl", {character: i for i, character in enumerate(alphabet)})


IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
EXACT: dict[str, Callable[[], tokenizer.Tokenizer]] = {
    "SentencePiece": lambda: sentencepiece(byte_fallback=True, **IDENTITY),
    "SentencePiece, no space in front": lambda: sentencepiece(byte_fallback=True, add_dummy_prefix=False, **IDENTITY),
    "Metaspace, never": lambda: metaspace("never"),
    "byte level": byte_level,
    "byte level, single digits": lambda: byte_level("smollm"),
    "characters": characters,
    "characters with markers": lambda: characters("<|endoftext|>", "<s>"),
}
INEXACT: dict[str, Callable[[], tokenizer.Tokenizer]] = {
    "SentencePiece, normalising": lambda: sentencepiece(byte_fallback=True),
    "SentencePiece, symbols": lambda: sentencepiece(byte_fallback=True, user_defined_symbols=MARKERS[:3], **IDENTITY),
    "Metaspace, always": lambda: metaspace("always"),
    "Metaspace, first": lambda: metaspace("first"),
    "byte level, a space in front": lambda: byte_level(prefix=True),
    "byte level, few bytes": lambda: byte_level(alphabet=False),
    "byte level, NFC": lambda: byte_level(normalizer="NFC"),
    "characters, unknown ones": lambda: characters("<unk>"),
}


def written(original: tokenizer.Tokenizer, folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """A GGUF with the tokenizer, its keys and the notes of the receipt."""
    n_vocab, path = original.n_vocab + 3, folder / "t.gguf"
    keys, notes = with_tests(tokenizer.to_metadata(original, n_vocab), original, Path("tokenizer"))
    assert notes == []
    model = make_model(make_hyper("llama", n_vocab=n_vocab, n_layer=1, n_embd=16, n_head=1, n_kv_head=1, head_dim=16, n_ff=32))
    receipt = export(replace(model, metadata={"general.name": "t", **keys}), "checkpoint", path, quant="f16")
    return path, keys, [note for note in receipt.notes if "no end of text" not in note]


def check_exact(original: tokenizer.Tokenizer, folder: Path, special: bool) -> None:
    path, _, notes = written(original, folder)
    assert [note for note in notes if "white space beside markers" not in note] == []
    with LlamaReference(path, vocab_only=True) as stock:
        for text in map(original.encodable, samples()):
            assert stock.tokenize(text) == original.encode(text), text
            assert not special or stock.tokenize(text, special=True) == original.encode(text, special=True), text


@pytest.mark.parametrize("kind", EXACT)
def test_llama_cpp_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    check_exact(EXACT[kind](), tmp_path, special=True)


@pytest.mark.parametrize("name", ["gpt-2", "starcoder", "llama-spm", "phi-3"])
def test_llama_cpp_gives_the_same_ids_for_published_vocabularies(name: str, test_data: Path, tmp_path: Path) -> None:
    original = tokenizer.load(test_data / "vectors" / f"ggml-vocab-{name}.gguf")
    check_exact(original, tmp_path, special=name != "phi-3")  # the only one whose markers swallow white space


def test_llama_cpp_gives_the_same_ids_for_smollm2(smollm2_path: Path, tmp_path: Path) -> None:
    check_exact(tokenizer.load(smollm2_path), tmp_path, special=True)


@pytest.mark.parametrize("kind", INEXACT)
def test_what_the_export_says_of_llama_cpp_is_what_llama_cpp_does(kind: str, tmp_path: Path) -> None:
    original = INEXACT[kind]()
    path, keys, (note,) = written(original, tmp_path)
    _, encode = stock_encoder(keys, path)
    with LlamaReference(path, vocab_only=True) as stock:
        for text in samples():
            assert stock.tokenize(text) == encode(text), text
        tests = keys["pocketlm.tokenizer.test_texts"]
        differ = [text for text in tests if stock.tokenize(text) != original.encode(text)]
    assert f"tokenizes {len(differ)} of the {len(tests)} test texts differently" in note
    for text in differ:
        assert ascii(text)[1:-1] in note.encode("ascii", "backslashreplace").decode(), text


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from llama_reference import LlamaReference
with LlamaReference({path!r}, vocab_only=True) as stock:
    print(stock.tokenize(sys.argv[1]), flush=True)
"""


@pytest.mark.parametrize("kind", ["SentencePiece", "Metaspace"])
def test_the_texts_that_crash_llama_cpp_are_named(kind: str, tmp_path: Path) -> None:
    """Without byte tokens it knows no way out for a character that is not in the vocabulary."""
    original = sentencepiece(character_coverage=0.98, **IDENTITY) if kind == "SentencePiece" else metaspace("never", False)
    path, keys, notes = written(original, tmp_path)
    _, encode = stock_encoder(keys, path)
    tests = keys["pocketlm.tokenizer.test_texts"]
    fatal = [text for text in tests if encode(text) is None]
    assert "crashes" in notes[0]
    assert fatal
    program = CHILD.format(tests=str(Path(__file__).parent), path=str(path))
    for text in fatal[:3]:
        command, environment = [sys.executable, "-c", program, text], {**os.environ, "GGML_NO_BACKTRACE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode != 0, text
        assert done.stdout == "", text
    for text in fatal:
        assert ascii(text)[1:-1] in notes[0].encode("ascii", "backslashreplace").decode()
    with LlamaReference(path, vocab_only=True) as stock:
        for text in samples():
            if (ids := encode(text)) is not None:
                assert stock.tokenize(text) == ids, text


def test_the_token_that_llama_cpp_takes_for_the_end_is_named(tmp_path: Path) -> None:
    from llama_reference import library

    original = characters()
    n_vocab = original.n_vocab
    keys, _ = with_tests(tokenizer.to_metadata(original, n_vocab), original, Path("tokenizer"))
    model = make_model(make_hyper("llama", n_vocab=n_vocab, n_layer=1, n_embd=32, n_head=2, head_dim=16, n_ff=32))
    receipt = export(replace(model, metadata=keys), "checkpoint", tmp_path / "t.gguf", quant="f16")
    lib = library()
    with LlamaReference(tmp_path / "t.gguf", vocab_only=True) as stock:
        end = lib.llama_vocab_eos(stock._vocab)
    assert any(f"stock llama.cpp takes token {end}, {original.decode([end])!r}, for it" in note for note in receipt.notes)
