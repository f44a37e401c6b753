"""gpt-oss as it is published, its experts packed in MXFP4: computed as by transformers, kept, refused if not whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_families_transformers import MODELS, logits_of, saved, torch, transformers

import pocketlm
from pocketlm.errors import FileError
from pocketlm.export.dialects import read_canonical
from pocketlm.export.export import export
from pocketlm.runtime.gguf_reader import open_gguf


@pytest.fixture
def packed(tmp_path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """A folder of gpt-oss as it is published, in `folder`: a text, its logits, and the experts' weights as transformers unpacks
    them, by the end of their names.
    """
    safetensors = pytest.importorskip("safetensors.torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder, generator, unpacked = tmp_path / "folder", torch.Generator().manual_seed(0), {}
    ids, _ = saved(MODELS["gpt-oss"], folder)
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    weights = safetensors.load_file(file)
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        n, columns, rows = weights.pop(name).shape
        blocks = torch.randint(0, 256, (n, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 125, (n, rows, columns // 32), generator=generator, dtype=torch.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        unpacked[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
        model.get_parameter(name).data.copy_(unpacked[name])
    safetensors.save_file(weights, file)
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return ids, logits_of(model, ids), {name: tensor.numpy() for name, tensor in unpacked.items()}


def test_gpt_oss_as_it_is_published_computes_what_transformers_makes_of_it(packed: Any, tmp_path: Path) -> None:
    ids, expected, _ = packed
    export(read_canonical(tmp_path / "folder"), "folder", tmp_path / "model.gguf", quant="f32")
    for backend, limit in (("numpy", 1e-5), ("native", 1e-3)):
        with pocketlm.load(tmp_path / "model.gguf", backend=backend, threads=2) as model:
            np.testing.assert_allclose(model.logits(ids), expected, atol=limit * np.abs(expected).max(), rtol=0)


def test_experts_stay_what_they_are_in_a_file_of_mxfp4(packed: Any, tmp_path: Path) -> None:
    unpacked = packed[2]
    export(read_canonical(tmp_path / "folder"), "folder", tmp_path / "model.gguf", quant="mxfp4")
    with open_gguf(tmp_path / "model.gguf") as file:
        assert sum(tensor.format.name == "MXFP4" for tensor in file.tensors.values()) == 3 * 3
        for layer in range(3):
            both = unpacked[f"model.layers.{layer}.mlp.experts.gate_up_proj"].swapaxes(1, 2)
            down = unpacked[f"model.layers.{layer}.mlp.experts.down_proj"].swapaxes(1, 2)
            for part, weights in (("gate", both[:, ::2]), ("up", both[:, 1::2]), ("down", down)):
                found = file.tensors[f"blk.{layer}.ffn_{part}_exps.weight"].to_float32()
                np.testing.assert_array_equal(found, weights)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised by bitsandbytes"),
        ("gate_up_proj_scales", "blk.0.ffn_both_exps.weight do not fit together"),
        ("down_proj_scales", "blk.0.ffn_down_exps.weight do not fit together"),
    ],
)
def test_a_published_gpt_oss_that_is_not_whole_is_refused(packed: Any, tmp_path: Path, change: Any, said: str) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    config, file = tmp_path / "folder" / "config.json", tmp_path / "folder" / "model.safetensors"
    if isinstance(change, dict):
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    else:
        weights = safetensors.load_file(file)
        del weights[f"model.layers.0.mlp.experts.{change}"]
        safetensors.save_file(weights, file)
    with pytest.raises(FileError, match=said) as error:
        read_canonical(tmp_path / "folder")
    assert "\n" not in str(error.value)
