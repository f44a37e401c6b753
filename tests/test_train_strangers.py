"""A run's folder that somebody else has made: going on with it costs nothing outside of it, and cannot crash."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from small_runs import errors, folder, same, train  # noqa: F401

from pocketlm.errors import FileError

torch: Any = pytest.importorskip("torch", reason="the trainer is PyTorch")

from pocketlm.train import checkpoints  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there that tests have not")
@pytest.mark.parametrize("name", ["log.jsonl", "chat_template.jinja", "last.pt", "vocab.json", "data/state.json", "data"])
def test_what_a_link_in_a_run_leads_to_is_not_written_over(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run", "a.txt --steps 2") == 0
    precious, link = Path("precious"), Path("run", name)
    if link.is_dir():
        link.rename(precious)
    else:
        precious.write_text("precious")
        link.unlink()
    link.symlink_to(precious.absolute())
    before = sorted((path, path.read_bytes()) for path in (precious.iterdir() if precious.is_dir() else [precious]))
    capsys.readouterr()
    assert train("run", "a.txt b.txt --steps 4") == 1
    assert f"{name}: is a link, or no file, and would be written to" in errors(capsys)
    assert before == [(path, path.read_bytes()) for path, _ in before]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there that tests have not")
def test_links_to_what_a_run_does_not_write_are_left_alone() -> None:
    for name in ("corpus.jsonl", "start.pt", "model.json"):
        Path(name).symlink_to("c.txt")
    assert train(".", "a.txt --steps 2") == 0


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes with names")
def test_a_pipe_in_a_run_is_not_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run", "a.txt --steps 2") == 0
    Path("run/log.jsonl").unlink()
    os.mkfifo("run/log.jsonl")
    assert train("run", "a.txt --steps 4") == 1
    assert "is a link, or no file" in errors(capsys)


CHANGES: dict[str, Any] = {  # of the optimiser's state, to which PyTorch's fused kernels write as much as the weights have
    "smaller": lambda state: state.update(exp_avg=torch.zeros(3)),
    "one value many times": lambda state: state.update(exp_avg_sq=torch.empty(1)[0].expand(99999)),
    "a number": lambda state: state.update(exp_avg=5),
    "missing": lambda state: state.pop("exp_avg_sq"),
    "three steps": lambda state: state.update(step=torch.zeros(3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_optimisers_state_that_is_not_as_large_as_the_weights_is_refused(
    change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("run", "a.txt --steps 2") == 0
    content = torch.load("run/last.pt", weights_only=True)
    CHANGES[change](content["optimizer"]["state"][0])
    torch.save(content, "run/last.pt")
    assert train("run", "a.txt --steps 4") == 1
    assert "is no checkpoint that a run can go on from" in errors(capsys)


def test_an_optimisers_settings_are_those_of_the_run() -> None:
    assert train("run", "a.txt --steps 2") == 0
    shutil.copytree("run", "changed")
    content = torch.load("run/last.pt", weights_only=True)
    content["optimizer"]["param_groups"][0] |= {"betas": 5, "amsgrad": True, "foreach": [], "eps": 1e30}
    torch.save(content, "changed/last.pt")
    assert train("run", "a.txt --steps 4") == train("changed", "a.txt --steps 4") == 0
    assert same("run", "changed")


def test_a_run_goes_on_whose_optimiser_has_no_state_yet() -> None:
    """In fp16 the first steps may overflow, and are left out."""
    assert train("run", "a.txt --steps 2") == 0
    content = torch.load("run/last.pt", weights_only=True)
    content["optimizer"]["state"] = {}
    torch.save(content, "run/last.pt")
    assert train("run", "a.txt --steps 4") == 0


@pytest.mark.parametrize("packed", ["data/0", "data.pkl", "version"])
def test_a_checkpoint_that_unpacks_to_more_than_it_is_large_is_not_unpacked(
    packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"model": {"w": torch.zeros(1 << 20)}, "model_config": {"n_layer": 1}}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED if name.endswith(packed) else zipfile.ZIP_STORED)
    monkeypatch.setattr(torch, "load", lambda *_, **__: os.abort())
    with pytest.raises(FileError, match="is no checkpoint of this trainer"):
        checkpoints.read(tmp_path / "bomb.pt")


@pytest.mark.parametrize(("number", "status"), [(1 << 30, 1), (1 << 62, 0), (10**30, 0)])
def test_a_part_of_absurd_length_is_refused_or_made_again(number: int, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run", "a.txt --steps 2") == 0
    path = Path("run/data/state.json")
    parts = json.loads(path.read_text())
    next(iter(parts.values()))["train"] = number
    path.write_text(json.dumps(parts))
    assert train("run", "a.txt --steps 4") == status
    assert ("is damaged" in errors(capsys)) == status
