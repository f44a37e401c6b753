"""llama2.c: its checkpoints and the three versions of its model.bin give the logits of its own forward."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_checks import save
from home_made_checks import SIZES, check, models, torch

from pocketlm.errors import FileError
from pocketlm.export.dialects import read_canonical

ORDER_0 = ("embed", "attn_norm", "q", "k", "v", "o", "ffn_norm", "gate", "down", "up", "norm", "tables")
ORDER_1 = ("attn_norm", "ffn_norm", "norm", "embed", "q", "k", "v", "o", "gate", "down", "up")


def llama2c_bytes(module: Any, version: int, tied: bool, group: int = 16) -> bytes:
    """A `model.bin`; of version 2 the module's matrices become what the file holds."""
    numbers = [32, 48, 2, 4, 2, 61 if tied or version else -61, 40]
    header = struct.pack("<7i", *numbers)
    if version:
        header = struct.pack("<Ii", 0x616B3432, version) + header + struct.pack("<B", tied)
        header = (header + (struct.pack("<i", group) if version == 2 else b"")).ljust(256, b"\0")
    parts = [header]
    for name in (*(ORDER_1 if version else ORDER_0), *(() if tied else ("head",))):
        if name == "tables":
            parts.append(np.zeros((2, 40, 4), np.float32).tobytes())
            continue
        layers = [None] if name in ("embed", "norm", "head") else [0, 1]
        for weight in [module.part(name, layer).weight for layer in layers]:
            values = weight.detach().numpy()
            if version == 2 and values.ndim > 1:
                groups = values.reshape(-1, group)
                scales = (np.abs(groups).max(1, keepdims=True) / 127).astype(np.float32)
                codes = np.rint(groups / scales).astype(np.int8)
                with torch.no_grad():
                    weight.copy_(torch.from_numpy((codes * scales).reshape(values.shape)))
                parts += [codes.tobytes(), scales.tobytes()]
            else:
                parts.append(values.astype("<f4").tobytes())
    return b"".join(parts)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_llama2c_model_bin(tmp_path: Path, version: int, tied: bool) -> None:
    module = models.initialise(models.Decoder(models.META_NAMES, "neighbours", tied=tied, **SIZES))
    path = tmp_path / "model.bin"
    path.write_bytes(llama2c_bytes(module, version, tied))
    model, _ = check(module, path)
    assert (model.hyper.architecture, model.hyper.n_ctx, model.hyper.norm_eps) == ("llama", 40, 1e-5)
    assert ("output.weight" in model.tensors) != tied


def test_llama2c_checkpoint(tmp_path: Path) -> None:
    module = models.initialise(models.Decoder(models.META_NAMES, "neighbours", **SIZES))
    args = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 61, "multiple_of": 16, "max_seq_len": 40,
            "dropout": 0.0}  # fmt: skip
    state = {**module.state_dict(), "output.weight": module.state_dict()["tok_embeddings.weight"]}
    content = {"model": state, "model_args": args, "optimizer": {"state": {}}, "iter_num": 3, "config": {}}
    check(module, save(tmp_path, content, "ckpt.pt"))


@pytest.mark.parametrize("version", [0, 1, 2])
def test_a_damaged_model_bin_is_one_line(tmp_path: Path, version: int) -> None:
    module = models.initialise(models.Decoder(models.META_NAMES, "neighbours", **SIZES))
    data, path = llama2c_bytes(module, version, True), tmp_path / "model.bin"
    scrambled = (data[:4] + b"\xff" * 40 + data[44:], data[:8] + bytes(32) + data[40:])
    for damaged in (data[:-4], data + b"\0\0\0\0", data[:30], *scrambled):
        path.write_bytes(damaged)
        with pytest.raises(FileError) as error:
            read_canonical(path, tokenizer="none")
        assert "\n" not in str(error.value)
