"""The folders that DeepSpeed saves: the weights among the optimiser's parts, by the folder of a step or the one above."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="makes the checkpoints")
models = pytest.importorskip("torch_models")

from pocketlm.errors import FileError  # noqa: E402
from pocketlm.export.checkpoint import open_checkpoint  # noqa: E402
from pocketlm.export.dialects import read_canonical  # noqa: E402

STATES = "mp_rank_00_model_states.pt"


@pytest.fixture
def scaler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An object of a class of DeepSpeed's, which its checkpoints hold and nobody here has."""
    names = ["deepspeed", "deepspeed.runtime", "deepspeed.runtime.fp16", "deepspeed.runtime.fp16.loss_scaler"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    kind = type("DynamicLossScaler", (), {"__module__": names[-1]})
    sys.modules[names[-1]].DynamicLossScaler = kind  # type: ignore[attr-defined]
    found = kind()
    found.cur_scale = 65536.0
    return found


def saved(folder: Path, module: Any, scaler: Any, step: str = "global_step500", empty: bool = False) -> Path:
    """What `save_checkpoint` writes in ZeRO's stages 1 and 2; `empty`: what it writes in stage 3."""
    (folder / step).mkdir(parents=True)
    weights = {name: torch.empty(0) if empty else value.half() for name, value in module.state_dict().items()}
    shapes = [{name: value.shape for name, value in module.state_dict().items()}]
    state = {
        "module": weights, "buffer_names": [], "optimizer": None, "param_shapes": shapes, "frozen_param_shapes": None,
        "shared_params": {}, "lr_scheduler": {"last_batch_iteration": 500}, "data_sampler": None, "random_ltd": None,
        "sparse_tensor_module_names": set(), "skipped_steps": 0, "global_steps": 500, "global_samples": 32000,
        "dp_world_size": 1, "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, "ds_version": "0.15.4",
    }  # fmt: skip
    torch.save(state, folder / step / STATES)
    flat = torch.cat([value.flatten() for value in module.state_dict().values()])
    optimizer = {"loss_scaler": scaler, "zero_stage": 2, "single_partition_of_fp32_groups": [flat], "base_optimizer_state": {}}
    torch.save({"optimizer_state_dict": optimizer}, folder / step / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text(step)
    (folder / "zero_to_fp32.py").write_text("raise SystemExit('nobody runs this')\n")
    return folder


def test_the_folder_of_a_run_and_that_of_a_step_give_the_weights(tmp_path: Path, scaler: Any) -> None:
    module = models.initialise(models.TextbookGPT())
    folder = saved(tmp_path / "run", module, scaler)
    (folder / "config.json").write_text(json.dumps({"n_heads": 4, "context_length": 24}))
    (folder / "vocab.json").write_text(json.dumps([chr(0x400 + i) for i in range(61)]))
    for path in (folder, folder / "global_step500", folder / "global_step500" / STATES):
        model = read_canonical(path)
        assert (model.dialect, model.hyper.n_head, model.hyper.n_vocab) == ("from-scratch GPT", 4, 61)
        assert "tokenizer.ggml.tokens" in model.metadata
        table = model.tensors["token_embd.weight"].read()
        np.testing.assert_array_equal(table, module.tok_emb.weight.detach().half().float().numpy())


def test_the_last_step_is_the_one_that_is_named(tmp_path: Path, scaler: Any) -> None:
    folder = saved(tmp_path / "run", models.initialise(models.TextbookGPT(), 1), scaler, "global_step900")
    last = models.initialise(models.TextbookGPT(), 2)
    saved(folder, last, scaler, "global_step1000")
    found = open_checkpoint(folder).tensors["tok_emb.weight"].read()
    np.testing.assert_array_equal(found, last.tok_emb.weight.detach().half().float().numpy())


@pytest.mark.parametrize("step", ["..", "../elsewhere", "/", "gone", ""])
def test_a_latest_that_points_elsewhere_is_not_followed(tmp_path: Path, scaler: Any, step: str) -> None:
    folder = saved(tmp_path / "run", models.initialise(models.TextbookGPT()), scaler)
    saved(tmp_path / "elsewhere", models.initialise(models.TextbookGPT()), scaler, "x")
    (folder / "latest").write_text(step)
    with pytest.raises(FileError, match="is a folder without a checkpoint in it"):
        open_checkpoint(folder)


def test_weights_that_are_kept_apart_are_said(tmp_path: Path, scaler: Any) -> None:
    folder = saved(tmp_path / "run", models.initialise(models.TextbookGPT()), scaler, empty=True)
    with pytest.raises(FileError, match=r"stage 3 does, .* make one checkpoint of them with the zero_to_fp32.py"):
        open_checkpoint(folder)
    (folder / "global_step500" / "mp_rank_01_model_states.pt").write_bytes(b"x")
    with pytest.raises(FileError, match="holds a model in parts, one for each GPU"):
        open_checkpoint(folder)
