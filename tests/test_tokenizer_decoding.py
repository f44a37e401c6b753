"""decode(encode(s)) = s, and a stream of ids gives the same text as all of them at once, with nothing printed too early."""

import random

import pytest
from tokenizer_texts import texts

from pocketlm import tokenizer
from pocketlm.errors import UsageError

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPM = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *BYTES, "▁", "a", "▁a", "<|user|>", "é"],
    "tokenizer.ggml.scores": [0.0] * 259 + [-1.0, -2.0, -0.5, 0.0, -3.0],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1, 1, 1, 4, 1],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}

OWN = ["gguf-gpt-2", "gguf-starcoder", "gguf-default", "gguf-llama"]


@pytest.fixture(scope="module")
def gpt2(vocabulary_file):
    return tokenizer.load(vocabulary_file("gguf-gpt-2"))


@pytest.fixture(scope="module")
def spm():
    return tokenizer.from_metadata(SPM, "spm.gguf")


@pytest.mark.parametrize("name", [*OWN, "ggml-vocab-gpt-2", "ggml-vocab-starcoder", "ggml-vocab-llama-spm", "ggml-vocab-phi-3"])
def test_decoding_gives_the_text_back_whole_and_streamed(name, vocabulary_file):
    tok = tokenizer.load(vocabulary_file(name))
    # StarCoder's and SmolLM2's vocabularies lack some bytes; ▁ is how SentencePiece writes a space
    held = {byte for i in range(tok.n_vocab) for byte in tok.token_bytes(i)}
    for text in texts(1500, 80):
        if not held.issuperset(text.encode()) or (tok.token_id("▁") is not None and "▁" in text):
            continue
        ids = tok.encode(text)
        assert tok.decode(ids) == text
        stream = tok.stream_decoder()
        parts = [stream.push(i) for i in ids]
        assert "".join(parts) + stream.flush() == text
        assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


def test_markers_come_back_where_they_are_asked_for(gpt2, spm):
    text = "a<|endoftext|>b"
    ids = gpt2.encode(text, special=True)
    assert gpt2.token_id("<|endoftext|>") in ids
    assert gpt2.decode(ids) == "ab"
    assert gpt2.decode(ids, special=True) == text
    for text in ("<s>a a</s>", "<s> a<|user|>a", "a<|user|> a</s>a", "<|user|>"):
        assert spm.decode(spm.encode(text, special=True), special=True) == text


def test_any_bytes_are_decoded_as_python_does_and_as_a_stream(gpt2):
    chance = random.Random(81)
    pieces = [b"\xf0\x9f\x98\x80", b"\xe4\xb8\xad", b"\xc3\xa9", b"a", b"\x80", b"\xff", b"\xf0\x9f", b"\xed\xa0\x80", b"\xc0"]
    id_of = {gpt2.token_bytes(i): i for i in range(gpt2.n_vocab)}
    for _ in range(1000):
        data = b"".join(chance.choices(pieces, k=chance.randrange(8)))
        ids = [id_of[bytes([byte])] for byte in data]
        stream = gpt2.stream_decoder()
        streamed = "".join(stream.push(i) for i in ids) + stream.flush()
        assert gpt2.decode(ids) == streamed == data.decode(errors="replace")


def test_a_stream_prints_a_character_with_its_last_byte_only(gpt2):
    stream = gpt2.stream_decoder()
    id_of = {gpt2.token_bytes(i): i for i in range(gpt2.n_vocab)}
    assert [stream.push(id_of[bytes([byte])]) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert stream.push(id_of[b"\xf0"]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(id_of[b"a"]) == "a", "a stream starts anew after its end"


def test_the_space_that_encoding_put_in_front_is_left_out_at_the_start_only(spm):
    ids = spm.encode("a a")
    assert spm.decode(ids) == "a a"
    stream = spm.stream_decoder(continues=True)
    assert "".join(map(stream.push, ids)) == " a a"
    assert spm.decode([1, *ids]) == "a a", "silent tokens do not end the start of a text"


def test_the_bytes_of_a_token_are_those_it_adds_to_a_text(gpt2, spm):
    assert gpt2.token_bytes(gpt2.encode(" the")[0]) == b" the"
    assert spm.token_bytes(3 + 0xC3) == b"\xc3"
    assert spm.token_bytes(1) == b"<s>"


@pytest.mark.parametrize("bad", [-1, 602, 1 << 70, 1.5, "a", None])
def test_an_id_outside_the_vocabulary_is_named_with_the_range(gpt2, bad):
    for call in (lambda: gpt2.decode([1, bad]), lambda: gpt2.token_bytes(bad), lambda: gpt2.is_control(bad)):
        with pytest.raises(UsageError, match=f"{bad} is not in the vocabulary: ids go from 0 to 601"):
            call()


@pytest.mark.parametrize("special", [False, True])
def test_a_lone_surrogate_is_named_with_its_position(gpt2, spm, special):
    for tok in (gpt2, spm):
        with pytest.raises(UsageError, match=r"U\+D83D, at position 2"):
            tok.encode("ab\ud83d", special=special)


def test_only_a_text_is_encoded(gpt2):
    with pytest.raises(UsageError, match="takes a text, not bytes"):
        gpt2.encode(b"ab")


def test_the_list_of_ids_is_the_callers_own(gpt2, spm):
    for tok in (gpt2, spm):
        first = tok.encode("a")
        expected = list(first)
        first.append(7)
        assert tok.encode("a") == expected


@pytest.mark.parametrize("name", [*OWN, "ggml-vocab-gpt-2", "ggml-vocab-starcoder", "ggml-vocab-llama-spm", "ggml-vocab-phi-3"])
def test_the_bytes_of_all_tokens_are_those_of_each(name, vocabulary_file):
    tok = tokenizer.load(vocabulary_file(name))
    assert tok.all_bytes() == [tok.token_bytes(i) for i in range(tok.n_vocab)]
    assert tok.special_ids() == [i for i in range(tok.n_vocab) if tok.vocabulary.types[i] != 1]


@pytest.mark.parametrize("odd", ["a b", "日本", "", "a\0b", "\0", "é"])
def test_the_bytes_of_a_token_that_was_added_in_plain_text(odd):
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["Ġ a"],
        "tokenizer.ggml.tokens": ["a", "Ġ", odd, "Ġa", "Ā", "<|end|>"], "tokenizer.ggml.token_type": [1, 1, 1, 1, 1, 3],
    }  # fmt: skip
    for tok in (tokenizer.from_metadata(metadata, "bpe.gguf"), tokenizer.from_metadata({**SPM, "tokenizer.ggml.tokens": [
        *SPM["tokenizer.ggml.tokens"][:-1], odd]}, "spm.gguf")):  # fmt: skip
        assert tok.all_bytes() == [tok.token_bytes(i) for i in range(tok.n_vocab)]


def test_ids_that_only_fill_a_vocabulary_up_are_no_text(spm):
    tokens = [*SPM["tokenizer.ggml.tokens"], "[PAD264]", "[UNUSED265]", "[PAD]", "<unused>"]
    more = {"tokens": tokens, "scores": [0.0] * len(tokens), "token_type": [*SPM["tokenizer.ggml.token_type"], 5, 5, 5, 5]}
    tok = tokenizer.from_metadata({**SPM, **{f"tokenizer.ggml.{name}": value for name, value in more.items()}}, "filled.gguf")
    assert tok.decode([260, 264, 265, 260]) == "aa"  # as llama.cpp and transformers have it
    assert tok.decode([260, 266, 267]) == "a[PAD]<unused>"  # pieces that SentencePiece itself calls unused
    assert tok.all_bytes()[264:266] == [b"", b""]
