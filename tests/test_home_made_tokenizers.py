"""llama2.c's `tokenizer.bin`, llm.c's `gpt2_tokenizer.bin`, nanochat's `tokenizer.pkl`: the ids of what they were made with."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizer_texts import PROSE, texts, train_sentencepiece

from pocketlm.errors import FileError
from pocketlm.tokenizer import Tokenizer, from_metadata, load, to_metadata

SOME = texts(2000, 5)


@pytest.fixture(scope="module")
def sentencepiece_model() -> Any:
    """Trained as llama2.c trains a vocabulary of one's own."""
    library = pytest.importorskip("sentencepiece", reason="the reference")
    data = train_sentencepiece(
        PROSE.split("\n"), 700, model_type="bpe", byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
        unk_surface=r" \342\201\207 ", normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return library.SentencePieceProcessor(model_proto=data)


def tokenizer_bin(model: Any) -> bytes:
    """The file as llama2.c's exporter writes it."""
    pieces = []
    for i in range(model.vocab_size()):
        text = {model.bos_id(): "\n<s>\n", model.eos_id(): "\n</s>\n"}.get(i, model.id_to_piece(i)).replace("▁", " ").encode()
        pieces.append((model.get_score(i), text))
    longest = max(len(text) for _, text in pieces)
    return struct.pack("<I", longest) + b"".join(struct.pack("<fI", score, len(text)) + text for score, text in pieces)


def travels(tokenizer: Tokenizer, path: Path) -> None:
    """Written to a model file and read again, it gives the same ids."""
    again = from_metadata(to_metadata(tokenizer, tokenizer.n_vocab), path)
    for text in SOME:
        assert again.encode(text) == tokenizer.encode(text)


def test_llama2c(tmp_path: Path, sentencepiece_model: Any) -> None:
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(tokenizer_bin(sentencepiece_model))
    tokenizer = load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocabulary.adds_bos) == (1, 2, True)
    for text in SOME:
        ids = tokenizer.encode(text)
        assert ids == sentencepiece_model.encode(text), text
        assert tokenizer.decode(ids) == sentencepiece_model.decode(ids), text
    travels(tokenizer, path)


def test_a_damaged_tokenizer_bin_is_one_line(tmp_path: Path, sentencepiece_model: Any) -> None:
    data, path = tokenizer_bin(sentencepiece_model), tmp_path / "tokenizer.bin"
    scrambled = (data[:8] + b"\xff" * 4 + data[12:], data[:12] + b"\xff\xfe" + data[14:])
    for damaged in (data[:-1], data[:9], data + b"\0" * 9, *scrambled):
        path.write_bytes(damaged)
        with pytest.raises(FileError) as error:
            load(path)
        assert "\n" not in str(error.value)


NANOCHAT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
MARKERS = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"]


@pytest.fixture(scope="module")
def encoding() -> Any:
    tiktoken = pytest.importorskip("tiktoken", reason="the reference")
    educational = pytest.importorskip("tiktoken._educational", reason="trains the reference")
    ranks = educational.bpe_train(PROSE, 500, NANOCHAT, visualise=None)
    markers = {marker: len(ranks) + i for i, marker in enumerate(MARKERS)}
    return tiktoken.Encoding("rustbpe", pat_str=NANOCHAT, mergeable_ranks=ranks, special_tokens=markers)


def test_nanochat(tmp_path: Path, encoding: Any) -> None:
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(encoding))
    tokenizer = load(tmp_path)
    assert tokenizer.bos_id == encoding.encode_single_token("<|bos|>")
    assert encoding.encode_single_token("<|assistant_end|>") in tokenizer.vocabulary.end_ids
    for text in SOME:
        assert tokenizer.encode(text) == encoding.encode_ordinary(text), text
    chat = "<|user_start|>12345 words<|user_end|><|assistant_start|>"
    assert tokenizer.encode(chat, special=True) == encoding.encode(chat, allowed_special="all")
    travels(tokenizer, path)


def test_llm_c(tmp_path: Path) -> None:
    """The file as its train_gpt2.py writes it: the tokens of tiktoken by their ids."""
    tiktoken = pytest.importorskip("tiktoken", reason="the reference")
    gpt2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    ranks = pytest.importorskip("tiktoken._educational", reason="trains the reference").bpe_train(PROSE, 500, gpt2, None)
    encoding = tiktoken.Encoding("gpt2", pat_str=gpt2, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    data = struct.pack("<4i", 20240328, 2, len(tokens), len(ranks)).ljust(1024, b"\0")
    data += b"".join(bytes([len(token)]) + token for token in tokens)
    path = tmp_path / "gpt2_tokenizer.bin"
    path.write_bytes(data)
    tokenizer = load(tmp_path)
    assert tokenizer.eos_id == encoding.eot_token
    for text in SOME:
        assert tokenizer.encode(text) == encoding.encode_ordinary(text), text
    travels(tokenizer, path)
    for damaged in (data[:-1], data[:9], data + b"\0", data + b"\1a", data[:8] + b"\0" + data[9:]):
        path.write_bytes(damaged)
        with pytest.raises(FileError, match=r"gpt2_tokenizer\.bin of llm\.c|no token for the byte"):
            load(path)


def test_a_pickle_of_anything_else_is_refused_by_name(tmp_path: Path, encoding: Any) -> None:
    path, state = tmp_path / "tokenizer.pkl", encoding.__getstate__()
    for change in ({"pat_str": r"\w+"}, {"mergeable_ranks": {b"a": "x"}}, {"special_tokens": None}):
        path.write_bytes(pickle.dumps(_Encoding({**state, **change})))
        with pytest.raises(FileError, match=r"pattern|ranks|no tokenizer"):
            load(path)


class _Encoding:
    """An object with the fields of tiktoken's."""

    def __init__(self, fields: dict[str, Any]):
        self.__dict__.update(fields)
