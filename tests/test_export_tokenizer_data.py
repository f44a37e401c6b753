"""The tokenizer of a checkpoint travels as keys of the model file and gives the same ids."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import peer_tokenizers as peers
import pytest
from tokenizer_texts import PROSE, train_sentencepiece

from pocketlm import tokenizer
from pocketlm.errors import FileError
from pocketlm.export.checkpoint import Checkpoint
from pocketlm.export.tokenizer_data import TEST_TEXTS, chat_template, find_tokenizer
from pocketlm.tokenizer import byte_bpe, sentencepiece, sentencepiece_bpe
from pocketlm.tokenizer.base import make_vocabulary
from pocketlm.tokenizer.byte_bpe import LETTERS
from pocketlm.tokenizer.merge import rank_table
from pocketlm.tokenizer.normalizer import Normalizer
from pocketlm.tokenizer.unigram import Unigram

CHARACTERS = sorted(set("\n !',-.?ABCabcdefghijklmnopqrstuvwxyzğışöüç"))
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"


def checkpoint(folder: Path, config: dict[str, Any] | None = None) -> Checkpoint:
    return Checkpoint(folder / "ckpt.pt", {}, config or {}, (folder / "ckpt.pt",))


def texts(seed: int, n: int, alphabet: str = "") -> list[str]:
    chosen = random.Random(seed)
    source = alphabet * 50 or PROSE
    return [source[start : start + chosen.randrange(1, 60)] for start in (chosen.randrange(len(source)) for _ in range(n))]


def check(keys: dict[str, Any], original: tokenizer.Tokenizer, samples: list[str]) -> None:
    written = tokenizer.from_metadata(keys, "written")
    for text in samples:
        assert written.encode(text) == original.encode(text), text
        assert written.decode(written.encode(text)) == original.decode(original.encode(text))


def meta_pkl(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stoi = {character: i for i, character in enumerate(CHARACTERS)}
    (folder / "meta.pkl").write_bytes(
        pickle.dumps({"vocab_size": len(stoi), "stoi": stoi, "itos": {i: c for c, i in stoi.items()}})
    )
    return folder / "meta.pkl"


@pytest.mark.parametrize(("special", "end"), [(["<|endoftext|>"], 0), (["<s>", "</s>"], 1), (["<s>"], None)])
def test_the_only_token_that_ends_texts_is_named(tmp_path: Path, special: list[str], end: int | None) -> None:
    """A tokenizer.json alone names none; llama.cpp would take some other token for it, such as ",", and stop there."""
    peers.byte_level([PROSE], 400, special=special).save(str(tmp_path / "tokenizer.json"))
    keys, _ = find_tokenizer(checkpoint(tmp_path), 400, None)
    assert keys.get("tokenizer.ggml.eos_token_id") == end


def test_characters_beside_the_checkpoint(tmp_path: Path) -> None:
    original = tokenizer.load(meta_pkl(tmp_path))
    keys, notes = find_tokenizer(checkpoint(tmp_path), len(CHARACTERS), None)
    assert notes == [f"its tokenizer is {tmp_path / 'meta.pkl'}"]
    assert len(keys["pocketlm.tokenizer.test_texts"]) == len(keys["pocketlm.tokenizer.test_ids"]) == 20
    assert keys["tokenizer.ggml.tokens"][CHARACTERS.index(" ")] == "Ġ"  # as llama.cpp wants a space
    check(keys, original, texts(1, 100, "".join(CHARACTERS)))


def test_characters_where_nanogpt_keeps_them(tmp_path: Path) -> None:
    meta_pkl(tmp_path / "data" / "shakespeare_char")
    keys, _ = find_tokenizer(checkpoint(tmp_path / "out", {"config": {"dataset": "shakespeare_char"}}), len(CHARACTERS), None)
    assert keys["pocketlm.tokenizer.kind"] == "characters"
    with pytest.raises(FileError, match="no tokenizer was found"):
        find_tokenizer(checkpoint(tmp_path / "out", {"config": {"dataset": "../data/shakespeare_char"}}), 60, None)


def test_characters_inside_the_checkpoint(tmp_path: Path) -> None:
    itos = {str(i): c for i, c in enumerate(CHARACTERS)}
    for config in ({"chars": CHARACTERS}, {"config": {"chars": "".join(CHARACTERS)}}, {"meta": {"itos": itos}}):
        keys, _ = find_tokenizer(checkpoint(tmp_path, config), len(CHARACTERS), None)
        assert tokenizer.from_metadata(keys, "x").encode("cab") == [CHARACTERS.index(c) for c in "cab"]


def test_byte_level_bpe_with_its_chat_template(tmp_path: Path) -> None:
    peer = peers.byte_level([PROSE] * 3, 600, special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    peer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": CHAT}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    keys, notes = find_tokenizer(checkpoint(tmp_path), 610, None)
    assert notes == [f"its tokenizer is {tmp_path / 'tokenizer.json'}"]
    assert keys["tokenizer.chat_template"] == CHAT
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.eot_token_id"]) == (2, 0)
    assert len(keys["tokenizer.ggml.tokens"]) == len(keys["tokenizer.ggml.token_type"]) == 610
    assert keys["tokenizer.ggml.merges"] == [
        " ".join(pair) for pair in json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    ]
    samples = [*texts(2, 200), *TEST_TEXTS]
    check(keys, tokenizer.load(tmp_path / "tokenizer.json"), samples)
    written = tokenizer.from_metadata(keys, "x")
    assert all(written.encode(text) == peer.encode(text).ids for text in samples)


def test_all_ends_of_a_turn_that_the_configuration_names_are_kept(tmp_path: Path) -> None:
    """gpt-oss has three, and the last of them is what a call of a tool ends with."""
    tokenizers = pytest.importorskip("tokenizers", reason="trains the tokenizer")
    names = [f"<|e{i}|>" for i in range(6)]
    peer = tokenizers.ByteLevelBPETokenizer()
    peer.train_from_iterator([PROSE], vocab_size=300, special_tokens=names, show_progress=False)
    peer.add_special_tokens(names)
    peer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|e2|>"}))
    for ends in ([2, 0], [2, 0, 1], [1, 0, 2, 5, 4]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        keys, _ = find_tokenizer(checkpoint(tmp_path), 310, None)
        assert tokenizer.from_metadata(keys, "x").end_ids == set(ends)


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_sentencepiece(rule: str, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="trains the tokenizer")
    (tmp_path / "text.txt").write_text(PROSE * 3, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe", vocab_size=700,
        byte_fallback=True,
        character_coverage=0.99, normalization_rule_name=rule, user_defined_symbols=["<|user|>"], minloglevel=2,
    )  # fmt: skip
    peer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    keys, notes = find_tokenizer(checkpoint(tmp_path), 704, None)
    assert notes == [f"its tokenizer is {tmp_path / 'tokenizer.model'}"]
    samples = [*texts(3, 200), *TEST_TEXTS, "a <|user|> b", "  x  "]
    check(keys, tokenizer.load(tmp_path / "tokenizer.model"), samples)
    written = tokenizer.from_metadata(keys, "x")
    assert all(written.encode(text) == peer.encode(text) for text in samples)


def test_tiktoken_ranks_of_gpt2_get_their_end_token_and_nanogpts_spare_rows(test_data: Path, tmp_path: Path) -> None:
    gpt2 = tokenizer.load(test_data / "vectors" / "ggml-vocab-gpt-2.gguf")
    letters = {letter: bytes([byte]) for byte, letter in enumerate(LETTERS)}
    ranks = peers.rank_lines(b"".join(letters[c] for c in token) for token in list(gpt2.vocabulary.tokens)[:50256])
    (tmp_path / "gpt2.tiktoken").write_bytes(ranks)
    keys, notes = find_tokenizer(checkpoint(tmp_path), 50304, None)
    assert notes == [f"its tokenizer is {tmp_path / 'gpt2.tiktoken'}"]
    written = tokenizer.from_metadata(keys, "x")
    assert written.token_id("<|endoftext|>") == written.eos_id == 50256
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    peer = peers.encoding(ranks, pattern, {"<|endoftext|>": 50256})
    assert all(written.encode(text) == peer.encode(text) for text in [*texts(4, 200), *TEST_TEXTS])


@pytest.mark.parametrize(
    "name", ["gguf-default", "gguf-llama", "gguf-phi-3", "ggml-vocab-gpt-2", "ggml-vocab-llama-spm", "ggml-vocab-starcoder"]
)
def test_a_gguf_vocabulary_written_again_is_the_same(name: str, vocabulary_file: Callable[[str], Path]) -> None:
    original = tokenizer.load(vocabulary_file(name))
    check(tokenizer.to_metadata(original, original.n_vocab), original, [*texts(5, 100), *TEST_TEXTS])


ODD = {
    byte_bpe.Options: {
        "pre_tokenizer": ["gpt-2", "qwen2", "default"],
        **{name: [False, True] for name in ("whole_words_first", "space_prefix", "unknown", "fuse_unknown")},
    },
    sentencepiece.Options: {
        "prefix": ["always", "missing", "never"], "unknown_text": ["", " ⁇ ", "?"],
        **{name: [False, True] for name in ("prefix_first_only", "collapse_spaces", "symbols_in_text", "split_spaces",
                                            "byte_fallback", "fuse_unknown")},
    },
}  # fmt: skip


REPLACED = [(), (("lo", "ll"), ("o", "e"), ("\n", ""))]


def odd_tokenizer(options: Any, chance: random.Random) -> tokenizer.Tokenizer:
    """A small vocabulary with holes in what it covers, markers that swallow white space, symbols, merges of odd order."""
    letters = "abehlot" if isinstance(options, sentencepiece.Options) else "abehlotĠĊ"
    space = "▁" if isinstance(options, sentencepiece.Options) else "Ġ"
    pieces = [*letters, space, "he", "ll", "hell", "lo", "ello", "el", f"{space}h", "to", "ot", "é"]
    special = {"<unk>": 2, "<s>": 3, "<|end|>": 3, "<sep>": 4}
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)] if getattr(options, "byte_fallback", False) else []
    pieces = list(dict.fromkeys(pieces))
    chance.shuffle(pieces)
    tokens = [*special, *pieces, *byte_tokens]
    types = bytes([*special.values(), *[1] * len(pieces), *[6] * len(byte_tokens)])
    vocabulary = make_vocabulary(
        "odd", tokens, types, bos_id=1, unk_id=0, strip_left=chance.choice([(), (2,)]), strip_right=chance.choice([(), (2, 3)]),
        normalizer=Normalizer(chance.choice([None, "NFD", "NFKC"]), chance.choice(REPLACED)),
    )
    pairs = [(p[:i], p[i:]) for p in pieces for i in range(1, len(p)) if p[:i] in pieces and p[i:] in pieces]
    merges = [f"{left} {right}" for left, right in chance.sample(pairs, len(pairs) - chance.choice((0, 0, 1, 2)))]
    if isinstance(options, byte_bpe.Options):
        table = rank_table("odd", tokens.__getitem__, vocabulary.index, merges, len(tokens))
        return byte_bpe.ByteBPE(vocabulary, table, options)
    kind = chance.randrange(3)
    if kind == 0:
        return Unigram("odd", vocabulary, [chance.uniform(-4, -1) for _ in tokens], options)
    if kind == 1:
        table = sentencepiece_bpe.merges_table("odd", vocabulary, merges)
    else:
        table = sentencepiece_bpe.score_table("odd", vocabulary, [chance.choice((-1.5, -2.0, -3.0)) for _ in tokens])
    return sentencepiece_bpe.SentencePieceBPE("odd", vocabulary, table, options)


@pytest.mark.parametrize("kind", ODD, ids=lambda kind: kind.__module__.rpartition(".")[2])
def test_every_option_that_changes_ids_comes_back(kind: type) -> None:
    chance = random.Random(7)
    samples = [*texts(8, 40), "hello  hello", " hello <|end|> \n to <sep>hot", "  ", "żéhello", "e\u0301①"]
    for _ in range(150):
        options = kind(**{name: chance.choice(values) for name, values in ODD[kind].items()})
        original = odd_tokenizer(options, chance)
        written = tokenizer.from_metadata(tokenizer.to_metadata(original, original.n_vocab + 2), "written")
        assert written.options == options
        assert written.vocabulary.normalizer == original.vocabulary.normalizer
        assert written.vocabulary.strip_left == original.vocabulary.strip_left
        assert written.vocabulary.strip_right == original.vocabulary.strip_right
        for text in samples:
            for special in (False, True):
                ids = original.encode(text, special=special)
                assert written.encode(text, special=special) == ids, (options, text)
                assert written.decode(ids) == original.decode(ids), (options, text)


def test_all_options_are_tried() -> None:
    for kind, values in ODD.items():
        assert {field.name for field in fields(kind)} - {"rules"} == values.keys()


def test_what_is_missing_or_does_not_fit_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"give its tokenizer's file with --tokenizer FILE, or --tokenizer none"):
        find_tokenizer(checkpoint(tmp_path), 1000, None)
    with pytest.raises(FileError, match=r"GPT-2's tokenizer.json, or its vocab.json with merges.txt"):
        find_tokenizer(checkpoint(tmp_path), 50304, None)
    assert find_tokenizer(checkpoint(tmp_path), 1000, "none")[0] == {}
    with pytest.raises(FileError, match=f"it has {len(CHARACTERS)} tokens, but the model's token table 20 rows"):
        find_tokenizer(checkpoint(tmp_path), 20, meta_pkl(tmp_path))
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(FileError):
        find_tokenizer(checkpoint(tmp_path), 20, None)


def test_a_tokenizer_far_smaller_than_the_token_table_is_pointed_out(tmp_path: Path) -> None:
    """It is most likely another model's; a table that was rounded up for speed is usual."""
    file, rounded = meta_pkl(tmp_path), -(-len(CHARACTERS) // 128) * 128
    _, notes = find_tokenizer(checkpoint(tmp_path), 512, file)
    assert notes == [f"meta.pkl has {len(CHARACTERS)} tokens for 512 rows of the token table: is it this model's tokenizer?"]
    assert find_tokenizer(checkpoint(tmp_path), rounded, file)[1] == []


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_markers_that_the_token_table_has_no_rows_for_are_left_out(kind: str, tmp_path: Path) -> None:
    """<pad> is often added to a tokenizer, and the table left as it was."""
    if kind == "sentencepiece":
        (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(PROSE.split("\n"), 700, byte_fallback=True))
        n = (alone := tokenizer.load(tmp_path)).n_vocab
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": n, "[MASK]": n + 1}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}))
    else:
        vocab, level = {letter: i for i, letter in enumerate(LETTERS)}, {"type": "ByteLevel", "add_prefix_space": False}
        file = {"pre_tokenizer": level, "model": {"type": "BPE", "vocab": vocab, "merges": []}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(file))
        n = (alone := tokenizer.load(tmp_path)).n_vocab
        added = [{"id": n + i, "content": name, "special": True, "lstrip": True} for i, name in enumerate(("<pad>", "[MASK]"))]
        (tmp_path / "tokenizer.json").write_text(json.dumps({**file, "added_tokens": added}))
    keys, notes = find_tokenizer(checkpoint(tmp_path), n, None)
    file = next(tmp_path.glob("tokenizer.[jm]*"))
    assert notes == [
        f"its tokenizer is {file}",
        f"its token table has no rows for '<pad>', '[MASK]', which {file.name} adds: left out",
    ]  # fmt: skip
    written = tokenizer.from_metadata(keys, "x")
    assert written.n_vocab == n
    for text in [*texts(9, 100), *TEST_TEXTS, "a <pad> b"]:
        assert written.encode(text) == alone.encode(text)
    with pytest.raises(FileError, match=f"it has {n + 2} tokens, but the model's token table {n - 1} rows"):
        find_tokenizer(checkpoint(tmp_path), n - 1, None)


def test_chat_templates_of_every_kind(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer_config.json"
    assert chat_template(tmp_path) is None
    file.write_text(
        json.dumps({"chat_template": [{"name": ["tool_use"], "template": "x"}, {"name": "default", "template": CHAT}]})
    )
    assert chat_template(tmp_path) == CHAT
    (tmp_path / "chat_template.jinja").write_text("other")
    assert chat_template(tmp_path) == "other"
