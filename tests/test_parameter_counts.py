"""One number of parameters: what `export` says of a checkpoint, `inspect` says of it and of every file made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="makes the checkpoints")

import torch_models as models  # noqa: E402

import pocketlm  # noqa: E402
from pocketlm.cli import main  # noqa: E402
from pocketlm.export.from_model_file import is_model_file  # noqa: E402
from pocketlm.model import find_model  # noqa: E402
from pocketlm.train import checkpoints  # noqa: E402
from pocketlm.train.decoder import Decoder  # noqa: E402
from pocketlm.train.presets import PRESETS, changed  # noqa: E402

SMALL = {"n_layer": "2", "n_embd": "96", "n_ctx": "64", "n_ff": "128", "n_vocab": "300"}


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> int:
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["parameters"]


def exported(checkpoint: Path, out: Path, capsys: pytest.CaptureFixture[str], *options: str) -> int:
    given = [] if is_model_file(checkpoint) else ["--tokenizer", "none"]
    assert main(["export", str(checkpoint), "-o", str(out), *given, *options]) == 0
    return int(capsys.readouterr().out.split(": ", 1)[1].split(" parameters")[0].replace(",", ""))


def random(module: Any) -> Any:
    """Weights of which none is zero, as training leaves them."""
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return module


def checkpoint_of(kind: str, folder: Path) -> tuple[Path, int]:
    """A checkpoint, and the number of its parameters as PyTorch counts them, a tied head once."""
    if kind in PRESETS:
        module = random(Decoder(changed(PRESETS[kind].shape, SMALL)))
        checkpoints.save(folder / "c.pt", module)
    else:  # with lm_head beside wte, and the masks that old nanoGPT saves as buffers
        tied = kind != "nanoGPT, not tied"
        module = random(models.GPT(n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=300, bias=True, masks=True))
        assert module.lm_head.weight is module.transformer.wte.weight
        if not tied:
            module.lm_head.weight = torch.nn.Parameter(torch.randn_like(module.lm_head.weight))
        state = {"teacher." * ("class" in kind) + name: tensor for name, tensor in module.state_dict().items()}
        torch.save({"model": state, "config": {"n_head": 4}}, folder / "c.pt")
    return folder / "c.pt", sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("kind", [*PRESETS, "nanoGPT, tied", "nanoGPT, not tied", "nanoGPT in a class"])
def test_export_and_inspect_count_alike(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint, count = checkpoint_of(kind, tmp_path)
    found = {"checkpoint": inspected(checkpoint, capsys)}
    for name, options in {"f16.gguf": (), "q4.gguf": ("--quant", "q4_0"), "bin": ()}.items():
        found[f"export {name}"] = exported(checkpoint, tmp_path / name, capsys, *options)
        found[name] = inspected(tmp_path / name, capsys)
    found["again"] = exported(tmp_path / "f16.gguf", tmp_path / "again.gguf", capsys, "--quant", "q8_0")
    assert found == dict.fromkeys(found, count)


def test_a_head_that_a_file_keeps_twice_is_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.savez(tmp_path / "c.npz", **{"wte.weight": table, "lm_head.weight": table.copy(), "h.0.ln_1.weight": np.ones(3)})
    assert inspected(tmp_path / "c.npz", capsys) == 15
    np.savez(tmp_path / "c.npz", **{"wte.weight": table, "lm_head.weight": table + 1, "h.0.ln_1.weight": np.ones(3)})
    assert inspected(tmp_path / "c.npz", capsys) == 27


def test_the_loaded_model_counts_as_inspect_does(capsys: pytest.CaptureFixture[str]):
    path = find_model("small-talk")
    with pocketlm.load(path, backend="numpy") as model:
        assert model.n_parameters == inspected(path, capsys) == 3_410_176
