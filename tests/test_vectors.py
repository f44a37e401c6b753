"""Exactness without any other library: the ids that the references gave for small vocabularies, kept in `vectors/`.

`make_vectors.py` makes them; where the libraries are installed, what is kept is compared with what they say now.
"""

import json
import lzma

import make_vectors
import pytest
from make_vectors import ANSWERS, FOLDER, VOCABULARIES, apart

from pocketlm import tokenizer

KEPT = json.loads(lzma.decompress(ANSWERS.read_bytes()))
TEXTS = KEPT["texts"]
LIBRARIES = {"sentencepiece": "sentencepiece", "tokenizers": "tokenizers", "tiktoken": "tiktoken", "gguf": "llama_cpp"}


def load(name, folder):
    path, kept = FOLDER / name, KEPT["answers"][name]
    if path.suffix == ".xz":
        path = folder / path.stem
        path.write_bytes(lzma.decompress((FOLDER / name).read_bytes()))
    return tokenizer.load(path, **kept["load"])


def ids_of(line):
    return [int(i) for i in line.split()]


def test_every_vocabulary_has_an_answer_for_every_text():
    assert set(KEPT["answers"]) == set(VOCABULARIES)
    assert all(len(kept["plain"]) == len(TEXTS) > 140 for kept in KEPT["answers"].values())
    assert {path.name for path in FOLDER.iterdir()} == {*VOCABULARIES, ANSWERS.name}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_are_those_the_library_gave(name, tmp_path):
    tok, kept = load(name, tmp_path), KEPT["answers"][name]
    for text, line in zip(TEXTS, kept["plain"], strict=True):
        assert apart(name, text) or tok.encode(text) == ids_of(line), text


@pytest.mark.parametrize("name", [name for name, kept in KEPT["answers"].items() if kept["special"] is not None])
def test_ids_with_markers_are_those_the_library_gave(name, tmp_path):
    tok, kept = load(name, tmp_path), KEPT["answers"][name]
    assert kept["special"], "some texts have markers"
    for i, text in enumerate(TEXTS):
        expected = ids_of(kept["special"].get(str(i), kept["plain"][i]))
        assert apart(name, text) or tok.encode(text, special=True) == expected, text


@pytest.mark.parametrize("name", [name for name, kept in KEPT["answers"].items() if kept["decoded"] is not None])
def test_texts_of_ids_are_those_the_library_gave(name, tmp_path):
    tok, kept = load(name, tmp_path), KEPT["answers"][name]
    for i, line in enumerate(kept["plain"]):
        assert tok.decode(ids_of(line)) == kept["decoded"].get(str(i), TEXTS[i]), line


@pytest.mark.parametrize("name", ["gguf-gpt-2.gguf", "gguf-starcoder.gguf", "gguf-qwen2.gguf", "gguf-llama.gguf"])
def test_a_vocabulary_that_holds_every_byte_gives_every_text_back(name, tmp_path):
    tok = load(name, tmp_path)
    for text in TEXTS:
        # SentencePiece writes a space as ▁, and cannot tell the two apart
        assert tok.decode(tok.encode(text)) == (text.replace("▁", " ") if "llama" in name else text)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_libraries_say_the_same_today(name):
    library = LIBRARIES[name.split("-")[0]]
    pytest.importorskip(library, reason=f"{library} is what is compared with")
    assert make_vectors.answers(name, TEXTS) == KEPT["answers"][name]
