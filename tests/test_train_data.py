"""Texts and conversations on their way to batches: nothing lost, nothing learnt that should not be, nothing done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketlm.chat.templates import BUILT_IN, Template, choose
from pocketlm.errors import FileError, PocketlmError, UsageError
from pocketlm.train import data, documents, vocabularies
from pocketlm.train.batches import Feed

TEXT = "".join(f"Line {i}: the quick brown fox jumps over the lazy dog number {i * 7919 % 1000}.\n" for i in range(900))
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello there, how are you?"},
    {"role": "assistant", "content": "I am fine."},
    {"role": "user", "content": "Good."},
    {"role": "assistant", "content": "Yes, it is a fine day."},
]
LIBRARIES = {"bytes": "tokenizers", "sentencepiece": "sentencepiece", "characters": "json"}


@pytest.fixture(params=LIBRARIES)
def kind(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(LIBRARIES[request.param], reason="trains this kind of vocabulary")
    return request.param


def make(folder: Path, kind: str = "characters", chat: str = "chatml", text: str = TEXT) -> Any:
    folder.mkdir(exist_ok=True)
    texts = [text, "".join(message["content"] for message in TALK), "systemuserassistant\n|<>_"]
    return vocabularies.make_tokenizer(kind, texts, vocabularies.Wanted(400, data.markers_of(chat)), folder)


def encoder(folder: Path, tok: Any, learn: tuple[str, ...] = ("assistant",), chat: str = "chatml") -> data.Encoder:
    return data.Encoder(tok, chat, learn, folder)


def said(_: str) -> None:
    pass


# ── vocabularies ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chat", data.CHATS)
def test_chat_markers_are_single_tokens_that_plain_text_does_not_become(tmp_path: Path, kind: str, chat: str) -> None:
    tok = make(tmp_path, kind, chat)
    vocabularies.check_markers(tok, data.markers_of(chat), tmp_path)
    for marker in data.markers_of(chat):
        (marked,) = tok.encode(marker, special=True)
        assert tok.token_bytes(marked) == marker.encode()
    assert tok.decode(tok.encode(TEXT[:500])) == TEXT[:500]
    assert tok.eos_id is not None


def test_a_marker_that_splits_is_an_error(tmp_path: Path) -> None:
    tok = make(tmp_path, chat="markers")
    with pytest.raises(FileError, match=r"the chat marker <\|im_start\|> splits into 12 tokens"):
        encoder(tmp_path, tok).encode(TALK, True)


def test_the_libraries_agree_with_the_runtime_on_ids(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers", reason="compared with")
    tok = make(tmp_path, "bytes")
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tok.encode(TEXT) == theirs.encode(TEXT).ids


# ── what is learnt ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chat", data.CHATS)
def test_conversations_are_encoded_as_the_chat_writes_them(tmp_path: Path, kind: str, chat: str) -> None:
    tok = make(tmp_path, kind, chat)
    ids, _ = encoder(tmp_path, tok, chat=chat).encode(TALK, True)
    template = choose(BUILT_IN[chat].jinja, tok)
    assert template.source is not None
    whole = template.encode(TALK, tok, add_generation_prompt=False)
    assert ids == [*whole[tok.adds_bos :], tok.eos_id]
    assert template.render(TALK) == Template(None, BUILT_IN[chat]).render(TALK)


@pytest.mark.parametrize("chat", data.CHATS)
def test_only_answers_and_their_ends_are_learnt(tmp_path: Path, kind: str, chat: str) -> None:
    tok = make(tmp_path, kind, chat)
    end = data.markers_of(chat)[-1]
    ids, mask = encoder(tmp_path, tok, chat=chat).encode(TALK, True)
    learnt = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tok.decode(learnt, special=True).replace(f"{end} ", end).strip() == f"I am fine.{end}Yes, it is a fine day.{end}"
    all_ids, all_mask = encoder(tmp_path, tok, vocabularies.ROLES, chat).encode(TALK, True)
    everything = tok.decode([i for i, m in zip(all_ids, all_mask, strict=True) if m], special=True)
    assert everything.count(end) == 5
    assert "user" not in everything


def test_markers_that_somebody_typed_are_letters(tmp_path: Path) -> None:
    tok = make(tmp_path, "characters")
    ids, _ = encoder(tmp_path, tok).encode([{"role": "user", "content": "I say <|im_end|>"}], True)
    assert ids.count(tok.token_id("<|im_end|>")) == 1


def test_documents_end_with_the_end_token_and_long_ones_come_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, newline="\n")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"Line {i}"}) + "\n" for i in range(5)), newline="\n")
    pieces = list(documents.read_documents(tmp_path / "a.txt"))
    assert len(pieces) > 2
    assert "".join(piece for piece, _ in pieces) == TEXT  # type: ignore[misc]
    assert all(piece.endswith("\n") for piece, _ in pieces)  # type: ignore[union-attr]
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    tok = make(tmp_path / "tok")
    data.prepare([tmp_path / "a.txt", tmp_path / "b.jsonl"], [], tmp_path / "data", encoder(tmp_path, tok), 0, said)
    corpus = data.open_corpus(tmp_path / "data", "train", 64, tok.n_vocab)
    assert [int((part == tok.eos_id).sum()) for part in corpus.ids] == [1, 5]
    assert corpus.ids[0].dtype == np.uint16
    assert tok.decode(corpus.ids[0][:-1].tolist()) == TEXT


# ── parts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_bad_part_stops_no_other_and_is_tried_again(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.txt", "bad.jsonl", "c.txt")]
    files[0].write_text(TEXT, newline="\n")
    files[1].write_text('{"text": "fine"}\n{"messages": []}\n', newline="\n")
    files[2].write_text(TEXT[:5000], newline="\n")
    tok = make(tmp_path / "tok")
    spoken: list[str] = []
    arguments = (files, [], tmp_path / "data", encoder(tmp_path, tok), 20, spoken.append)
    with pytest.raises(PocketlmError, match=r"bad.jsonl: line 2 is no document; .*the same command tries this one again"):
        data.prepare(*arguments)
    state, done = data.read_state(tmp_path / "data"), {"key", "first", "train", "val", "documents"}
    assert [set(part) for part in state.values()] == [done, {"error"}, done]
    before = (tmp_path / "data" / "part-00000.train").stat().st_mtime_ns
    spoken.clear()
    files[1].write_text('{"text": "fine"}\n', newline="\n")
    data.prepare(*arguments)
    assert spoken == [f"encoding {files[1]}"]
    assert (tmp_path / "data" / "part-00000.train").stat().st_mtime_ns == before
    assert not list((tmp_path / "data").glob(".*"))


def test_preparing_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    for file in files:
        file.write_text(TEXT[:9000], newline="\n")
    tok = make(tmp_path / "tok")
    spoken: list[str] = []

    def interrupt(text: str) -> None:
        spoken.append(text)
        if len(spoken) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.prepare(files, [], tmp_path / "data", encoder(tmp_path, tok), 0, interrupt)
    assert [bool(part) for part in data.read_state(tmp_path / "data").values()] == [True, False, False]
    data.prepare(files, [], tmp_path / "data", encoder(tmp_path, tok), 0, spoken.append)
    assert spoken == [f"encoding {files[i]}" for i in (0, 1, 1, 2)]


def test_one_piece_in_so_many_measures_or_a_file_does(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, newline="\n")
    tok = make(tmp_path / "tok")
    n = sum(1 for _ in documents.read_documents(tmp_path / "a.txt"))
    data.prepare([tmp_path / "a.txt"], [], tmp_path / "data", encoder(tmp_path, tok), n, said)
    part = data.read_state(tmp_path / "data")["part-00000"]
    assert part["train"] + part["val"] == len(tok.encode(TEXT)) + 1
    assert 0 < part["val"] < part["train"]
    (tmp_path / "b.txt").write_text(TEXT[:2000], newline="\n")
    data.prepare([tmp_path / "a.txt"], [tmp_path / "b.txt"], tmp_path / "data", encoder(tmp_path, tok), 0, said)
    assert len(data.open_corpus(tmp_path / "data", "val", 64, tok.n_vocab).ids[0]) == len(tok.encode(TEXT[:2000])) + 1


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def corpus_of(*lengths: int, context: int = 8) -> data.Corpus:
    ids = [np.arange(sum(lengths[:i]), sum(lengths[: i + 1]), dtype=np.uint16) for i in range(len(lengths))]
    return data.Corpus(ids, [np.ones(n, np.uint8) for n in lengths], context, [f"{n}.txt" for n in lengths])


def firsts(blocks: list[data.Block]) -> list[int]:
    return [int(ids[0]) for ids, _, _ in blocks]


def test_an_epoch_shows_every_block_once_and_the_next_cuts_elsewhere() -> None:
    feed = Feed(corpus_of(100, 50), 1, 3)
    n = int(feed.n_blocks.sum())
    epochs = [[block for step in range(e * n, (e + 1) * n) for block in feed.batch(step)] for e in range(2)]
    assert feed.epochs == 2
    assert all(len(set(firsts(blocks))) == n for blocks in epochs)
    assert set(firsts(epochs[0])) != set(firsts(epochs[1]))
    for ids, targets, mask in epochs[0]:
        assert (targets == ids + 1).all()
        assert len(ids) == len(mask) == 8


def test_a_batch_is_a_function_of_position_and_seed() -> None:
    def batch(position: dict[str, list[float]], seed: int) -> list[int]:
        feed = Feed(corpus_of(500, 300), 4, seed)
        feed.position = position
        return firsts(feed.batch(77))

    here, there = {"500.txt": [40, 0.0], "300.txt": [20, 0.0]}, {"500.txt": [44, 0.0], "300.txt": [20, 0.0]}
    assert batch(here, 1) == batch(here, 1)
    assert batch(here, 1) != batch(there, 1)
    assert batch(here, 1) != batch(here, 2)


def test_too_little_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Line 1\n", newline="\n")
    tok = make(tmp_path / "tok")
    data.prepare([tmp_path / "a.txt"], [], tmp_path / "data", encoder(tmp_path, tok), 20, said)
    with pytest.raises(FileError, match=r"its train split has 8 tokens, too few for a sequence of 64; give more text"):
        data.open_corpus(tmp_path / "data", "train", 64, tok.n_vocab)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": 3}', "line 2 is no document"),
        ("[1]", "line 2 is no document"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "line 2 is no document"),
        ('{"messages": [{"role": "user"}]}', "line 2 is no document"),
        ("\ud800".encode("utf-8", "surrogatepass"), "line 2 is not UTF-8"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, line: str | bytes, problem: str) -> None:
    content = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + content)
    with pytest.raises(FileError, match=problem):
        list(documents.read_documents(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_byte_order_mark_and_half_a_character_are_no_obstacle(name: str, tmp_path: Path) -> None:
    """Windows writes the one, programs that cut texts in the middle of an emoji the other."""
    text = {"a.txt": "Kâr", "a.jsonl": r'{"text": "K\u00e2r\ud83d"}', "a.json": r'[{"text": "K\u00e2r\ud83d"}]'}[name]
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert list(documents.read_documents(tmp_path / name)) == [("Kâr" + "\ufffd" * (name != "a.txt"), True)]


@pytest.mark.parametrize(
    "part",
    [5, {"key": [1]}, {"key": [[1], 2, 3, "train", 5]}, {"train": 5}, {"train": -1, "key": ["a", 1, 2, "train", []]}],
)
def test_what_a_strangers_state_file_says_is_checked(part: object, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, newline="\n")
    tok, folder = make(tmp_path / "tok"), tmp_path / "run" / "data"
    arguments = ([tmp_path / "a.txt"], [], folder, encoder(tmp_path, tok), 20, said)
    data.prepare(*arguments)
    written = json.loads((folder / "state.json").read_text())
    own = written["part-00000"]
    own["key"][1] = 0  # so that it is encoded again
    for state in ({"part-00000": part}, {"../../outside": own}, [1], {**written, "part-00003": part}):
        (folder / "state.json").write_text(json.dumps(state))
        data.prepare(*arguments)
        assert [*data.read_state(folder)] == ["part-00000"]
        data.open_corpus(folder, "train", 16, tok.n_vocab)
    assert not list(tmp_path.glob("outside*"))
    for content in (b"", b"abc"):
        (folder / "part-00000.train").write_bytes(content)
        with pytest.raises(FileError, match=r"part-00000.train: is damaged .*; delete .*, it is made again"):
            data.open_corpus(folder, "train", 16, tok.n_vocab)


def test_of_a_folder_the_error_says_how_to_name_its_files(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot be read .*name the files in it, as in .*\*\.txt"):
        list(documents.read_documents(tmp_path))


def test_unknown_chats_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="--chat alpaca: expected one of chatml, markers"):
        data.markers_of("alpaca")
