"""Runs that grow: more steps, more texts, another order of them; what is kept of a run, where it ends, what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import Killed, content, errors, folder, killed_at, same, torch, train  # noqa: F401

from pocketlm.errors import UsageError
from pocketlm.train import checkpoints, log, loop
from pocketlm.train.batches import Feed
from pocketlm.train.presets import PRESETS, Settings

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# ── growing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

STAGES = ("a.txt b.txt --steps 20", "c.txt b.txt a.txt --steps 40 --mix a.txt=50..10 b.txt=30 c.txt=20 @30 c.txt=3 [ab].txt=1")


def test_a_run_that_grew_and_was_killed_ends_with_the_weights_of_one_that_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in STAGES:
        assert train("whole", words) == 0
    killed_at(monkeypatch, 7, 19, 22, 33)
    for words, kills in zip(STAGES, (2, 2), strict=True):
        for _ in range(kills):
            with pytest.raises(Killed):
                train("killed", f"{words} --save-seconds 0")
        assert train("killed", f"{words} --save-seconds 0") == 0
    assert same("whole", "killed")
    assert [row["loss"] for row in log.read_log(Path("whole/log.jsonl")) if "loss" in row] == [
        row["loss"] for row in log.read_log(Path("killed/log.jsonl")) if "loss" in row
    ]


def test_going_on_keeps_the_optimiser_and_where_each_text_was(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train("run", STAGES[0]) == 0
    before = content("run")
    seen: dict[str, Any] = {}

    def take_step(model: Any, compiled: Any, feed: Feed, optimizer: Any, *_: Any) -> float:
        seen.update(position=feed.position, state=optimizer.state_dict()["state"])
        raise Killed

    monkeypatch.setattr(loop, "take_step", take_step)
    with pytest.raises(Killed):
        train("run", STAGES[1])
    assert {name: seen["position"][name] for name in before["position"]} == before["position"]
    assert seen["position"]["c.txt"] == [0, 0.0]
    for i, state in before["optimizer"]["state"].items():
        assert all(torch.equal(state[name], seen["state"][i][name]) for name in state)


def test_texts_in_another_order_are_not_encoded_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run", "a.txt b.txt --steps 2") == 0
    capsys.readouterr()
    assert train("run", "b.txt c.txt a.txt --steps 4") == 0
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("encoding")] == ["encoding c.txt"]
    assert content("run")["position"].keys() == {"a.txt", "b.txt", "c.txt"}


def test_what_cannot_change_is_said_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    start = "x" * 70
    identity = {"from": f"{start}/one.pt", "lr": 0.1, "n_layer": 2}
    model = loop.Decoder(PRESETS["tiny"].shape)
    Path("run").mkdir()
    checkpoints.save(
        Path("run/last.pt"), model, identity=identity, measured=[], position={}, **loop.asdict(loop.Progress())
    )
    new = {"from": f"{start}/two.pt", "lr": 0.2, "n_layer": 2}
    with pytest.raises(UsageError) as error:
        loop._resume(Path("run"), new, [], model, None, None, None)  # type: ignore[arg-type]
    said = f"run holds a run with from = {start}/one.pt, not {start}/two.pt; lr = 0.1, not 0.2: give that to go on with it"
    assert str(error.value).startswith(said)
    assert train("other", "a.txt --steps 2") == 0
    assert train("other", "a.txt --steps 4 --lr 0.5 --dropout 0.4") == 2
    assert "dropout = 0.1, not 0.4; lr = 0.003, not 0.5" in errors(capsys)


# ── what is kept, where it ends ──────────────────────────────────────────────────────────────────────────────────────


def numbered(run: str) -> list[str]:
    return sorted(path.name for path in Path(run).glob("step_*.pt"))


def test_the_last_checkpoints_are_kept_and_some_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at(monkeypatch, 45)
    with pytest.raises(Killed):
        train("run", "a.txt --steps 60 --keep 2 --keep-every 20")
    assert numbered("run") == ["step_000010.pt", "step_000020.pt", "step_000030.pt", "step_000040.pt"]
    assert train("run", "a.txt --steps 60 --keep 2 --keep-every 20") == 0
    assert numbered("run") == ["step_000020.pt", "step_000030.pt", "step_000040.pt", "step_000050.pt", "step_000060.pt"]
    assert checkpoints.read(Path("run/step_000030.pt"))["step"] == 30
    assert not list(Path("run").glob(".*"))


def test_an_earlier_checkpoint_can_be_gone_back_to() -> None:
    assert train("run", "a.txt --steps 20 --keep-every 10") == 0
    before = content("run")
    (Path("run/step_000010.pt")).replace("run/last.pt")
    assert train("run", "a.txt --steps 20 --keep-every 10") == 0
    assert all(torch.equal(before["model"][name], weight) for name, weight in content("run")["model"].items())


def test_a_checkpoint_cannot_name_what_is_deleted() -> None:
    assert train("run", "a.txt --steps 10 --keep 1") == 0
    Path("victim.pt").write_text("mine")
    (Path("run") / "step_").mkdir()
    loaded = torch.load("run/last.pt", weights_only=True)
    torch.save({**loaded, "rolling": ["/../../victim", "/../victim", 10]}, "run/last.pt")
    assert train("run", "a.txt --steps 20 --keep 1") == 0
    assert numbered("run") == ["step_000020.pt"]
    assert Path("victim.pt").exists()


def test_a_plateau_ends_a_run_and_more_patience_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = iter([3.0, 2.0, 2.5, 2.1, 2.2, 2.3, 2.4])
    monkeypatch.setattr(loop, "evaluate", lambda *_: next(found))
    assert train("run", "a.txt --steps 1000 --patience 2") == 0
    assert capsys.readouterr().out == "run/last.pt: validation loss 2.1000 after 40 steps\n"
    assert checkpoints.read(Path("run/best.pt"))["step"] == 20
    assert train("run", "a.txt --steps 1000 --patience 2") == 0  # it stays where it is
    assert train("run", "a.txt --steps 1000 --patience 4") == 0
    assert "after 60 steps" in capsys.readouterr().out


def test_losses_on_other_validation_texts_are_not_compared() -> None:
    assert train("run", "a.txt --steps 60 --lr 1e-2") == 0
    best = content("run")["best"]
    Path("val.txt").write_text("spmuj 77 xof nworb kciuq eht\n" * 40)  # harder: no loss on it is below the best so far
    assert train("run", "a.txt --steps 70 --lr 1e-2") == 0
    assert content("run")["best"] > best
    assert checkpoints.read(Path("run/best.pt"))["step"] == 70


# ── what it says ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_start_says_what_the_run_is_made_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run", "a.txt b.txt --steps 10") == 0
    lines = capsys.readouterr().err.splitlines()
    model = content("run")["model"]
    total = sum(weight.numel() for weight in model.values())
    attention = sum(weight.numel() for name, weight in model.items() if ".attn." in name)
    assert any(f"attention {attention:,} ({attention / total:.1%})" in line for line in lines)
    n_tokens = {name: len(np.memmap(f"run/data/part-0000{i}.train", np.uint16)) for i, name in enumerate(("a.txt", "b.txt"))}
    share = n_tokens["b.txt"] / sum(n_tokens.values())
    assert f"b.txt: {n_tokens['b.txt']:,} tokens ({share:.1%}), 1.00 characters a token" in lines
    assert f"10 steps of 64 tokens: {640 / sum(n_tokens.values()):.2f} epochs" in lines


def test_samples_are_text_two_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("Пора чинить лодку,\nсказал он внуку. " * 400, encoding="utf-8")
    Path("val.txt").write_text("Пора чинить лодку,\n" * 40, encoding="utf-8")
    assert train("run", "a.txt --steps 10 --sample Пора --sample дку --sample-tokens 30") == 0
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("  · Пора")]) == 2
    assert "\\n" not in "".join(lines)
    (row,) = (row for row in log.read_log(Path("run/log.jsonl")) if "samples" in row)
    assert [(sample["prompt"], len(sample["texts"])) for sample in row["samples"]] == [("Пора", 2), ("дку", 2)]
    assert row["perplexity"] == pytest.approx(np.exp(row["val_loss"]))
    assert "Пора" in Path("run/log.jsonl").read_text(encoding="utf-8")


def test_samples_are_of_the_likeliest_tokens_and_greedy_at_0() -> None:
    from pocketlm import tokenizer

    assert train("run", "a.txt --steps 10") == 0
    tok = tokenizer.load("run")
    model, _ = loop_model("run/last.pt")
    cold = loop.sampler(tok, ["the"], 2, 20, 0.0)(model)[0]["texts"]
    top = loop.sampler(tok, ["the"], 1, 20, 5.0, 1)(model)[0]["texts"]
    assert cold[0] == cold[1] == top[0]
    hot = loop.sampler(tok, ["the"], 2, 20, 5.0, 0)(model)[0]["texts"]
    assert hot[0] != hot[1]


def loop_model(path: str) -> Any:
    from pocketlm.train.starting_weights import read_start

    return read_start(Path(path), Settings())


def test_the_curve_is_drawn_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    killed_at(monkeypatch, 15)
    with pytest.raises(Killed):
        train("run", "a.txt --steps 20 --plot")
    assert Path("run/log.png").read_bytes().startswith(b"\x89PNG")
