"""`pocketlm eval` of several models and texts: one table, checkpoints and model files alike, figures that can be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from canonical_models import make_hyper, make_model
from tiny_models import write_model

from pocketlm.cli import main
from pocketlm.export.export import export
from pocketlm.tokenizer import load as load_tokenizer

TEXTS = {"short.txt": "then in the thing, nothing in this then. ", "long.txt": "the hen is in the inn " * 9}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    write_model(tmp_path / "a.gguf", n_ctx=64)
    model = make_model(make_hyper())
    export(model, "test", tmp_path / "b.gguf", quant="f32")
    export(model, "test", tmp_path / "b16", container="fp16")
    return tmp_path


def rows(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> list[dict]:
    assert main(["eval", *words, "--backend", "numpy", "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_every_pair_is_measured_as_it_is_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    together = rows(capsys, "a.gguf", "b.gguf", "b16", "--text", *TEXTS)
    assert [(row["model"], row["text"]) for row in together] == [(m, t) for m in ("a.gguf", "b.gguf", "b16") for t in TEXTS]
    for row in together:
        alone = rows(capsys, row["model"], "--text", row["text"])
        assert alone | {"seconds": 0} == row | {"seconds": 0}
        n_ids = len(load_tokenizer(folder / row["model"]).encode(TEXTS[row["text"]]))
        assert row["tokens_per_character"] == n_ids / len(TEXTS[row["text"]])
    assert together[2]["perplexity"] == pytest.approx(together[4]["perplexity"], rel=1e-3)  # the same weights in 16 bits


def test_a_run_and_its_checkpoint_are_what_their_export_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="the trainer is PyTorch")
    (folder / "train.txt").write_text(TEXTS["long.txt"] * 60)
    shape = "--set n_layer=1 --set n_embd=16 --set n_head=2 --set n_ctx=16 --set n_ff=16 --tokenizer characters"
    short = "--steps 3 --batch 2 --micro-batch 2 --warmup 1 --eval-every 1 --threads 1 --lr 0.5"
    words = f"train.txt --val train.txt -o run {shape} {short}"
    assert main(["train", *words.split()]) == 0
    assert main(["export", "run/best.pt", "-o", "best.gguf", "--quant", "f32"]) == 0
    capsys.readouterr()
    found = rows(capsys, "run", "run/best.pt", "best.gguf", "run/last.pt", "--text", "long.txt")
    assert [row["perplexity"] for row in found[:2]] == [found[2]["perplexity"]] * 2
    assert found[3]["model"] == "run/last.pt"
    assert not list(folder.glob("*.part*"))


def test_the_table_has_a_row_for_each_pair(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "a.gguf", "b.gguf", "--text", *TEXTS]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "model"
    assert "bits per character" in header
    assert [line.split()[:2] for line in lines] == [[m, t] for m in ("a.gguf", "b.gguf") for t in TEXTS]
    assert main(["eval", "a.gguf", "b.gguf", "--text", "short.txt", "--markdown"]) == 0
    header, rule, *lines = capsys.readouterr().out.splitlines()
    assert header.count("|") == rule.count("|") == lines[0].count("|")
    assert rule.startswith("| --- | --- | --:")
    assert len(lines) == 2


def test_the_text_may_be_named_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rows(capsys, "--text", "short.txt", "a.gguf")["model"] == "a.gguf"  # type: ignore[call-overload]
    assert main(["eval", "--text", "short.txt"]) == 2
    assert "give the models first" in capsys.readouterr().err


def test_one_that_cannot_be_measured_stops_no_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty.txt").write_text("")
    assert main(["eval", "none.gguf", "a.gguf", "--text", "short.txt", "empty.txt", "--json"]) == 1
    out, error = capsys.readouterr()
    assert [row["text"] for row in json.loads(out)] == ["short.txt"]
    assert [line.split(": ")[1] for line in error.splitlines()] == ["none.gguf", "the text is too short"]


def test_a_text_that_is_not_there_is_worded_as_elsewhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "nosuch.txt: cannot be read (No such file or directory); check the path\n"
    assert main(["eval", "a.gguf", "--text", "nosuch.txt"]) == 1
    assert capsys.readouterr().err == f"pocketlm: {said}"
    assert main(["generate", "a.gguf", "-f", "nosuch.txt"]) == 1
    assert capsys.readouterr().err == f"pocketlm: {said}"
