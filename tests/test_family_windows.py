"""Sliding windows in other layers than a family usually has them, or where it seldom has them: transformers' logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_checks import logits_of

from pocketlm.errors import FileError
from pocketlm.export.dialects import read_canonical
from pocketlm.export.export import export

families = pytest.importorskip("test_families_transformers", reason="torch or transformers is not installed")
FULL, LOCAL, GEMMA, Row = families.FULL, families.LOCAL, families.GEMMA, families.Row
BASES = {FULL: {"rope_type": "default", "rope_theta": 5e5}, LOCAL: {"rope_type": "default", "rope_theta": 500.0}}
ON_DEMAND = {"use_sliding_window": True, "sliding_window": 8}
MODELS = {
    "gemma3": Row("Gemma3Text", {**GEMMA, "sliding_window": 8, "layer_types": [FULL, LOCAL, LOCAL]}),
    "gemma3, no windows": Row("Gemma3Text", {**GEMMA, "sliding_window": 8, "layer_types": [FULL] * 3}),
    "gemma3, other bases alone": Row("Gemma3Text", GEMMA | {"sliding_window": 4096, "layer_types": [LOCAL, FULL, FULL]}),
    "gemma2, no windows": Row("Gemma2", {**GEMMA, "sliding_window": 8, "layer_types": [FULL] * 3}, llama_cpp=False),
    "gemma2": Row("Gemma2", {**GEMMA, "sliding_window": 8, "layer_types": [FULL, FULL, LOCAL]}),
    "olmo3": Row("Olmo3", {"sliding_window": 8, "layer_types": [FULL, LOCAL, FULL]}),
    "olmo3, two bases": Row("Olmo3", {"sliding_window": 8, "rope_parameters": BASES}, llama_cpp=False),
    # llama.cpp computes these without windows
    "qwen2": Row("Qwen2", {**ON_DEMAND, "max_window_layers": 0}, llama_cpp=False),
    "qwen2, wide heads": Row("Qwen2", {**ON_DEMAND, "max_window_layers": 2, "head_dim": 24}, llama_cpp=False),
    "qwen3": Row("Qwen3", {**ON_DEMAND, "max_window_layers": 1, "head_dim": 24}, llama_cpp=False),
    "mistral": Row("Mistral", {"sliding_window": 8}, llama_cpp=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_transformers(name: str, tmp_path: Path) -> None:
    families.check_logits(MODELS[name], tmp_path)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral"])
def test_older_configurations_mean_the_same(name: str, tmp_path: Path) -> None:
    """Before version 4.53 of transformers a configuration named the first layer with a window, not every layer's kind."""
    families.saved(MODELS[name], tmp_path)
    new, file = read_canonical(tmp_path), tmp_path / "config.json"
    config = json.loads(file.read_text())
    config.pop("layer_types", None)
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "torch_dtype": config.pop("dtype")}
    file.write_text(json.dumps(config))
    assert read_canonical(tmp_path).hyper == new.hyper
    assert any(key.startswith("attention.sliding_window") for key in new.hyper.settings)


@pytest.mark.parametrize("older", [False, True])
def test_the_text_of_a_gemma3_that_sees_pictures(older: bool, tmp_path: Path) -> None:
    """Its configuration has the text's within, without what transformers takes by itself."""
    import torch
    import transformers

    sizes = {name: value for name, value in families.SIZES.items() if name not in ("num_attention_heads", "pad_token_id")}
    text = {**sizes, "max_position_embeddings": 131072, "head_dim": 16, "sliding_window": 8}
    pictures = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config={**pictures, "image_size": 28, "patch_size": 14})
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "folder")
    file, usual = tmp_path / "folder" / "config.json", transformers.Gemma3TextConfig().to_dict()
    said = json.loads(file.read_text())
    said["text_config"] = {name: value for name, value in said["text_config"].items() if value != usual.get(name)}
    if older:
        del said["text_config"]["layer_types"]
    file.write_text(json.dumps(said))
    ids = np.arange(40) * 7 % 256
    exported = read_canonical(tmp_path / "folder", tokenizer="none")
    assert any("it sees no pictures" in note for note in exported.notes)
    export(exported, "folder", tmp_path / "model.gguf", quant="f32")
    found, expected = logits_of(tmp_path / "model.gguf", ids.tolist()), families.logits_of(model, ids)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_file_exported_again_is_the_same_model(name: str, tmp_path: Path) -> None:
    families.saved(MODELS[name], tmp_path / "folder")
    model = read_canonical(tmp_path / "folder")
    receipt = export(model, "folder", tmp_path / "model.gguf", quant="f32")
    once = read_canonical(tmp_path / "model.gguf")
    assert once.hyper.settings == model.hyper.settings
    said = {
        "olmo3, two bases": "has one rotary base",
        "gemma2, no windows": "knows no gemma2 without windows",
        **dict.fromkeys(("qwen2", "qwen3", "mistral"), "attends to everything"),
    }
    assert name not in said or any(f"stock llama.cpp {said[name]}" in note for note in receipt.notes)
    with pytest.raises(FileError, match="no architecture of transformers that pocketlm writes has"):
        export(model, "folder", tmp_path / "again", container="huggingface", quant="f32")
