"""What the tests of growing runs train: a tiny model of three texts, in a folder of the test's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", reason="the trainer is PyTorch")

from pocketlm import cli  # noqa: E402
from pocketlm.train import checkpoints, loop  # noqa: E402

SMALL = "--set n_layer=1 --set n_embd=16 --set n_head=2 --set n_ff=24 --set n_ctx=16 --tokenizer characters"
RUN = f"{SMALL} --batch 4 --micro-batch 2 --dropout 0.1 --warmup 4 --eval-every 10 --threads 1 --log-every 1"


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, n in (("a", 900), ("b", 300), ("c", 150)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{i}: the quick brown fox {i * 7919 % 1000} jumps.\n" for i in range(n)))
    (tmp_path / "val.txt").write_text("12: the quick brown fox 77 jumps.\n" * 40)
    return tmp_path


def train(run: str, words: str, options: str = RUN) -> int:
    return cli.main(["train", "-o", run, "--val", "val.txt", *options.split(), *words.split()])


def killed_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    right, left = loop.take_step, [*steps]

    def take_step(*arguments: Any) -> float:
        if arguments[6] in left:
            left.remove(arguments[6])
            raise Killed
        return right(*arguments)

    monkeypatch.setattr(loop, "take_step", take_step)


def content(run: str) -> dict[str, Any]:
    return checkpoints.read(Path(run) / "last.pt")


def same(a: str, b: str) -> bool:
    mine, theirs = content(a), content(b)
    weights = ((weight, theirs["model"][name]) for name, weight in mine["model"].items())
    return mine["position"] == theirs["position"] and all(torch.equal(*pair) for pair in weights)


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    return "".join(line for line in capsys.readouterr().err.splitlines(keepends=True) if line.startswith("pocketlm: "))
