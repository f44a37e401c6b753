"""GGUF keys as a tokenizer: kinds, defaults, our own keys, and one line for everything that does not fit."""

import numpy as np
import pytest

from pocketlm import tokenizer
from pocketlm.errors import FileError
from pocketlm.tokenizer.byte_bpe import LETTERS
from pocketlm.tokenizer.pretokenize import PRE_TOKENIZERS

TOKENS = [*LETTERS, "he", "ll", "hell", "<|im_start|>", "<|im_end|>"]
BPE = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": np.array([1] * 259 + [3, 3], dtype=np.int32),
    "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
    "tokenizer.ggml.eos_token_id": 260,
}
SPM = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "<sep>"],
    "tokenizer.ggml.scores": np.array([0, 0, 0, -1, -2, -3, -0.5, 0], dtype=np.float32),
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 4],
    "tokenizer.ggml.bos_token_id": 1,
}


def make(keys, **changes):
    changed = {**keys, **{name.replace("__", "."): value for name, value in changes.items()}}
    return tokenizer.from_metadata({key: value for key, value in changed.items() if value is not None}, "model.gguf")


def refused(keys, *words, **changes):
    with pytest.raises(FileError) as error:
        make(keys, **changes)
    line = str(error.value)
    assert line.startswith("model.gguf: ")
    assert "\n" not in line
    assert len(line) < 1000
    for word in words:
        assert word in line


def test_tokens_and_ids_that_no_vocabulary_has_are_refused():
    refused(BPE, "token 5 has 5000 characters", tokenizer__ggml__tokens=[*TOKENS[:5], "x" * 5000, *TOKENS[6:]])
    refused(BPE, "stripping token id 1099511627776", pocketlm__tokenizer__strip_left=np.array([2**40]))


def test_merges_go_by_rank_not_by_length():
    assert make(BPE).encode("hello") == [TOKENS.index("hell"), LETTERS.index("o")]
    assert make(BPE, tokenizer__ggml__merges=["h e", "l l"]).encode("hello")[:2] == [256, 257]


def test_markers_are_text_unless_asked_for():
    tok = make(BPE)
    assert tok.encode("<|im_end|>", special=True) == [260]
    assert len(tok.encode("<|im_end|>")) == 10
    assert tok.decode(tok.encode("<|im_end|>")) == "<|im_end|>"


def test_whether_bos_goes_in_front_follows_the_file_and_else_llama_cpp():
    assert make(SPM).adds_bos
    assert not make(BPE).adds_bos
    assert not make(SPM, tokenizer__ggml__add_bos_token=False).adds_bos
    assert make(BPE, tokenizer__ggml__pre="llama-bpe").adds_bos
    assert make(SPM).encode("a", bos=True) == [1, 6]
    assert make(SPM).encode("a") == [6]
    assert make(BPE).encode("a", bos=True) == make(BPE).encode("a"), "there is no bos"


def test_a_llama_file_that_says_no_ids_has_those_of_llama_cpp():
    silent = make(SPM, tokenizer__ggml__bos_token_id=None)
    assert (silent.bos_id, silent.eos_id, silent.encode("a", bos=True)) == (1, 2, [1, 6])
    texts = make(SPM, tokenizer__ggml__bos_token_id=None, tokenizer__ggml__token_type=[2, 1, 1, 1, 1, 1, 1, 4])
    assert (texts.bos_id, texts.eos_id) == (None, None), "ids of ordinary pieces are no markers"


def test_every_token_that_ends_a_turn_is_known():
    assert make(BPE, tokenizer__ggml__eot_token_id=3, tokenizer__ggml__eom_token_id=4).end_ids == {3, 4, 260}
    assert make(BPE, tokenizer__ggml__eos_token_id=None).end_ids == {260}, "by its name"
    plain = make(BPE, tokenizer__ggml__token_type=None)
    assert plain.is_control(260), "a file that forgot to say that it is a marker"


def test_the_space_in_front_and_what_is_unknown_follow_the_file():
    assert make(SPM).encode("a b") == [6, 3, 5]
    assert make(SPM, tokenizer__ggml__add_space_prefix=False).encode("a b") == [4, 3, 5]
    assert make(SPM).encode("axyzb") == [6, 0, 5], "a run of unknown characters is one unknown token"
    assert make(SPM, tokenizer__ggml__remove_extra_whitespaces=True).encode("  a  b ") == [6, 3, 5]


def test_user_defined_symbols_never_split():
    tok = make(SPM)
    assert tok.encode("a<sep>a") == [6, 7, 6]
    exact = make(SPM, pocketlm__tokenizer__kind="sentencepiece")
    assert exact.encode("a<sep>a") == [6, 7, 4], "the library puts no space after a symbol"


def test_our_own_keys_overrule():
    digits = make(BPE, tokenizer__ggml__tokens=[*TOKENS[:-2], "11", "<|im_end|>"], tokenizer__ggml__merges=["1 1"])
    assert digits.encode("11") == [259]
    keys = {**BPE, "tokenizer.ggml.tokens": [*TOKENS[:-2], "11", "<|im_end|>"], "tokenizer.ggml.merges": ["1 1"]}
    assert len(make(keys, pocketlm__tokenizer__pre_tokenizer="qwen2").encode("11")) == 2
    composed = make(BPE, pocketlm__tokenizer__normal_form="NFC")
    assert composed.encode("e\u0301") == composed.encode("é")
    letters = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["Ġ", "a", "Å¼"]}
    characters = make(letters, pocketlm__tokenizer__kind="characters")
    assert characters.encode("a ż") == [1, 0, 2]
    assert characters.decode([1, 0, 2]) == "a ż"


def test_texts_of_the_exporter_are_checked():
    ids = [f"258 {LETTERS.index('o')}", ""]
    texts = {"pocketlm__tokenizer__test_texts": ["hello", ""], "pocketlm__tokenizer__test_ids": ids}
    make(BPE, **texts)
    refused(BPE, "does not give the ids", "'hello'", **(texts | {"pocketlm__tokenizer__test_ids": ["1 2", ""]}))
    refused(BPE, "1 test texts", **(texts | {"pocketlm__tokenizer__test_texts": ["hello"]}))


def test_an_unknown_pre_tokenizer_is_named_with_the_known_ones():
    refused(BPE, "'gpt-5'", *PRE_TOKENIZERS, tokenizer__ggml__pre="gpt-5")


@pytest.mark.parametrize("model", ["bert", "rwkv", "plamo2", "none", "no-such-kind"])
def test_other_kinds_of_tokenizer_are_named(model):
    refused(SPM, repr(model), "gpt2, llama", tokenizer__ggml__model=model)


BAD = [
    (BPE, "says no kind", {"tokenizer__ggml__model": None}),
    (BPE, "tokenizer.ggml.model is not a text", {"tokenizer__ggml__model": 7}),
    (BPE, "pocketlm.tokenizer.kind is 'x'", {"pocketlm__tokenizer__kind": "x"}),
    (BPE, "of the kind 'xxx", {"tokenizer__ggml__model": "x" * 5000}),
    (BPE, "pocketlm.tokenizer.kind is 'xxx", {"pocketlm__tokenizer__kind": "x" * 5000}),
    (BPE, "no vocabulary", {"tokenizer__ggml__tokens": None}),
    (BPE, "tokens is not a list of texts", {"tokenizer__ggml__tokens": ["a", 7]}),
    (BPE, "vocabulary is empty", {"tokenizer__ggml__tokens": [], "tokenizer__ggml__token_type": []}),
    (BPE, "5 token types for 261 tokens", {"tokenizer__ggml__token_type": [1] * 5}),
    (BPE, "a type that is not 1 to 6", {"tokenizer__ggml__token_type": [1] * 260 + [9]}),
    (BPE, "token_type is not a list of numbers", {"tokenizer__ggml__token_type": "abc"}),
    (BPE, "token_type is not a list of numbers", {"tokenizer__ggml__token_type": [[1], [2, 3]]}),
    (BPE, "tokens 256 and 257 are both 'll'", {"tokenizer__ggml__tokens": [*LETTERS, "ll", "ll", "hell", "xx", "yy"]}),
    (BPE, "token 0 is not valid Unicode", {"tokenizer__ggml__tokens": ["\ud800", *TOKENS[1:]]}),
    (BPE, "no merges", {"tokenizer__ggml__merges": None}),
    (BPE, "merge 1 is not two pieces", {"tokenizer__ggml__merges": ["h e", "hell"]}),
    (BPE, "merge 0 is not two pieces", {"tokenizer__ggml__merges": ["h e l", "hell"]}),
    (BPE, "merge 0 gives 'hx', which is not in the vocabulary", {"tokenizer__ggml__merges": ["h x"]}),
    (BPE, "merge 1 is there twice", {"tokenizer__ggml__merges": ["h e", "h e"]}),
    (BPE, "bos token id 261 is not in the vocabulary of 261", {"tokenizer__ggml__bos_token_id": 261}),
    (BPE, "end token id -1", {"tokenizer__ggml__eos_token_id": -1}),
    (BPE, "eos_token_id is not a whole number", {"tokenizer__ggml__eos_token_id": "260"}),
    (BPE, "add_bos_token is not true or false", {"tokenizer__ggml__add_bos_token": 1}),
    (BPE, "normal form is 'NFX'; known are NFC", {"pocketlm__tokenizer__normal_form": "NFX"}),
    (BPE, "unknown is 'yes'; known are true, false", {"pocketlm__tokenizer__unknown": "yes"}),
    (BPE, "'qwen2'", {"pocketlm__tokenizer__pre_tokenizer": "qwen2", "pocketlm__tokenizer__split_pattern": [".+"]}),
    (
        BPE,
        "not written in byte-level letters",
        {
            "pocketlm__tokenizer__kind": "characters",
            "tokenizer__ggml__tokens": ["ż"] * 1,
            "tokenizer__ggml__token_type": None,
            "tokenizer__ggml__eos_token_id": None,
        },
    ),
    (SPM, "unknown_text is '7'; known are any text", {"pocketlm__tokenizer__unknown_text": 7}),
    (SPM, "prefix is 'sometimes'; known are always, missing, never", {"pocketlm__tokenizer__prefix": "sometimes"}),
    (SPM, "no scores", {"tokenizer__ggml__scores": None}),
    (SPM, "3 scores for 8 tokens", {"tokenizer__ggml__scores": [1.0, 2.0, 3.0]}),
    (SPM, "the score of token 2 is not a finite number", {"tokenizer__ggml__scores": [0, 0, float("nan"), 0, 0, 0, 0, 0]}),
    (SPM, "token 4 is a byte by its type", {"tokenizer__ggml__token_type": [2, 3, 3, 1, 6, 1, 1, 4]}),
    (SPM, "normalisation table is damaged", {"tokenizer__ggml__precompiled_charsmap": [1, 2, 3]}),
    (
        SPM,
        "damaged: a replacement of 1000 bytes",
        {"tokenizer__ggml__precompiled_charsmap": [*bytes([4] + [0] * 7), *b"x" * 1000]},
    ),
    (
        BPE,
        "tokens that begin with 'a' have too many lengths",
        {"tokenizer__ggml__tokens": [*LETTERS, *("a" * n for n in range(2, 400))], "tokenizer__ggml__token_type": None},
    ),
    (
        BPE,
        "its test texts have 100000 characters; 16384 are possible",
        {"pocketlm__tokenizer__test_texts": ["a" * 100_000], "pocketlm__tokenizer__test_ids": [""]},
    ),
]


@pytest.mark.parametrize(("keys", "problem", "changes"), BAD)
def test_keys_that_do_not_fit_are_refused_in_one_line(keys, problem, changes):
    refused(keys, problem, **changes)


def test_replacements_that_all_begin_alike_are_not_tried_one_by_one():
    sides = [side for n in range(4096) for side in ("a" * 60 + chr(0x4E00 + n), "b")]
    tok = make(BPE, pocketlm__tokenizer__replacements=sides)
    text = "a" * 60_000 + "\u4e00"  # minutes, where each of them is compared at every place
    assert tok.decode(tok.encode(text)) == "a" * 59_940 + "b"


def test_a_file_with_a_vocabulary_only_is_enough(tmp_path):
    gguf = pytest.importorskip("gguf", reason="writes the file")
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(SPM["tokenizer.ggml.tokens"])
    writer.add_token_scores(SPM["tokenizer.ggml.scores"].tolist())
    writer.add_token_types(SPM["tokenizer.ggml.token_type"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert tokenizer.load(tmp_path / "vocabulary.gguf").encode("a b") == [6, 3, 5]
