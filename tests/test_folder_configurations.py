"""Folders as others than transformers 5 write them: experts in one tensor, configurations that leave things out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_reference import LlamaReference

import pocketlm
from pocketlm.errors import FileError
from pocketlm.export.dialects import read_canonical
from pocketlm.export.export import export

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
families = pytest.importorskip("test_families_transformers")
MODELS, Row, logits_of, saved = families.MODELS, families.Row, families.logits_of, families.saved


@pytest.mark.parametrize("name", ["mixtral", "qwen2moe", "granitemoeshared", "qwen3moe", "olmoe"])
def test_experts_in_one_tensor_as_transformers_has_them_in_memory_are_the_same(name: str, tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    saved(MODELS[name], tmp_path)
    apart = read_canonical(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    state = model.state_dict()
    assert len([name for name in state if name.endswith("experts.gate_up_proj")]) == 3
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    fused = read_canonical(tmp_path)
    assert fused.hyper == apart.hyper
    assert fused.tensors.keys() == apart.tensors.keys()
    for role, tensor in apart.tensors.items():
        np.testing.assert_array_equal(fused.tensors[role].read(), tensor.read())


@pytest.mark.parametrize(
    ("name", "left_out", "said"),
    [
        ("gemma2", ("query_pre_attn_scalar",), {}),
        ("gemma3", ("query_pre_attn_scalar",), {}),
        ("gemma2", ("hidden_activation",), {"hidden_act": "gelu"}),
        ("gemma2", ("hidden_activation",), {"hidden_act": "relu"}),
        ("gemma", ("hidden_act",), {}),
        ("gemma", (), {"hidden_act": "gelu"}),
        ("gemma", (), {"hidden_act": "silu"}),
        ("gemma", (), {"hidden_act": "relu"}),
        ("gemma", ("tie_word_embeddings",), {}),
        ("mixtral", ("rope_parameters",), {}),
        ("smollm3", ("rope_parameters",), {}),
        ("qwen3", ("use_sliding_window", "layer_types"), {"sliding_window": 8}),
        ("qwen2", ("use_sliding_window", "layer_types"), {"sliding_window": 8}),
        ("qwen2", ("layer_types", "max_window_layers"), {"use_sliding_window": True, "sliding_window": 8}),
        ("gemma2", (), {"sliding_window_size": 4096}),  # which the published ones of 9B and 27B have
        ("granite", ("rope_parameters",), {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        ("hunyuan-dense", (), {"use_qk_norm": True}),
    ],
)  # fmt: skip
def test_what_a_configuration_leaves_out_is_what_transformers_does_then(
    name: str, left_out: tuple[str, ...], said: dict[str, Any], tmp_path: Path
) -> None:
    ids, _ = saved(MODELS[name], tmp_path)
    config = {**json.loads((tmp_path / "config.json").read_text()), **said}
    assert set(left_out) <= config.keys() | {"use_sliding_window"}
    (tmp_path / "config.json").write_text(json.dumps({key: v for key, v in config.items() if key not in left_out}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    export(read_canonical(tmp_path), tmp_path, tmp_path / "model.gguf", quant="f32")
    with pocketlm.load(tmp_path / "model.gguf", backend="numpy", threads=2) as model:
        np.testing.assert_allclose(model.logits(ids), logits_of(theirs.eval(), ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("said", [{}, {"rope_theta": 500.0}])
def test_a_llama_turns_whole_heads_whatever_its_configuration_says(said: dict[str, Any], tmp_path: Path) -> None:
    ids, _ = saved(Row("Llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**config, **said, "partial_rotary_factor": 0.5}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    model = read_canonical(tmp_path)
    assert model.hyper.rope.n_dims == model.hyper.head_dim
    export(model, tmp_path, tmp_path / "model.gguf", quant="f32")
    with pocketlm.load(tmp_path / "model.gguf", backend="numpy", threads=2) as opened:
        np.testing.assert_allclose(opened.logits(ids), logits_of(theirs.eval(), ids), atol=1e-5, rtol=0)
    assert read_canonical(tmp_path, overrides={"rope_part": "0.5"}).hyper.rope.n_dims == model.hyper.head_dim // 2


@pytest.mark.parametrize("name", ["qwen3moe", "mixtral"])
def test_a_window_that_nothing_places_is_no_model_without_one(name: str, tmp_path: Path) -> None:
    """Older configurations say its size, and their code knew the layers."""
    saved(MODELS[name], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps({**config, "use_sliding_window": True, "sliding_window": 8}))
    with pytest.raises(FileError, match=r"sliding window of 8 positions.*add --set n_ctx=8"):
        read_canonical(tmp_path)
    assert read_canonical(tmp_path, overrides={"n_ctx": "8"}).hyper.n_ctx == 8


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.5] * 8, "long_factor": [2 + i / 4 for i in range(8)]}
ORIGINAL = {"original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("scaling", "computed"),
    [
        ({"rope_type": "linear", "factor": 4.0}, ("gemma3", "olmo3")),
        ({"rope_type": "yarn", "factor": 4.0, **ORIGINAL}, ("gemma3", "olmo3")),
        ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7, **ORIGINAL}, ("olmo3",)),
        ({**LLAMA3, **ORIGINAL}, ()), ({**LONGROPE, **ORIGINAL}, ()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["gemma3", "olmo3"])
def test_layers_with_a_window_are_not_scaled(
    name: str, scaling: dict[str, Any], computed: tuple[str, ...], tmp_path: Path
) -> None:
    theta = 5e5 if name == "olmo3" else 1e6
    local = {"rope_theta": 5e5, "rope_type": "default"}
    rope = {"full_attention": {"rope_theta": theta, **scaling}, "sliding_attention": local}
    row = Row(MODELS[name].config, {**MODELS[name].options, "rope_parameters": rope})
    ids, expected = saved(row, tmp_path)
    if name not in computed:
        with pytest.raises(FileError, match="but not where it has windows"):
            read_canonical(tmp_path)
        return
    export(read_canonical(tmp_path), "m", tmp_path / "m.gguf", quant="f32")
    with pocketlm.load(tmp_path / "m.gguf", backend="numpy") as loaded:
        np.testing.assert_allclose(loaded.logits(ids), expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    with LlamaReference(tmp_path / "m.gguf") as llama:
        np.testing.assert_allclose(llama.logits(ids), expected, atol=2e-2 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("qwen2", {"model_type": ["qwen2"]}, "is a model of type"),
        ("qwen2", {"model_type": {"a": 1}}, "is a model of type"),
        ("lfm2", {"layer_types": 1}, "correct layer_types"),
        ("olmo3", {"rope_parameters": None, "rope_local_base_freq": [1.0]}, "rope.freq_base_swa should be a number"),
        ("gemma3", {"query_pre_attn_scalar": 10**400}, "query_pre_attn_scalar is 1000"),
        ("gemma3", {"query_pre_attn_scalar": "x"}, "query_pre_attn_scalar is x, expected a number above 0"),
        ("gemma3", {"sliding_window": 10**400}, "attention.sliding_window is 1000"),
    ],
)  # fmt: skip
def test_an_absurd_configuration_is_one_line(name: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    families.check_refused(MODELS[name], change, said, tmp_path)
