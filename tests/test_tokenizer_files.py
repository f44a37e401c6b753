"""Tokenizer files of every kind from anybody: read, or refused in one line; never run, never a crash, never much memory."""

import base64
import contextlib
import json
import os
import pickle
import random
import tracemalloc

import pytest
from tokenizer_texts import PROSE

from pocketlm import tokenizer
from pocketlm.errors import FileError, UsageError
from pocketlm.tokenizer.byte_bpe import LETTERS
from pocketlm.tokenizer.pretokenize import PRE_TOKENIZERS

CHARACTERS = sorted({*PROSE})
STOI = {character: i for i, character in enumerate(CHARACTERS)}
META = {"vocab_size": len(STOI), "itos": {i: c for c, i in STOI.items()}, "stoi": STOI}


def load(tmp_path, data, name="file", **options):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return tokenizer.load(path, **options)


def refused(tmp_path, data, *words, name="file"):
    with pytest.raises(FileError) as error:
        load(tmp_path, data, name)
    line = str(error.value)
    assert line.startswith(str(tmp_path))
    assert "\n" not in line
    assert len(line) < 500
    for word in words:
        assert word in line, line


# ── characters ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_meta_pkl_of_nano_gpt_is_read(protocol, tmp_path):
    tok = load(tmp_path, pickle.dumps(META, protocol))
    for line in PROSE.split("\n"):
        assert tok.encode(line) == [STOI[character] for character in line]
        assert tok.decode(tok.encode(line)) == line
    assert tok.n_vocab == len(STOI)


@pytest.mark.parametrize("value", [STOI, CHARACTERS, {"stoi": STOI}, {"itos": META["itos"]}, {"chars": CHARACTERS}])
def test_characters_in_json_are_read(value, tmp_path):
    tok = load(tmp_path, value)
    assert tok.encode("Lily") == [STOI[character] for character in "Lily"]
    assert tok.decode(tok.encode("Lily")) == "Lily"


def test_a_character_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"'€' \(U\+20AC\)"):
        load(tmp_path, STOI).encode("5 €")
    assert load(tmp_path, {"<unk>": 0, "a": 1}).encode("a€€") == [1, 0, 0]


def test_tokens_longer_than_a_character_are_markers(tmp_path):
    tok = load(tmp_path, {"<s>": 0, "</s>": 1, "<": 2, "s": 3, ">": 4, "/": 5})
    assert (tok.bos_id, tok.eos_id, tok.end_ids) == (0, 1, {1})
    assert tok.encode("<s>") == [2, 3, 4]
    assert tok.encode("<s>", special=True) == [0]


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("call", [(eval, ("1/0",)), (open, ("EVIL", "w")), (print, ("evil",)), (list, ())])
def test_a_pickle_is_not_run(call, protocol, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in (Evil(*call), {**META, "more": Evil(*call)}, {"stoi": Evil(*call)}):
        refused(tmp_path, pickle.dumps(value, protocol), "its pickle wants to call")
    assert not (tmp_path / "EVIL").exists()
    assert capsys.readouterr().out == ""


def test_every_instruction_that_could_do_more_is_refused(tmp_path):
    """Hand-made pickles, for what `pickle.dumps` does not write."""
    for instructions in (
        b"cos\nsystem\n.", b"(S'x'\nios\nsystem\n.", b"\x8c\x02os\x8c\x06system\x93.", b"\x82\x01.", b"Pid\n.", b"\x88Q.",
        b"}(X\x01\x00\x00\x00ao.", b"N}b.", b"]\x81.", b"\x97.", b"G" + bytes(8) + b".",
    ):  # fmt: skip
        refused(tmp_path, b"\x80\x04" + instructions)


# ── what does not fit ────────────────────────────────────────────────────────────────────────────────────────────────

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BPE_JSON = {
    "added_tokens": [{"id": 258, "content": "<|end|>", "special": True}],
    "normalizer": None,
    "pre_tokenizer": BYTE_LEVEL,
    "model": {"type": "BPE", "vocab": {letter: i for i, letter in enumerate([*LETTERS, "he", "ll"])}, "merges": ["h e", "l l"]},
}


def changed(path, value):
    """The file with one part replaced; `path` is where it is."""
    file = json.loads(json.dumps(BPE_JSON))
    *parents, last = path.split(".")
    part = file
    for name in parents:
        part = part[name]
    part[last] = value
    return file


BETWEEN_DROPPED = {
    "type": "Split", "pattern": {"Regex": PRE_TOKENIZERS["bloom"][0]}, "behavior": "Removed", "invert": True,
}  # fmt: skip
LATER = {**BYTE_LEVEL, "use_regex": False}
CATASTROPHE = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model.type", "WordPiece", ["'WordPiece'"]),
        ("model.dropout", 0.1, ["dropout"]),
        ("model.end_of_word_suffix", "</w>", ["end_of_word_suffix"]),
        ("normalizer", {"type": "Lowercase"}, ["'Lowercase'"]),
        ("pre_tokenizer", {"type": "Whitespace"}, ["Whitespace"]),
        ("pre_tokenizer", None, ["pre-tokenizer null"]),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [CATASTROPHE, BYTE_LEVEL]}, ["Split + ByteLevel"]),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [BETWEEN_DROPPED, LATER]}, ["behaviour 'Removed'"]),
        ("post_processor", {"type": "Other"}, ["post-processor Other"]),
        ("post_processor", {"type": "BertProcessing", "cls": ["<s>", 259]}, ["259 is not in the vocabulary"]),
        ("model", {**BPE_JSON["model"], "byte_fallback": True, "vocab": {"h": 0, "e": 1, "he": 2, "<0x00>": 3}, "merges": []},
         ["byte fallback"]),
        ("model.merges", ["h x"], ["merge 0"]),
        ("model.merges", [["h", "e", "l"]], ["merge 0"]),
        ("model.merges", [["h", 3]], ["tokenizer.json"]),
        ("model.merges", None, ["tokenizer.json"]),
        ("model.vocab", ["a"], ["tokenizer.json"]),
        ("model.vocab", {}, ["tokenizer.json", ]),
        ("model.vocab", {"a": 0, "b": 0}, ["id 0 stands for 'a' and for 'b'"]),
        ("model.vocab", {"a": -1}, ["'a' the id -1"]),
        ("model.vocab", {"a": 10**30}, ["'a' the id 1000"]),
        ("model.vocab", {"a": 1.5}, ["'a' the id 1.5"]),
        ("model.vocab", {"a": True}, ["'a' the id True"]),
        ("added_tokens", [{"id": 3, "content": "<|end|>"}], ["id 3 stands for"]),
        ("added_tokens", [{"id": 300, "content": "he"}], ["'he' has two ids"]),
        ("added_tokens", [{"id": 300, "content": "one", "single_word": True}], ["'one'"]),
        ("added_tokens", [{"content": "<|end|>"}], ["tokenizer.json"]),
        ("added_tokens", "none", ["tokenizer.json"]),
    ],
)  # fmt: skip
def test_a_tokenizer_json_that_does_not_fit_is_refused_by_name(path, value, words, tmp_path):
    load(tmp_path, BPE_JSON)
    refused(tmp_path, changed(path, value), *(word for word in words if word != "tokenizer.json"))


def test_a_pattern_from_a_file_is_never_compiled(tmp_path):
    parts = [CATASTROPHE, {**BYTE_LEVEL, "use_regex": False}]
    refused(tmp_path, changed("pre_tokenizer", {"type": "Sequence", "pretokenizers": parts}), "(a+)+$", "not supported")


RANKS = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))


def test_ranks_may_come_without_pattern_and_markers(tmp_path):
    tok = load(tmp_path, RANKS + base64.b64encode(b"he") + b" 256\n")
    assert tok.encode("he he") == [256, 32, 256]
    assert tok.n_vocab == 257
    with pytest.raises(UsageError, match=r"pattern '\(a\+\)\+\$' is not known"):
        load(tmp_path, RANKS, pattern="(a+)+$")
    with pytest.raises(UsageError, match="'cl100k' is not known"):
        load(tmp_path, RANKS, "cl100k_base.tiktoken")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["is empty"]),
        (b"hello world", ["no tokenizer pocketlm knows"]),
        (bytes(100), ["no tokenizer pocketlm knows"]),
        (RANKS + b"!!! 300\n", ["line 257"]),
        (RANKS + b"aGU= 99999999999999999999\n", ["line 257"]),
        (RANKS + b"aGU= -1\n", ["line 257"]),
        (RANKS + b"aGU=\n", ["line 257"]),
        (RANKS + b"aGU= 3\n", ["id 3 stands for"]),
        (RANKS + b"YQ== 256\n", ["line 257", "another rank"]),
        (RANKS[:300], ["no token for the byte"]),
        (RANKS + b"aGU= 999999999\n", ["the id 999999999"]),
        (b"{", ["not valid JSON"]),
        (b"{}", ["vocabulary is empty"]),
        (b"[" * 100_000, ["JSON"]),
        (b'{"a": 1e999}', ["'a' the id inf"]),
        (b'{"a": ' + b"9" * 5000 + b"}", []),
        (b'["a", "a"]', ["different characters"]),
        (b'{"pieces": "abc"}', ["pieces"]),
        (b'{"pieces": ["a"], "scores": [0], "types": [7]}', ["not 1 to 6"]),
        (b'{"itos": {"x": "a"}}', ["the id x"]),
        (b'{"\\ud800": 0}', ["token 0 is not valid Unicode"]),
        (b"\x80\x04.", ["its pickle is damaged"]),
        (b"\x80\x04}", ["its pickle is damaged"]),
        (b"\x80\x04]\x94(h\x00e.", []),
        (b"\x80\x04B\xff\xff\xff\xff", ["its pickle is damaged"]),
        (b"\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", ["SentencePiece"]),
        (b"\n\x05\n\x01a", ["SentencePiece"]),
        (b"\n\x03\n\x01a", ["without one unknown piece"]),
        (b"\n\x03\n\x01a\x12\x02\x18\x02", ["unknown piece"]),
        (b"\n\x05\n\x01\xff\x18\x02\x12\x02\x18\x02", ["SentencePiece"]),
    ],
)
def test_a_file_that_is_no_tokenizer_or_a_broken_one_is_refused(data, words, tmp_path):
    refused(tmp_path, data, *words)


LISTS = {  # {"stoi": {"a": lists}}, in a few hundred bytes
    "of itself twice, forty deep": b"]q\0" + b"".join(b"0](h%ch%ceq%c" % (k, k, k + 1) for k in range(40)),
    "ten thousand deep": b"]" * 10_000 + b"a" * 9_999,
}


@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
def test_an_id_that_is_a_tangle_of_lists_is_not_written_out(lists, tmp_path):
    refused(tmp_path, b"\x80\2}X\4\0\0\0stoi}X\1\0\0\0a" + lists + b"ss.", "the id list")


def test_a_missing_file_and_a_folder_without_one_are_named(tmp_path):
    with pytest.raises(FileError, match="no such file"):
        tokenizer.load(tmp_path / "missing")
    with pytest.raises(FileError, match="holds no tokenizer"):
        tokenizer.load(tmp_path)
    if os.path.exists("/dev/zero"):
        with pytest.raises(FileError, match="is not a file"):
            tokenizer.load("/dev/zero")


def test_the_vocabulary_of_an_fp16_bin_is_read(tmp_path):
    plain = {"pieces": ["<unk>", "<s>", "</s>", "▁", "a", "▁a"], "scores": [0, 0, 0, -2, -3, -1], "types": [2, 3, 3, 1, 1, 1]}
    tok = load(tmp_path, plain, "vocab.json")
    assert tok.encode("a a") == [5, 5]
    assert (tok.bos_id, tok.eos_id, tok.unk_id) == (1, 2, 0)
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["h e"]}
    tok = load(tmp_path, {"pieces": [*LETTERS, "he"], "types": [1] * 257, "metadata": keys}, "vocab.json")
    assert tok.encode("he") == [256]


def test_a_vocabulary_may_have_the_names_of_other_files_keys_as_words(tmp_path):
    """GPT-2's own has "pieces", "model", "types", …; and so it was taken for the vocabulary of an fp16 bin."""
    words = ["pieces", "model", "vocab", "types"]
    made, merges = dict.fromkeys(LETTERS), []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in made:
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
                made[word[:end]] = None
    ids = {token: i for i, token in enumerate(made)}
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    tok = load(tmp_path, ids, "vocab.json")
    assert [tok.encode(word) for word in words] == [[ids[word]] for word in words]
    (tmp_path / "merges.txt").rename(tmp_path / "vocab.bpe")
    assert load(tmp_path, ids, "encoder.json").encode("pieces") == [ids["pieces"]]


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def sentencepiece_file(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="trains the model that is damaged")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.split("\n")), model_prefix=str(tmp_path / "m"), model_type="bpe", vocab_size=400,
        hard_vocab_limit=False, minloglevel=2, normalization_rule_name="nfkc",
    )  # fmt: skip
    return (tmp_path / "m.model").read_bytes()


FILES = {
    "tokenizer.json": lambda folder: json.dumps(BPE_JSON).encode(),
    "ranks": lambda folder: RANKS,
    "meta.pkl": lambda folder: pickle.dumps(META),
    "characters": lambda folder: json.dumps(META["stoi"]).encode(),
    "sentencepiece": sentencepiece_file,
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_raise_nothing_else_and_take_no_memory(name, tmp_path):
    whole = FILES[name](tmp_path)
    load(tmp_path, whole)
    chance = random.Random(90)
    tracemalloc.start()
    for trial in range(300 if len(whole) < 10_000 else 50):
        data = bytearray(whole)
        if trial % 3 == 0:
            del data[chance.randrange(1, len(data)) :]
        for _ in range(chance.choice((1, 1, 3, 10))):
            at = chance.randrange(min(len(data), chance.choice((16, 400, len(data)))))
            data[at] = chance.choice((0, 0xFF, 0x7F, 0x80, *b'"[]{}:,0129-', chance.randrange(256)))
        with contextlib.suppress(FileError, UsageError):
            load(tmp_path, bytes(data)).encode("Once upon a time, e\u0301 ①")
    assert tracemalloc.get_traced_memory()[1] < 64 * len(whole) + (32 << 20)
    tracemalloc.stop()


def test_mistrals_own_file_says_which_one_to_give(tmp_path):
    path = tmp_path / "tekken.json"
    content = {"config": {"pattern": "[^x]+"}, "vocab": [{"rank": 0, "token_bytes": "AA==", "token_str": "a"}]}
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(FileError, match=r"tekken\.json.*tokenizer\.json that lies beside it"):
        tokenizer.load(path)
