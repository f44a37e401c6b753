"""A model with every kind of tokenizer, from every kind of file, talks in the real program: not only where Python is."""

import json
import os
import pickle
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from packing import real_stub
from peer_tokenizers import rank_lines
from test_tokenizer_gguf import BPE
from tiny_models import write_model
from tokenizer_texts import PROSE, train_sentencepiece

import pocketlm
from pocketlm import tokenizer
from pocketlm.cli import main
from pocketlm.tokenizer.byte_bpe import LETTERS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="these tests drive a POSIX system")

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
LETTER_IDS = {letter: i for i, letter in enumerate([*LETTERS, "he", "ll"])}
MERGES = ["h e", "l l"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["<unk>", "<s>", "</s>", *BYTES, "▁", *"abcdefghijklmnopqrstuvwxyz", "▁h", "▁he", "ll"]
PIECE_MERGES = ["▁ h", "▁h e", "l l"]
CHARACTERS = sorted({*PROSE})


def byte_level_json(folder):
    path = folder / "tokenizer.json"
    model = {"type": "BPE", "vocab": LETTER_IDS, "merges": MERGES}
    end = {"id": len(LETTER_IDS), "content": "<|end|>", "special": True}
    path.write_text(json.dumps({"added_tokens": [end], "normalizer": None, "pre_tokenizer": BYTE_LEVEL, "model": model}))
    return path


def sentencepiece_json(folder):
    """SentencePiece's kind as Hugging Face writes it: merges in place of scores, spaces replaced by the normaliser."""
    path = folder / "tokenizer.json"
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    decoder = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
               {"type": "Strip", "content": " ", "start": 1, "stop": 0}]  # fmt: skip
    model = {"type": "BPE", "vocab": {p: i for i, p in enumerate(PIECES)}, "merges": PIECE_MERGES, "unk_token": "<unk>",
             "byte_fallback": True, "fuse_unk": True}  # fmt: skip
    added = [{"id": i, "content": PIECES[i], "special": True} for i in range(3)]
    path.write_text(json.dumps({
        "added_tokens": added, "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoder}, "model": model,
    }))  # fmt: skip
    return path


def vocab_and_merges(folder):
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(LETTER_IDS))
    return folder


def sentencepiece(byte_fallback, kind="bpe"):
    def file(folder):
        path = folder / "tokenizer.model"
        path.write_bytes(train_sentencepiece(PROSE.split("\n"), 512, byte_fallback=byte_fallback, model_type=kind))
        return path

    return file


def ranks(folder):
    path = folder / "words.tiktoken"
    words = [*(bytes([byte]) for byte in range(256)), b"he", b"ll"]
    path.write_bytes(rank_lines(words))
    return path


def meta_pkl(folder):
    table = {c: i for i, c in enumerate(CHARACTERS)}
    (folder / "meta.pkl").write_bytes(pickle.dumps({"stoi": table, "itos": {i: c for c, i in table.items()}}))
    return folder / "meta.pkl"


def characters_json(folder):
    (folder / "characters.json").write_text(json.dumps(CHARACTERS))
    return folder / "characters.json"


FILES = {
    "byte-level BPE, tokenizer.json": byte_level_json,
    "byte-level BPE, vocab.json and merges.txt": vocab_and_merges,
    "byte-level BPE, tiktoken ranks": ranks,
    "SentencePiece BPE, .model with byte fallback": sentencepiece(True),
    "SentencePiece BPE, .model without": sentencepiece(False),
    "SentencePiece BPE, tokenizer.json": sentencepiece_json,
    "unigram, .model": sentencepiece(True, "unigram"),
    "characters, meta.pkl": meta_pkl,
    "characters, JSON": characters_json,
}
SPM_BYTES = {  # llama's own kind, as converters of others write it
    "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.scores": [0.0] * 259 + [-1.0 * i for i in range(len(PIECES) - 259)],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259),
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
}  # fmt: skip
SINGLE = ["<unk>", "<s>", "</s>", *(c.replace(" ", "▁") for c in CHARACTERS), "▁h", "he"]
SPM_PLAIN = {
    **SPM_BYTES, "tokenizer.ggml.tokens": SINGLE, "tokenizer.ggml.scores": [-1.0 * i for i in range(len(SINGLE))],
    "tokenizer.ggml.token_type": [2, 3, 3] + [1] * (len(SINGLE) - 3),
}  # fmt: skip
KEYS = {  # GGUF files of other people, without our own keys
    "a GGUF of the kind gpt2": BPE,
    "a GGUF of the kind llama": SPM_BYTES,
    "a GGUF of the kind llama without bytes": SPM_PLAIN,
}
NO_KEYS = dict.fromkeys(("tokenizer.ggml.pre", "tokenizer.ggml.merges", "tokenizer.ggml.bos_token_id",
                         "tokenizer.ggml.eos_token_id", "tokenizer.ggml.add_bos_token"))  # fmt: skip


def keys_of(kind, folder):
    """The tokenizer's keys of a model file, as `pocketlm export` writes them, or as they came."""
    if kind in KEYS:
        return KEYS[kind]
    tok = tokenizer.load(FILES[kind](folder))
    return tokenizer.to_metadata(tok, tok.n_vocab)


def model_of(kind, folder):
    keys = {**NO_KEYS, **{key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in keys_of(kind, folder).items()}}
    return write_model(
        folder / "model.gguf", rows=len(keys["tokenizer.ggml.tokens"]), n_layer=1, n_ctx=256, metadata=keys, format="Q8_0"
    )


@pytest.fixture(scope="module")
def stub(request):
    return real_stub(Path(request.config.cache.mkdir("pocketlm-stub")))


def run(program, *arguments, stdin=""):
    return subprocess.run([program, *arguments], input=stdin, capture_output=True, text=True, encoding="utf-8", timeout=120,
                          env={"PATH": os.environ["PATH"], "TMPDIR": os.environ.get("TMPDIR", "/tmp")})  # fmt: skip


def letters(text):
    """Without what a terminal does not get: control characters, and spaces at the ends of lines."""
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c)[0] != "C")


def test_there_is_a_model_for_every_kind_that_is_read():
    """So that the next kind of vocabulary is packed, too."""
    from pocketlm.tokenizer.gguf_vocabulary_reader import _MAKERS

    kinds = {"a GGUF of the kind gpt2": "byte_bpe", "byte-level": "byte_bpe", "a GGUF of the kind llama": "sentencepiece",
             "SentencePiece": "sentencepiece", "unigram": "unigram", "characters": "characters"}  # fmt: skip
    covered = {kind for name in (*FILES, *KEYS) for start, kind in kinds.items() if name.startswith(start)}
    assert covered == {*_MAKERS}


@pytest.mark.parametrize("kind", [*FILES, *KEYS])
def test_a_packed_model_of_every_kind_of_tokenizer_talks(kind, stub, tmp_path, capsys):
    model, friend = model_of(kind, tmp_path), tmp_path / "friend"
    assert main(["pack", str(model), "--stub", str(stub), "-o", str(friend), "--temp", "0", "--max-tokens", "12"]) == 0
    assert "tried: right: tokenizer, template, " in capsys.readouterr().out
    text = "hello" if kind in KEYS else "Hello, she"
    with pocketlm.load(friend) as here:
        said = "".join(p.text for p in here.chat([{"role": "user", "content": text}], max_tokens=12, temperature=0))
    answered = run(friend, "--no-save", stdin=f"{text}\n")
    assert (answered.returncode, answered.stderr) == (0, "")
    assert letters(answered.stdout) == letters(said)
    assert said


def test_the_test_of_an_executable_notices_another_tokenizer(stub, tmp_path, monkeypatch, capsys):
    """Reference results of another vocabulary: pack refuses, and leaves nothing behind."""
    from pocketlm.build import selftest

    first, second = model_of("characters, JSON", tmp_path), tmp_path / "second"
    second.mkdir()
    plain = selftest.reference
    other = random.Random(1).sample(CHARACTERS, len(CHARACTERS))
    (second / "characters.json").write_text(json.dumps(other))
    tok = tokenizer.load(second / "characters.json")

    def reference(file, texts):
        stored = json.loads(plain(file, texts))
        stored["texts"] = [[text, tok.encode(text), text] for text in texts]
        return json.dumps(stored).encode()

    monkeypatch.setattr(selftest, "reference", reference)
    assert main(["pack", str(first), "--stub", str(stub), "-o", str(tmp_path / "friend")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "does not pass its own test: tokenizer other ids" in error
    assert not [path for path in tmp_path.iterdir() if "friend" in path.name]
