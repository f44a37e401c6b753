"""Published architectures: a folder that transformers saves, exported, gives transformers' logits; in llama.cpp, too.

A row of MODELS is a configuration with options that change what is computed; the weights are random. The texts are longer than
the windows and, where rotary positions are scaled, longer than the context that the model was first trained for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agreement import compare
from families import N_VOCAB
from llama_reference import LlamaReference
from tiny_models import vocabulary

import pocketlm
from pocketlm.errors import FileError, PocketlmError
from pocketlm.export.checkpoint import Checkpoint
from pocketlm.export.dialects import read_canonical
from pocketlm.export.export import export
from pocketlm.tokenizer import from_metadata
from pocketlm.tokenizer.huggingface_writer import to_tokenizer_json

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
rounded_attention = pytest.importorskip("rounded_attention")
rounded_numbers = pytest.importorskip("rounded_numbers")


@dataclass(frozen=True)
class Row:
    """`config`: the class of transformers' configuration, without "Config". `llama_cpp`: whether it computes the same."""

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    n: int = 48  # tokens of the text
    llama_cpp: bool = True
    seed: int = 0  # of the weights; routers whose scores lie near each other choose by the last bits, which is another choice


SIZES = {
    "vocab_size": N_VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5e5}
LONGROPE = {
    "original_max_position_embeddings": 256, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 256,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
    },
}  # fmt: skip
FULL, LOCAL = "full_attention", "sliding_attention"
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}
GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 0.5}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "tie_word_embeddings": False}
GPT_OSS = {
    "num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 24, "sliding_window": 8, "tie_word_embeddings": False,
}
MODELS = {
    "mixtral": Row(
        "Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 24, "tie_word_embeddings": False},
    ),
    "mixtral, yarn, one of three": Row(
        "Mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "rope_parameters": YARN, "tie_word_embeddings": True,
         "head_dim": 16},
    ),
    "qwen2moe": Row("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 80}),
    "qwen2moe, yarn, no biases": Row(
        "Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 48, "rope_parameters": YARN, "qkv_bias": False},
    ),
    "granitemoe": Row("GraniteMoe", {**GRANITE, "num_local_experts": 6, "num_experts_per_tok": 3}),
    "granitemoe, yarn, own head": Row(
        "GraniteMoe",
        {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 4, "rope_parameters": YARN, "tie_word_embeddings": False},
    ),
    "granitemoeshared": Row(
        "GraniteMoeShared", {**GRANITE, "num_local_experts": 6, "num_experts_per_tok": 2, "shared_intermediate_size": 40},
    ),
    "qwen3moe": Row("Qwen3Moe", {**EXPERTS, "head_dim": 24, "norm_topk_prob": True}),
    "qwen3moe, yarn, biases": Row(
        "Qwen3Moe", {**EXPERTS, "norm_topk_prob": True, "rope_parameters": YARN, "attention_bias": True}, llama_cpp=False,
    ),
    "gpt-oss": Row("GptOss", {**GPT_OSS, "rope_parameters": {**YARN, "truncate": True}}),
    "gpt-oss, the ramp not at whole pairs": Row(
        "GptOss", {**GPT_OSS, "rope_parameters": {**YARN, "truncate": False}}, llama_cpp=False,
    ),
    "olmoe": Row("Olmoe", {"num_key_value_heads": 4, "num_experts": 6, "num_experts_per_tok": 3}),
    "olmoe, fewer keys": Row("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3}, llama_cpp=False, seed=1),
    "qwen2": Row("Qwen2"),
    "qwen2, yarn, own head": Row("Qwen2", {"rope_parameters": YARN, "tie_word_embeddings": False}),
    "qwen3": Row("Qwen3", {"head_dim": 24}),
    "qwen3, yarn, a factor below 1": Row("Qwen3", {"head_dim": 16, "rope_parameters": {**YARN, "factor": 0.5}}),
    "qwen3, yarn, biases": Row("Qwen3", {"head_dim": 16, "rope_parameters": YARN, "attention_bias": True}, llama_cpp=False),
    "gemma3": Row("Gemma3Text", GEMMA | {"num_hidden_layers": 7, "sliding_window": 8}),
    "gemma3, linear, capped logits, scores divided by something else": Row(
        "Gemma3Text",
        {**GEMMA, "num_hidden_layers": 7, "sliding_window": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 50,
         "rope_parameters": {
             "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
             "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
         }},
    ),
    "phi3": Row("Phi3"),
    "phi3, longrope, short": Row("Phi3", LONGROPE, 30),
    "phi3, longrope, long": Row("Phi3", LONGROPE | {"max_position_embeddings": 512}, 300),
    "phi3, window": Row("Phi3", {"sliding_window": 8}, llama_cpp=False),  # llama.cpp reads it and computes without
    "smollm3": Row("SmolLM3", {"num_hidden_layers": 5}),
    "smollm3, yarn, biases": Row(
        "SmolLM3", {"num_hidden_layers": 5, "rope_parameters": YARN, "attention_bias": True, "mlp_bias": True}, llama_cpp=False,
    ),
    "granite": Row("Granite", GRANITE),
    "granite, yarn, biases": Row("Granite", {**GRANITE, "rope_parameters": YARN, "attention_bias": True, "mlp_bias": True}),
    "hunyuan-dense": Row("HunYuanDenseV1", {"head_dim": 24}),
    "hunyuan-dense, stretched, own head": Row(
        "HunYuanDenseV1",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0},
         "tie_word_embeddings": False, "head_dim": 16},
    ),
    "gemma": Row("Gemma", GEMMA),
    "gemma2": Row(
        "Gemma2", {**GEMMA, "sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0},
    ),
    "gemma2, scores divided by something else": Row("Gemma2", GEMMA | {"sliding_window": 8, "query_pre_attn_scalar": 50}),
    "gemma2, no caps": Row(
        "Gemma2", {**GEMMA, "sliding_window": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None},
        llama_cpp=False,
    ),
    "phi3, wide heads": Row("Phi3", {"head_dim": 24}, llama_cpp=False),
    "lfm2": Row("Lfm2", {"layer_types": ["conv", "conv", FULL, "conv", FULL], "num_hidden_layers": 5}),
    "lfm2, own head, longer convolutions": Row(
        "Lfm2",
        {"layer_types": ["conv", FULL, "conv"], "conv_L_cache": 5, "tie_word_embeddings": False,
         "block_auto_adjust_ff_dim": False},
    ),
    "olmo2": Row("Olmo2"),
    "olmo2, yarn": Row("Olmo2", {"rope_parameters": YARN}),
    "olmo3": Row(
        "Olmo3",
        {"num_hidden_layers": 5, "sliding_window": 8, "rope_parameters": {
            "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        }},
    ),
}  # fmt: skip


def check_refused(row: Row, change: dict[str, Any], said: str, folder: Path) -> None:
    """With this in its configuration it is refused in one line."""
    saved(row, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(FileError, match=said) as error:
        read_canonical(folder)
    assert "\n" not in str(error.value)


def saved(row: Row, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Save a random model; the ids of a text and its logits."""
    config = getattr(transformers, f"{row.config}Config")(**{**SIZES, **row.options})
    torch.manual_seed(row.seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # as they are made, norms and biases do nothing
            spread = 0.2 if parameter.ndim == 1 else 0.1 if "embed" in name else 0.5 / parameter.shape[-1] ** 0.5
            centre = parameter.mean().round() if parameter.ndim == 1 else 0
            parameter.copy_(centre + spread * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    metadata = vocabulary()
    (folder / "tokenizer.json").write_text(json.dumps(to_tokenizer_json(from_metadata(metadata, "m"), N_VOCAB, "m")[0]))
    ids = np.random.default_rng(1).integers(0, 256, row.n)
    return ids, logits_of(model, ids)


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor(ids)[None]).logits[0].numpy()


def rounded_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """With keys and values as the native executor's cache keeps them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rounded_attention.round_keys_and_values(model)
    return logits_of(model, ids)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_transformers(name: str, tmp_path: Path) -> None:
    check_logits(MODELS[name], tmp_path)


def check_logits(row: Row, tmp_path: Path) -> None:
    ids, expected = saved(row, tmp_path / "folder")
    path = tmp_path / "model.gguf"
    export(read_canonical(tmp_path / "folder"), "folder", path, quant="f32")
    assert np.ptp(expected, axis=1).min() > 0.5  # they say something
    native = "native", rounded_numbers.NATIVE, rounded_logits(tmp_path / "folder", ids)
    for backend, limit, same in (("numpy", 1e-5, expected), native):
        with pocketlm.load(path, backend=backend, threads=2) as model:
            np.testing.assert_allclose(model.logits(ids), same, atol=limit, rtol=0)
            executor = model.executor
            executor.cache.truncate(0)
            one_by_one = np.concatenate([executor.forward(ids[i : i + 1]).copy() for i in range(len(ids))])
            np.testing.assert_allclose(one_by_one, same, atol=limit, rtol=0)
    if row.llama_cpp:
        with LlamaReference(path, n_ctx=row.options.get("max_position_embeddings", SIZES["max_position_embeddings"])) as llama:
            assert compare(expected, llama.logits(ids)).worst_cosine >= 0.9999


def older(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as transformers wrote it before version 5: rotary positions in keys of the model's own."""
    config = dict(config)
    said = config.pop("rope_parameters")
    if "full_attention" in said:
        config["rope_local_base_freq"] = said["sliding_attention"]["rope_theta"]
        said = said["full_attention"]
        config["sliding_window_pattern"] = {"gemma3_text": 6}.get(config["model_type"], 4)
        del config["layer_types"]
    scaling = {name: value for name, value in said.items() if name not in ("rope_theta", "partial_rotary_factor")}
    config["rope_theta"] = said["rope_theta"]
    config["partial_rotary_factor"] = said.get("partial_rotary_factor")
    config["rope_scaling"] = scaling if scaling["rope_type"] != "default" else None
    return config


@pytest.mark.parametrize("name", [name for name in MODELS if "long" in name or "yarn" in name or name in ("gemma3", "gemma2")])
def test_older_configurations_mean_the_same(name: str, tmp_path: Path) -> None:
    saved(MODELS[name], tmp_path)
    new, file = read_canonical(tmp_path), tmp_path / "config.json"
    file.write_text(json.dumps(older(json.loads(file.read_text()))))
    old = read_canonical(tmp_path)
    assert old.hyper == new.hyper
    for role, tensor in new.tensors.items():
        np.testing.assert_array_equal(old.tensors[role].read(), tensor.read())


def test_what_a_configuration_leaves_out_is_what_transformers_takes(tmp_path: Path) -> None:
    saved(replace(MODELS["olmo3"], options={"num_hidden_layers": 5}), tmp_path)
    with_all, file = read_canonical(tmp_path), tmp_path / "config.json"
    left_out = ("rope_parameters", "sliding_window")
    file.write_text(json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name not in left_out}))
    assert read_canonical(tmp_path).hyper == with_all.hyper
    assert with_all.hyper.rope.theta == 5e5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("phi3, window", "stock llama.cpp attends to everything where this model looks at 8 positions"),
        ("phi3, wide heads", "stock llama.cpp does not know phi3 with 4 heads of 24 in a width of 64"),
    ],
)
def test_the_receipt_says_what_llama_cpp_computes_otherwise(name: str, said: str, tmp_path: Path) -> None:
    saved(MODELS[name], tmp_path / "folder")
    receipt = export(read_canonical(tmp_path / "folder"), "folder", tmp_path / "model.gguf", quant="f32")
    assert any(said in note for note in receipt.notes)


WRITTEN = ("qwen", "mixtral", "olmoe", "granite")
EACH = ["qwen3", "gemma3", "phi3, longrope, long", "smollm3", "granite", "gemma2", "olmo3"]


@pytest.mark.parametrize("name", EACH)
def test_onnx_and_fp16_bin_say_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="the package onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    ids, expected = saved(MODELS[name], tmp_path / "folder")
    model = read_canonical(tmp_path / "folder")
    export(model, "folder", tmp_path / "model.onnx", container="onnx", quant="f32")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    names, found = [entry.name for entry in session.get_inputs()[2:]], []
    cache = [np.zeros((1, model.hyper.n_kv_head, 0, model.hyper.head_dim), np.float32)] * len(names)
    for start, end in ((0, 20), (20, 21), (21, len(ids))):
        given = {"input_ids": ids[None, start:end], "attention_mask": np.ones((1, end), np.int64)}
        logits, *cache = session.run(None, {**given, **dict(zip(names, cache, strict=True))})
        found.append(logits[0])
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    export(model, "folder", tmp_path / "bin", container="fp16", quant="f16")
    with pocketlm.load(tmp_path / "bin", backend="numpy") as loaded:
        assert compare(expected, loaded.logits(ids)).worst_cosine >= 0.999


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        *(("gemma3", {"layer_types": kinds}, "sliding windows in other") for kinds in ([LOCAL], ["linear_attention"] * 7)),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"sliding_window": "wide"}, "gemma3.attention.sliding_window"),
        ("gemma3", {"rope_parameters": {FULL: {"rope_theta": 1e6}, LOCAL: {"rope_theta": 1e4, "rope_type": "yarn"}}}, "yarn"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1]}, "rotary positions in other layers"),
        ("smollm3", {"no_rope_layer_interval": 2, "no_rope_layers": None}, "rotary positions in other layers"),
        ("qwen2moe", {"layer_types": [LOCAL] * 3, "sliding_window": 8, "use_sliding_window": True}, "sliding windows"),
        ("qwen3", {"num_experts": 8}, "num_experts"),
        ("hunyuan-dense", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "by dynamic"),
        ("hunyuan-dense", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": "x"}}, "rope_scaling.alpha"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("qwen3moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen3moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3moe", {"num_experts_per_tok": 9}, "more than the 6 experts"),
        ("qwen2moe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("qwen2moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen2moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen2moe", {"shared_expert_intermediate_size": 40}, "expected 40x64"),
        ("mixtral", {"sliding_window": 8}, "sliding window of 8 positions"),
        ("mixtral", {"num_local_experts": 5}, "expected 5x64"),
        ("mixtral", {"num_experts_per_tok": None}, "llama.expert_used_count is missing"),
        ("mixtral", {"hidden_act": "gelu_quick"}, "hidden_act = gelu_quick"),
        ("granitemoeshared", {"shared_intermediate_size": 0}, "ffn_down_shexp.weight is not part"),
        ("granitemoe", {"logits_scaling": 0}, "granitemoe.logit_scale"),
        ("gpt-oss", {"rope_parameters": None}, "nothing of rotary positions"),
        ("gpt-oss", {"swiglu_limit": 9.0}, "swiglu_limit = 9.0"),
        ("granite", {"logits_scaling": 0}, "granite.logit_scale"),
        ("lfm2", {"conv_bias": True}, "conv_bias"),
        ("qwen3", {"num_hidden_layers": 4, "layer_types": None}, "has 3 layers where its configuration says 4"),
        ("qwen2moe", {"num_hidden_layers": 2, "layer_types": None}, "has 3 layers where its configuration says 2"),
        ("lfm2", {"layer_types": ["conv", FULL, "conv", "conv", FULL]}, "convolutions in other layers"),
        ("phi3, longrope, long", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "no short_factor of 8"),
    ],
)  # fmt: skip
def test_what_the_architecture_does_not_compute_is_refused_by_name(name: str, change: Any, said: str, tmp_path: Path) -> None:
    check_refused(MODELS[name], change, said, tmp_path)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(WRITTEN)])
def test_a_folder_for_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    ids, expected = saved(MODELS[name], tmp_path / "folder")
    export(read_canonical(tmp_path / "folder"), "folder", tmp_path / "again", container="huggingface", quant="f32")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(tmp_path / "again", dtype="float32", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    found = logits_of(model.eval(), ids)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    if "qwen2" not in name or "moe" in name:  # a dense Qwen2 is written as a Llama with biases
        first, again = (read_canonical(tmp_path / folder) for folder in ("folder", "again"))
        assert again.hyper.architecture == first.hyper.architecture
        assert again.tensors.keys() == first.tensors.keys()


@pytest.mark.parametrize("name", [name for name in EACH if not name.startswith(WRITTEN)])
def test_a_folder_for_transformers_is_made_of_what_its_classes_compute_only(name: str, tmp_path: Path) -> None:
    """Written as a Llama these models would say something else."""
    saved(MODELS[name], tmp_path / "folder")
    model = read_canonical(tmp_path / "folder")
    with pytest.raises(FileError, match=f"the layers of {model.hyper.architecture}"):
        export(model, "folder", tmp_path / "again", container="huggingface", quant="f32")


@pytest.mark.parametrize("container", ["onnx", "fp16"])
def test_experts_are_refused_by_containers_that_would_compute_them_all(container: str, tmp_path: Path) -> None:
    saved(MODELS["olmoe"], tmp_path / "folder")
    with pytest.raises(FileError, match=f"is a mixture of experts, which {container} does not hold") as error:
        export(read_canonical(tmp_path / "folder"), "folder", tmp_path / "out", container=container)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_short_convolutions_are_refused_by_an_onnx_graph(tmp_path: Path) -> None:
    saved(MODELS["lfm2"], tmp_path / "folder")
    with pytest.raises(PocketlmError, match="has short convolutions") as error:
        export(read_canonical(tmp_path / "folder"), "folder", tmp_path / "model.onnx", container="onnx", quant="f32")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("name", [*EACH, "qwen3moe", "olmoe", "lfm2", "mixtral", "qwen2moe", "granitemoeshared"])
def test_a_file_exported_again_is_the_same_model(name: str, tmp_path: Path) -> None:
    saved(MODELS[name], tmp_path / "folder")
    model = read_canonical(tmp_path / "folder")
    export(model, "folder", tmp_path / "model.gguf", quant="f32")
    once = read_canonical(tmp_path / "model.gguf")
    export(once, "model.gguf", tmp_path / "again.gguf", quant="f32")
    assert read_canonical(tmp_path / "again.gguf").hyper == once.hyper
    assert once.tensors.keys() == model.tensors.keys()
    assert once.added == model.added


@pytest.mark.parametrize("name", ["qwen3", "smollm3", "granite"])
def test_a_change_to_a_file_is_the_same_change_to_its_folder(name: str, tmp_path: Path) -> None:
    """As a LoRA makes it: rows of queries are in the order of the folder, whatever the file's is."""
    saved(MODELS[name], tmp_path / "folder")
    export(read_canonical(tmp_path / "folder"), "folder", tmp_path / "model.gguf", quant="f32")

    def change(checkpoint: Checkpoint) -> Checkpoint:
        ends = ("layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight")
        at = next(name for name in checkpoint.tensors if name.endswith(ends))
        old = checkpoint.tensors[at]
        rows = np.arange(old.shape[0], dtype=np.float32)[:, None]
        return replace(checkpoint, tensors={**checkpoint.tensors, at: replace(old, read=lambda: old.read() + rows)})

    models = [read_canonical(tmp_path / where, change=change) for where in ("folder", "model.gguf")]
    folder, file = (model.tensors["blk.0.attn_q.weight"].read() for model in models)
    np.testing.assert_array_equal(folder, file)
