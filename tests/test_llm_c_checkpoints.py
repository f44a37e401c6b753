"""llm.c: the model files that its training writes give the logits of its own forward, without the rows that round up."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from home_made_checks import check, models, torch

from pocketlm.errors import FileError
from pocketlm.export.dialects import read_canonical

LAYER = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def model_bin(module: Any, version: int) -> bytes:
    """A model file as `write_model` of its train_gpt2.py makes it; in bfloat16 the module's weights become the file's."""
    rows = 61 if version == 1 else 128
    dtype = torch.bfloat16 if version == 5 else torch.float32
    state = module.state_dict()
    layers = [f"h.{i}.{name}.{end}" for name in LAYER for end in ("weight", "bias") for i in range(2)]
    data = struct.pack("<8i", 20240326, version, 24, 61, 2, 4, 32, rows).ljust(1024, b"\0")
    for name in ("wte.weight", "wpe.weight", *layers, "ln_f.weight", "ln_f.bias"):
        weight = state[f"transformer.{name}"]
        rounded = weight.to(dtype)
        weight.copy_(rounded)
        if name == "wte.weight":
            rounded = torch.nn.functional.pad(rounded, (0, 0, 0, rows - 61))
        data += rounded.contiguous().view(torch.uint8).numpy().tobytes()
    return data


@pytest.mark.parametrize("version", [1, 3, 5])
def test_llm_c_model_bin(tmp_path: Path, version: int) -> None:
    module = models.initialise(models.GPT(masks=False, tanh=True))
    path = tmp_path / "model_00000100.bin"
    path.write_bytes(model_bin(module, version))
    model, _ = check(module, path, n=24)
    assert (model.dialect, model.hyper.n_vocab, model.hyper.n_ctx) == ("llm.c", 61, 24)


def test_a_damaged_model_bin_is_one_line(tmp_path: Path) -> None:
    data, path = model_bin(models.initialise(models.GPT(masks=False)), 3), tmp_path / "model.bin"
    numbers = [data[:4] + struct.pack("<7i", *n) + data[32:] for n in ((2, 24, 61, 2, 4, 32, 128), (3, 24, 61, 2, 0, 32, 128),
               (3, 24, 61, 1 << 20, 4, 32, 128), (3, 24, 61, 2, 5, 32, 128), (3, 24, 61, 2, 4, 32, 60))]  # fmt: skip
    for damaged in (data[:-4], data + b"\0\0\0\0", data[:6], data[:1024], *numbers):
        path.write_bytes(damaged)
        with pytest.raises(FileError) as error:
            read_canonical(path, tokenizer="none")
        assert "\n" not in str(error.value)
