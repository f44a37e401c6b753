"""What `pocketlm inspect` says of a model in words: its memory is the executor's own figure, its speed the memory's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_models import write_model

import pocketlm
from pocketlm.cli import main
from pocketlm.doctor.portrait import portrait_with
from pocketlm.runtime.executors import memory_needed
from pocketlm.runtime.gguf_reader import open_gguf
from pocketlm.runtime.hyper import read_hyper
from pocketlm.runtime.plan import make_plan

CHAT = {"tokenizer.chat_template": "{{ messages }}"}


def test_the_figures_are_those_of_the_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", n_layer=4, n_embd=256, n_ff=512, n_ctx=2048, metadata=CHAT)
    what, memory, speed, boards = portrait_with(path, 2, 1e9)
    assert what == "It holds conversations: llama, 4 layers, 256 wide, made for 2,048 tokens."
    with pocketlm.load(path, backend="numpy", threads=2) as model, open_gguf(path) as file:
        for n_ctx in (512, 2048):
            needs = sum(memory_needed(model.executor.plan, file.tensors, n_ctx, 2))  # type: ignore[attr-defined]
            assert f"{needs / 1e6:.{0 if needs >= 1e7 else 1}f} MB with {n_ctx:,} tokens of context" in memory
        matrices = [t for t in file.tensors.values() if len(t.shape) == 2]  # the token table is the output matrix, too
        read = sum(t.data.nbytes for t in matrices)
    assert f"{1e9 / read:.0f} here, {3.8e9 / read:.0f} on a Pi 4, {9e9 / read:.0f} on a Pi 5" in speed
    assert boards == "Raspberry Pi without a desktop: 1 GB yes, 2 GB yes, 4 GB yes, 8 GB yes."


def test_a_model_that_does_not_fit_a_board_says_up_to_where(tmp_path: Path) -> None:
    """Keys and values of 64 KB a token: a gigabyte is sixteen thousand tokens."""
    path = write_model(tmp_path / "m.gguf", n_layer=8, n_embd=2048, n_head=16, n_ff=64, n_ctx=100_000)
    boards = portrait_with(path, 2, 1e9)[3]
    found = {int(size): int(tokens.replace(",", "")) for size, tokens in re.findall(r"(\d) GB up to ([\d,]+) tokens", boards)}
    assert 1 in found
    with open_gguf(path) as file:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        plan = make_plan(read_hyper(file.metadata, shapes["token_embd.weight"][0], path), shapes, path)
        for size, longest in found.items():
            free = int(0.9 * size * (1 << 30)) - (150 << 20)
            fits, too_long = (sum(memory_needed(plan, file.tensors, n_ctx, 4)) for n_ctx in (longest, longest + 64))
            assert fits <= free < too_long


def test_inspect_shows_it_and_says_why_a_model_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(write_model(tmp_path / "m.gguf"))]) == 0
    assert "It continues texts: llama, 2 layers" in capsys.readouterr().out
    path = write_model(tmp_path / "other.gguf", metadata={"general.architecture": "mamba"})
    assert main(["inspect", str(path)]) == 0
    assert "pocketlm does not run it: architecture 'mamba' is not supported" in capsys.readouterr().out
