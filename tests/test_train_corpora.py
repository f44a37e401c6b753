"""Corpora as people have them: nothing of them is lost, doubled in silence or joined, and no sentence begins in its middle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from languages import ENGLISH, RUSSIAN, TURKISH, long

torch = pytest.importorskip("torch", reason="the trainer is PyTorch")

from pocketlm import cli, load, tokenizer  # noqa: E402
from pocketlm.errors import FileError  # noqa: E402
from pocketlm.train import data, documents  # noqa: E402
from pocketlm.train.batches import Feed  # noqa: E402
from pocketlm.train.documents import Reading, read_documents  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")
SMALL = "--set n_layer=1 --set n_embd=32 --set n_head=2 --set n_kv_head=2 --set n_ff=32 --set n_ctx=32 --threads 1"
SHORT = "--steps 3 --batch 2 --micro-batch 2 --warmup 1 --eval-every 3"
POEMS = ["Мороз и солнце;\r\nдень чудесный!", "Ещё ты дремлешь, друг прелестный.", "Пора!", "x" * 9000 + "\n" + "y" * 200]


def train(*arguments: object, options: str = f"{SMALL} {SHORT} --tokenizer characters") -> int:
    return cli.main(["train", *map(str, arguments), *options.split()])


def parts(run: Path, split: str = "train") -> Any:
    tok = tokenizer.load(run)
    return tok, data.open_corpus(run / "data", split, 32, tok.n_vocab)


def answers(run: Path) -> str:
    """What the run's model, exported, writes."""
    assert cli.main(["export", str(run / "last.pt"), "-o", str(run / "model.gguf")]) == 0
    with load(run / "model.gguf", backend="numpy") as model:
        return "".join(piece.text for piece in model.generate("a", max_tokens=4, temperature=0))


@pytest.mark.parametrize(("kind", "between"), [("blank", "\n\n"), ("blank", "\n \t\n\n\n"), ("line", "\n"), ("line", "\r\n")])
@pytest.mark.parametrize("shortest", [0, 10])
def test_documents_of_a_text_are_those_between_separators(tmp_path: Path, kind: str, between: str, shortest: int) -> None:
    poems = [poem.replace("\r\n", " ").replace("\n", " ") for poem in POEMS] if kind == "line" else POEMS
    (tmp_path / "a.txt").write_bytes(between.join(poems).encode() + between.encode() * 3)
    found, text = [], ""
    for piece, ends in read_documents(tmp_path / "a.txt", Reading(kind, shortest)):
        text += str(piece)
        if ends:
            found.append(text)
            text = ""
    assert text == ""
    assert found == [poem for poem in poems if len(poem) >= shortest]


@pytest.mark.parametrize("kind", ["file", "blank", "line"])
def test_every_document_ends_with_the_end_token(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join([TURKISH.strip(), "İki satır.\nBurada."] * 60), encoding="utf-8")
    assert train(tmp_path / "a.txt", "-o", tmp_path / "run", "--documents", kind, "--val-every", 7) == 0
    tok, corpus = parts(tmp_path / "run")
    ids = np.concatenate([*corpus.ids, *parts(tmp_path / "run", "val")[1].ids])
    wanted = {"file": 1, "blank": 120, "line": 180}[kind]
    assert int((ids == tok.eos_id).sum()) == wanted
    assert answers(tmp_path / "run")


def test_a_text_without_line_ends_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("слово " * 300_000, encoding="utf-8")
    pieces = [piece for piece, _ in read_documents(tmp_path / "a.txt")]
    assert max(map(len, pieces)) <= documents.LONGEST_LINE
    assert "".join(map(str, pieces)) == "слово " * 300_000


@pytest.mark.parametrize("name", ["ids.npy", "rows.npy", "train.bin"])
def test_ids_made_elsewhere_are_learnt_as_they_are(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text(long(ENGLISH, 40_000))
    assert train(tmp_path / "a.txt", "-o", tmp_path / "text") == 0
    tok = tokenizer.load(tmp_path / "text")
    ids = np.array(tok.encode(long(ENGLISH, 40_000)), np.uint16)
    if name == "train.bin":
        ids.tofile(tmp_path / name)
    else:
        np.save(tmp_path / name, ids[: len(ids) // 8 * 8].reshape(-1, 8) if name == "rows.npy" else ids.astype(np.int64))
    given = ("--tokenizer", tmp_path / "text", "--val", tmp_path / "a.txt")
    assert train(tmp_path / name, "-o", tmp_path / "run", *given, options=f"{SMALL} {SHORT}") == 0
    (found,) = parts(tmp_path / "run")[1].ids
    assert np.array_equal(found, ids[: len(found)])
    assert len(ids) - len(found) < 8
    assert answers(tmp_path / "run") == answers(tmp_path / "run")


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.array([1.5, 2.5]), "holds numbers of type float64, which are no ids"),
        (np.array([1, 70000]), "holds the ids 1 to 70000, the vocabulary has 100"),
        (np.array([-1, 5]), "holds the ids -1 to 5"),
        (np.array([{}], object), "holds no array of ids"),
        (b"not an array", "holds no array of ids"),
        (b"", "holds no array of ids"),
        (b"PK\x03\x04" + bytes(50), "holds no array of ids"),
        (b"\x93NUMPY\1\0" + b"\xb8\x0b" + b"(" * 3000, "holds no array of ids"),
        (
            b"\x93NUMPY\1\0" + bytes([81, 0]) + b"{'descr':'<u2','fortran_order':False,'shape':(1" + b"0" * 30 + b",)}\n",
            "no array",
        ),
    ],
)
def test_what_is_no_ids_is_one_line(tmp_path: Path, array: Any, problem: str) -> None:
    if isinstance(array, bytes):
        (tmp_path / "a.npy").write_bytes(array)
    else:
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(FileError, match=problem):
        list(documents.read_ids(tmp_path / "a.npy", 100))


def test_ids_say_nothing_of_their_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", np.arange(100))
    assert train(tmp_path / "a.npy", "-o", tmp_path / "run") == 2
    assert "a.npy holds ids: say which tokenizer made them with --tokenizer FILE" in capsys.readouterr().err


TASKS = [
    {"instruction": "Translate into Turkish.", "input": "a fox", "output": "bir tilki"},
    {"instruction": "Кто это?", "input": "", "output": "Лиса."},
    {"instruction": "Kim to?", "output": "Lis.", "system": "Bądź zwięzły."},
]


@pytest.mark.parametrize("name", ["tasks.jsonl", "tasks.json"])
def test_instructions_become_conversations_that_the_model_answers(tmp_path: Path, name: str) -> None:
    rows = [json.dumps(task, ensure_ascii=False) for task in TASKS]
    (tmp_path / name).write_text("\n".join(rows) if name.endswith("l") else f"[{', '.join(rows)}]", encoding="utf-8")
    asked = [[turn["content"] for turn in document] for document, _ in read_documents(tmp_path / name)]  # type: ignore[index]
    assert asked[:2] == [["Translate into Turkish.\n\na fox", "bir tilki"], ["Кто это?", "Лиса."]]
    assert asked[2] == ["Bądź zwięzły.", "Kim to?", "Lis."]
    rows *= 20
    (tmp_path / name).write_text("\n".join(rows) if name.endswith("l") else f"[{', '.join(rows)}]", encoding="utf-8")
    options = f"{SMALL} --tokenizer characters --set n_ctx=128 --steps 150 --batch 4 --micro-batch 4 --lr 1e-2 --eval-every 150"
    assert train(tmp_path / name, "-o", tmp_path / "run", options=options) == 0
    assert cli.main(["export", str(tmp_path / "run" / "last.pt"), "-o", str(tmp_path / "m.gguf")]) == 0
    with load(tmp_path / "m.gguf", backend="numpy") as model:
        said = model.chat([{"role": "user", "content": "Кто это?"}], temperature=0)
        assert "".join(piece.text for piece in said) == "Лиса."


@pytest.mark.parametrize(
    ("content", "problem"),
    [('{"text": "x"}', "is no list"), ('[{"instruction": "x"}]', "row 1 is no document"), ("[1]", "row 1 is"), ("[", "no lis")],
)
def test_a_damaged_list_is_one_line(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(FileError, match=problem):
        list(read_documents(tmp_path / "a.json"))


def test_a_file_given_twice_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(long(RUSSIAN, 50_000), encoding="utf-8")
    (tmp_path / "b").mkdir()
    assert train(tmp_path / "a.txt", tmp_path / "b" / ".." / "a.txt", "-o", tmp_path / "run") == 0
    assert f"{tmp_path / 'a.txt'} is given 2 times" in capsys.readouterr().err


def test_small_files_share_one_count_and_lose_nothing(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.txt" for i in range(3)]
    for i, file in enumerate(files):
        file.write_text(long(ENGLISH, 43_000 - 4_000 * i)[: 43_000 - 4_000 * i])
    assert train(*files, "-o", tmp_path / "run") == 0
    state = data.read_state(tmp_path / "run" / "data")
    numbers = [part["first"] + i for part in state.values() for i in range(part["documents"])]
    assert numbers == list(range(len(numbers)))
    _, train_split = parts(tmp_path / "run")
    _, val = parts(tmp_path / "run", "val")
    assert len(val.ids) >= 1
    assert train_split.n_tokens + val.n_tokens == sum(file.stat().st_size + 1 for file in files)


def test_parts_shorter_than_a_sequence_are_learnt(tmp_path: Path) -> None:
    ids = [np.arange(10 * i, 10 * i + 10, dtype=np.uint16) for i in range(7)]
    corpus = data.Corpus(ids, [np.ones(10, np.uint8)] * 7, 32, [f"{i}.txt" for i in range(7)])
    assert corpus.n_blocks() == 2
    learnt = [int(i) for number in range(2) for i in corpus.block(number)[1]]
    assert learnt == list(range(1, 65))
    more = data.Corpus([*ids, np.arange(64)], [np.ones(10)] * 7 + [np.ones(64)], 32, [*corpus.files, "long"])
    assert {name: part.n_tokens for name, part in more.parts().items()} == {data.SHORT: 70, "long": 64}
    assert Feed(more, 1, 3).n_blocks.tolist() == [1, 1]


# ── windows ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_windows_at_sentences_begin_with_one_and_learn_everything_once(tmp_path: Path) -> None:
    for name, text in (("ru", RUSSIAN), ("tr", TURKISH)):
        (tmp_path / f"{name}.txt").write_text(long(text), encoding="utf-8")
    options = f"{SMALL} {SHORT} --tokenizer sentencepiece --set n_vocab=500 --set n_ctx=48 --windows sentences"
    assert train(tmp_path / "ru.txt", tmp_path / "tr.txt", "-o", tmp_path / "run", options=options) == 0
    tok, plain = parts(tmp_path / "run")
    corpus = replace(plain, context=48, sentence_ends=data.sentence_ends(tok))
    whole, seen, begins = np.concatenate(corpus.ids), [], 0
    for number in range(corpus.n_blocks()):
        ids, targets, mask = corpus.block(number, 17)
        assert ids.shape == targets.shape == mask.shape == (48,)
        learnt = targets[mask > 0]
        assert np.array_equal(learnt, whole[len(seen) + 1 : len(seen) + 1 + len(learnt)])
        first = int(np.flatnonzero(mask)[0])
        before = tok.decode(whole[: len(seen)][-8:].tolist())
        begins += first == 0 and (not seen or before.endswith("\n") or before.rstrip(' »"”')[-1:] in tuple(".!?"))
        seen += learnt.tolist()
    assert len(seen) == len(whole) - 1
    assert begins > 0.6 * corpus.n_blocks(), "sentences of these texts are mostly shorter than a window"
    assert answers(tmp_path / "run") is not None


def test_a_sentence_longer_than_a_window_is_cut(tmp_path: Path) -> None:
    ids = np.arange(100, dtype=np.uint16)
    corpus = data.Corpus([ids], [np.ones(100, np.uint8)], 8, ["a"], np.zeros(100, bool))
    assert [int(corpus.block(n)[0][0]) for n in range(corpus.n_blocks())] == [*range(0, 96, 8), 91]
    assert sum(int(corpus.block(n)[2].sum()) for n in range(corpus.n_blocks())) == 99
