"""`pocketlm inspect` tells of models, packed models and checkpoints with the same facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from canonical_models import make_hyper, make_model
from packing import fake_stub

from pocketlm.build.pack import open_stub, pack
from pocketlm.build.persona import Persona
from pocketlm.cli import main
from pocketlm.export.export import export
from pocketlm.export.from_model_file import read_model_file


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    model = make_model(make_hyper("llama", n_embd=64, n_head=4, head_dim=16, n_ff=128))
    export(model, "c", tmp_path / "m.gguf", quant="q4_0")
    return tmp_path / "m.gguf"


def test_a_packed_executable_shows_the_model_inside(gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    friend = pack(gguf, open_stub(fake_stub(tmp_path / "stub")), tmp_path / "friend", Persona())
    model, packed = inspected(gguf, capsys), inspected(friend, capsys)
    assert packed["kind"] == "packed executable of a GGUF v3"
    assert packed["bytes"] == friend.stat().st_size
    assert (packed["parameters"], packed["formats"]) == (model["parameters"], model["formats"])
    assert {key: packed["metadata"][key] for key in model["metadata"]} == model["metadata"]
    assert [row["name"] for row in packed["tensors"]] == [row["name"] for row in model["tensors"]]


def test_the_model_in_an_executable_can_be_exported(gguf: Path, tmp_path: Path) -> None:
    friend = pack(gguf, open_stub(fake_stub(tmp_path / "stub")), tmp_path / "friend", Persona())
    inside, outside = read_model_file(friend), read_model_file(gguf)
    assert inside.metadata.keys() == outside.metadata.keys()
    for name, tensor in outside.tensors.items():
        assert np.array_equal(inside.tensors[name].read(), tensor.read()), name


def test_a_checkpoint_has_the_same_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "c.npz", a=np.zeros((2, 3), np.float32), b=np.ones(4, np.float16))
    facts = inspected(tmp_path / "c.npz", capsys)
    assert (facts["kind"], facts["parameters"], facts["bits_per_weight"]) == ("checkpoint", 10, 25.6)
    assert facts["formats"] == {"float32": 1, "float16": 1}
    assert facts["tensors"][0] == {"name": "a", "shape": [2, 3], "format": "float32", "bytes": 24}


def test_tensors_of_a_bare_state_dict_are_no_metadata(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch", reason="writes the checkpoint")
    torch.save({"a.weight": torch.ones(2, 2), "note": "mine"}, tmp_path / "c.pt")
    assert inspected(tmp_path / "c.pt", capsys)["metadata"] == {"note": "mine"}
