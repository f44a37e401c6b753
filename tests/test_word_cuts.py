"""Pre-tokenizers cut words as llama.cpp and `tokenizers` do, in whatever way their expressions are written."""

import contextlib
import unicodedata
from pathlib import Path

import pytest
from llama_reference import LlamaReference
from tokenizer_texts import texts

from pocketlm import tokenizer
from pocketlm.export.gguf_writer import copy_gguf
from pocketlm.runtime.gguf_reader import open_gguf
from pocketlm.tokenizer.pretokenize import OTHER_WRITINGS, PRE_TOKENIZERS

VECTORS = Path(__file__).parent / "vectors"

# ── llama.cpp ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [name for name in PRE_TOKENIZERS if name != "nanochat"])  # which llama.cpp does not know
def test_every_name_cuts_words_as_in_llama_cpp(name, tmp_path):
    """A small vocabulary under every name. Where words end before capitals, llama.cpp knows the capitals of ASCII only."""
    with open_gguf(VECTORS / "gguf-gpt-2.gguf") as file:
        keys = {**file.metadata, "tokenizer.ggml.pre": name}
    keys = {key: value for key, value in keys.items() if not key.startswith("pocketlm.")}
    with open(tmp_path / "vocabulary.gguf", "wb") as out:
        copy_gguf(out, keys, {})
    ours = tokenizer.load(tmp_path / "vocabulary.gguf")
    cased = name in ("tekken", "gpt-4o", "llama4", "kanana2", "minimax-m2")
    with contextlib.closing(LlamaReference(tmp_path / "vocabulary.gguf", vocab_only=True)) as theirs:
        for text in texts(400, 73):
            if not cased or all(letter.isascii() or not letter.isalpha() for letter in unicodedata.normalize("NFD", text)):
                assert ours.encode(text) == theirs.tokenize(text), text


@pytest.mark.parametrize("name", ["tekken", "gpt-4o", "qwen35", "ufakzeka", "bloom"])
def test_words_are_cut_as_the_tokenizers_library_cuts_them(name):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is what is compared with")
    from pocketlm.tokenizer.pretokenize import splitter

    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PRE_TOKENIZERS[name][0]), "isolated")
    for text in texts(3000, 74):
        assert splitter(name)(text) == [word for word, _ in split.pre_tokenize_str(text)], text


# ── the table itself ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["smollm", "starcoder", "refact"])
def test_digits_first_in_one_expression_cuts_as_one_expression_after_the_other(name):
    import regex

    from pocketlm.tokenizer.pretokenize import splitter

    def isolate(pattern, words):
        return [part for word in words for part in regex.split(f"({pattern})", word) if part]

    for text in texts(3000, 70):
        assert splitter(name)(text) == isolate(PRE_TOKENIZERS["gpt-2"][0], isolate(r"\p{N}", [text])), text


@pytest.mark.parametrize("writing", OTHER_WRITINGS)
def test_another_way_to_write_an_expression_cuts_the_same_words(writing):
    import regex

    for text in texts(3000, 72):
        assert regex.findall(writing, text) == regex.findall(PRE_TOKENIZERS[OTHER_WRITINGS[writing]][0], text), text


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_no_pre_tokenizer_loses_a_character(name):
    from pocketlm.tokenizer.pretokenize import splitter

    for text in texts(2000, 71):
        assert "".join(splitter(name)(text)) == text
