"""The vocabularies of llama.cpp's own tests give the ids that those tests expect, and llama.cpp's own ids on more.

Those ids are without bos, and from `parse_special = false`; the texts hold no markers, so that reading the markers
changes nothing, which is shown here, too.
"""

import peer_tokenizers as peers
import pytest
from tokenizer_texts import texts

from pocketlm import tokenizer

VOCABULARIES = ("gpt-2", "starcoder", "llama-spm", "phi-3")


@pytest.fixture(params=VOCABULARIES)
def vocabulary(request, test_data):
    return test_data / "vectors" / f"ggml-vocab-{request.param}.gguf"


@pytest.mark.parametrize("special", [False, True])
def test_every_line_gives_the_ids_llama_cpp_expects(vocabulary, special):
    tok = tokenizer.load(vocabulary)
    lines = vocabulary.with_name(vocabulary.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")[:-1]
    expected = vocabulary.with_name(vocabulary.name + ".out").read_text().splitlines()
    assert len(lines) == len(expected) > 40
    for text, ids in zip(lines, expected, strict=True):
        assert tok.encode(text, special=special) == [int(i) for i in ids.split()], text
        assert tok.decode(tok.encode(text)) == text


def test_random_texts_with_markers_give_the_ids_of_llama_cpp(vocabulary):
    tok, theirs = tokenizer.load(vocabulary), peers.asked_of_llama_cpp(vocabulary)
    markers = ["<|endoftext|>", "<fim_prefix>", "<s>", "</s>", "<|user|>", "<|end|>\n", "<|assistant|> \n", "<0x41>"]
    # C strings end at a NUL; llama.cpp strips ASCII white space after markers, Phi-3's own tokenizer all of it
    some = [text for text in texts(1000, 21, markers) if not any(c in text for c in "\0\x85\xa0\u2003\u3000")]
    for special in (False, True):
        for text, ids in zip(some, theirs.encode(some, special), strict=True):
            assert tok.encode(text, special=special) == ids, text


def test_a_marker_of_phi_3_swallows_the_white_space_after_it(test_data):
    tok = tokenizer.load(test_data / "vectors" / "ggml-vocab-phi-3.gguf")
    assert tok.encode("<|user|>\n Hi<|end|>\n", special=True) == [32010, *tok.encode("Hi"), 32007]


def test_the_ids_of_smollm2_are_those_of_tokenizers(smollm2_path):
    tok, theirs = tokenizer.load(smollm2_path), peers.asked_of_tokenizers(peers.smollm2(smollm2_path))
    some = texts(4000, 22, ["<|im_start|>", "<|im_end|>\n"])
    for text, ids in zip(some, theirs.encode(some, True), strict=True):
        assert tok.encode(text, special=True) == ids, text


def test_smollm2_knows_its_end_of_turn(smollm2_path):
    tok = tokenizer.load(smollm2_path)
    assert tok.end_ids == {0, 2}
    assert (tok.bos_id, tok.eos_id, tok.n_vocab, tok.adds_bos) == (1, 2, 49152, False)
    assert tok.is_control(2)
    assert not tok.is_control(20000)
    assert tok.token_id("<|im_end|>") == 2
    assert tok.token_id("no such token") is None
