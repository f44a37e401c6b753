"""A LoRA merged before export computes what the base with the adapter computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketlm.errors import FileError
from pocketlm.export.canonical import CanonicalModel
from pocketlm.export.dialects import read_canonical
from pocketlm.export.export import export
from pocketlm.export.lora import merge

torch = pytest.importorskip("torch", reason="makes the checkpoint and the adapter")
models = pytest.importorskip("torch_models")

RANK, ALPHA = 3, 12


def adapter(folder: Path, module: Any, targets: list[str], transposed: bool = False, **config: Any) -> dict[str, Any]:
    """An adapter in PEFT's layout; the changed weights by name."""
    folder.mkdir()
    library = pytest.importorskip("safetensors.torch", reason="writes the adapter")
    factors, changed = {}, {}
    scale = ALPHA / RANK**0.5 if config.get("use_rslora") else ALPHA / RANK
    for name in targets:
        weight = module.get_submodule(name).weight
        n_in, n_out = weight.shape if transposed else weight.shape[::-1]
        a, b = torch.randn(RANK, n_in) * 0.1, torch.randn(n_out, RANK) * 0.1
        factors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        change = scale * (b @ a)
        changed[name] = weight.detach() + (change.T if transposed else change)
    library.save_file(factors, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "fan_in_fan_out": transposed, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(plain))
    return changed


def read(folder: Path, module: Any, config: dict[str, Any]) -> CanonicalModel:
    folder.mkdir(exist_ok=True)
    torch.save(module.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return read_canonical(folder, tokenizer="none")


GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_head": 4, "activation_function": "gelu_new"}
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 64, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip
CASES = [
    ("llama", [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkv"] + ["model.layers.1.mlp.down_proj"], {}),
    ("llama", ["model.layers.0.self_attn.q_proj"], {"use_rslora": True}),
    ("gpt2", ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"], {}),
]


def made(kind: str) -> tuple[Any, dict[str, Any]]:
    module = models.GPT(conv1d=True) if kind == "gpt2" else models.Decoder(models.NAMES, "halves")
    return models.initialise(module), GPT2 if kind == "gpt2" else LLAMA


@pytest.mark.parametrize(("kind", "targets", "options"), CASES)
def test_merged_weights_are_those_of_the_changed_module(
    kind: str, targets: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    module, config = made(kind)
    changed = adapter(tmp_path / "lora", module, targets, transposed=kind == "gpt2", **options)
    merged = merge(read(tmp_path, module, config), tmp_path / "lora")
    with torch.no_grad():
        for name, weight in changed.items():
            module.get_submodule(name).weight.copy_(weight)
    expected = read(tmp_path / "changed", module, config)
    assert list(merged.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        np.testing.assert_allclose(merged.tensors[name].read(), tensor.read(), atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("kind", "targets", "options"), CASES)
def test_a_lora_changes_a_model_file_as_it_changes_the_checkpoint_it_was_made_of(
    kind: str, targets: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    module, config = made(kind)
    adapter(tmp_path / "lora", module, targets, transposed=kind == "gpt2", **options)
    model = read(tmp_path, module, config)
    export(model, "c", tmp_path / "m.gguf", quant="f32")
    merged, expected = merge(read_canonical(tmp_path / "m.gguf"), tmp_path / "lora"), merge(model, tmp_path / "lora")
    for name, tensor in expected.tensors.items():
        np.testing.assert_allclose(merged.tensors[name].read(), tensor.read(), atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"peft_type": "IA3"}, "is no LoRA"), ({"r": 0}, "lacks r")],
)
def test_adapters_of_other_kinds_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    module, config = made("llama")
    adapter(tmp_path / "lora", module, CASES[1][1], **options)
    with pytest.raises(FileError, match=said):
        merge(read(tmp_path, module, config), tmp_path / "lora")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    module, config = made("llama")
    other, _ = made("gpt2")
    adapter(tmp_path / "lora", other, CASES[2][1], transposed=True)
    with pytest.raises(FileError, match="which the checkpoint does not have"):
        merge(read(tmp_path, module, config), tmp_path / "lora")
    wider = models.Decoder(models.NAMES, "halves", n_embd=64)
    adapter(tmp_path / "wide", wider, CASES[1][1])
    with pytest.raises(FileError, match="do not fit"):
        merge(read(tmp_path, module, config), tmp_path / "wide")
