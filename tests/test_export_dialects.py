"""Every dialect: a checkpoint of an independent PyTorch module, compiled, must give that module's logits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketlm.export import dialects
from pocketlm.export.canonical import CanonicalModel
from pocketlm.export.export import export
from pocketlm.runtime.hyper import read_hyper
from pocketlm.runtime.model_file import open_model
from pocketlm.runtime.numpy_executor import NumpyExecutor
from pocketlm.runtime.plan import make_plan

torch = pytest.importorskip("torch", reason="checkpoints are made with PyTorch")
models = pytest.importorskip("torch_models")


def read_canonical(path: Path, **options: Any) -> CanonicalModel:
    """The model without a tokenizer, which these tests do not need."""
    return dialects.read_canonical(path, tokenizer="none", **options)


IDS = [3, 14, 15, 9, 26, 5, 35, 58, 0, 60, 7, 7]


def logits_of(path: Path, ids: list[int], step: int = 0) -> np.ndarray:
    """The numpy executor's logits on a model file; with `step`, that many tokens at a time through the cache."""
    with open_model(path) as file:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        plan = make_plan(read_hyper(file.metadata, shapes["token_embd.weight"][0], path), shapes, path)
        executor = NumpyExecutor(plan, file.tensors, len(ids), 1)
        step = step or len(ids)
        parts = [executor.forward(np.array(ids[i : i + step]), rows="all") for i in range(0, len(ids), step)]
        executor.close()
    return np.concatenate(parts)


def onnx_logits_of(path: Path, ids: list[int], step: int = 0) -> np.ndarray:
    """onnxruntime's logits, the cache going from one call to the next."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the ONNX file")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs() if i.name.startswith("past")}
    names = [output.name for output in session.get_outputs()]
    parts, step = [], step or len(ids)
    for start in range(0, len(ids), step):
        now = np.array([ids[start : start + step]])
        mask = np.ones((1, start + now.shape[1]), np.int64)
        results = dict(zip(names, session.run(names, {"input_ids": now, "attention_mask": mask, **past}), strict=True))
        past = {name: results[name.replace("past_key_values", "present")] for name in past}
        parts.append(results["logits"][0])
    return np.concatenate(parts)


def check(module: Any, model: CanonicalModel, folder: Path, ids: list[int] = IDS) -> None:
    """What is written of `model`, in every container, computes what the PyTorch module does, with the cache and without."""
    with torch.no_grad():
        expected = module(torch.tensor(ids)).numpy()
    files = {"gguf": folder / "out.gguf", "fp16": folder / "out", "onnx": folder / "out.onnx"}
    for container, path in files.items():
        export(model, "test", path, container=container, quant="f16" if container == "fp16" else "f32", n_threads=1)
    for step in (0, 1):
        for logits in (logits_of(files["gguf"], ids, step), onnx_logits_of(files["onnx"], ids, step)):
            assert np.abs(logits - expected).max() < 1e-4
        half = logits_of(files["fp16"], ids, step)
        assert (half * expected).sum() / np.linalg.norm(half) / np.linalg.norm(expected) > 0.9999


def compiled(module: Any) -> dict[str, Any]:
    state = torch.compile(module).state_dict()
    assert all(name.startswith("_orig_mod.") for name in state)
    return state


def test_nanogpt(tmp_path: Path) -> None:
    module = models.initialise(models.GPT())
    args = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": 61, "bias": True, "dropout": 0.0}
    torch.save({"model": compiled(module), "model_args": args, "optimizer": {"state": {}}}, tmp_path / "ckpt.pt")
    model = read_canonical(tmp_path / "ckpt.pt")
    assert model.dialect == "nanoGPT"
    assert model.hyper.architecture == "gpt2"
    assert model.hyper.activation == "gelu_erf"
    assert "output.weight" not in model.tensors
    check(module, model, tmp_path)


def save(folder: Path, content: Any, name: str = "ckpt.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def hf_folder(folder: Path, module: Any, config: dict[str, Any]) -> Path:
    """A Hugging Face folder: config.json and model.safetensors."""
    safetensors = pytest.importorskip("safetensors.torch", reason="writes the checkpoint")
    safetensors.save_file(
        {name: t.contiguous().clone() for name, t in module.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32,
    "intermediate_size": 48, "rms_norm_eps": 1e-6, "rope_theta": 5000.0, "max_position_embeddings": 64, "hidden_act": "silu",
    "tie_word_embeddings": False, "vocab_size": 61,
}  # fmt: skip


def test_nanogpt_without_biases_gets_zeros(tmp_path: Path) -> None:
    module = models.initialise(models.GPT(bias=False, masks=False))
    model = read_canonical(save(tmp_path, {"model": compiled(module), "model_args": {"n_head": 4}}))
    assert model.tensors["blk.1.attn_qkv.bias"].read().tolist() == [0.0] * 96
    assert {"blk.1.attn_qkv.bias", "output_norm.bias"} <= model.added
    check(module, model, tmp_path)


def test_hugging_face_gpt2(tmp_path: Path) -> None:
    module = models.initialise(models.GPT(conv1d=True))
    config = {"model_type": "gpt2", "n_head": 4, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_ctx": 24}
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_canonical(tmp_path)
    assert (model.dialect, model.hyper.architecture, model.hyper.activation) == ("Hugging Face GPT-2", "gpt2", "gelu_tanh")
    check(module, model, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_hugging_face_llama(tmp_path: Path, tied: bool) -> None:
    module = models.initialise(models.Decoder(models.NAMES, "halves", theta=5000.0, eps=1e-6, tied=tied))
    model = read_canonical(hf_folder(tmp_path, module, {**LLAMA, "tie_word_embeddings": tied}))
    assert (model.dialect, model.hyper.architecture) == ("Hugging Face Llama", "llama")
    assert model.hyper.rope is not None
    assert model.hyper.rope.pairs == "interleaved"
    assert ("output.weight" in model.tensors) != tied
    check(module, model, tmp_path)


def test_hugging_face_llama_with_biases_and_its_own_head_width(tmp_path: Path) -> None:
    module = models.initialise(models.Decoder(models.NAMES, "halves", theta=5000.0, eps=1e-6, head_dim=12, qkv_bias=True))
    model = read_canonical(
        hf_folder(tmp_path, module, {**LLAMA, "model_type": "qwen2", "head_dim": 12, "tie_word_embeddings": True})
    )
    assert model.hyper.head_dim == 12
    check(module, model, tmp_path)


def scaled_frequencies(kind: str, n: int, theta: float, factor: float, original: int) -> tuple[Any, float]:
    """Rotary frequencies of each way to scale them, pair by pair from the papers' formulas; and YaRN's magnitude."""
    result, magnitude = [], 1.0

    def pair_of(turns: float) -> float:
        return n * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    for i in range(n // 2):
        plain = theta ** (-2 * i / n)
        if kind == "linear":
            result.append(plain / factor)
        elif kind == "llama3":  # low 1, high 4
            length = 2 * math.pi / plain
            smooth = (original / length - 1) / (4 - 1)
            middle = (1 - smooth) * plain / factor + smooth * plain
            result.append(plain if length < original / 4 else plain / factor if length > original else middle)
        else:
            low, high = max(math.floor(pair_of(32)), 0), min(math.ceil(pair_of(1)), n - 1)
            ramp = min(max((i - low) / max(high - low, 0.001), 0), 1)
            result.append(plain / factor * ramp + plain * (1 - ramp))
            magnitude = 0.1 * math.log(factor) + 1
    return torch.tensor(result, dtype=torch.float64), magnitude


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_scaled_rotary_positions(tmp_path: Path, kind: str) -> None:
    frequencies, magnitude = scaled_frequencies(kind, 16, 5000.0, 4.0, 32)
    module = models.initialise(
        models.Decoder(models.NAMES, "halves", n_head=2, n_kv_head=1, eps=1e-6, frequencies=frequencies, magnitude=magnitude)
    )
    scaling = {
        "rope_type": kind,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    config = {
        **LLAMA,
        "num_attention_heads": 2,
        "rope_scaling": scaling,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    model = read_canonical(hf_folder(tmp_path, module, config))
    assert ("rope_freqs.weight" in model.tensors) == (kind == "llama3")
    check(module, model, tmp_path, IDS * 8)


def test_meta_llama(tmp_path: Path) -> None:
    module = models.initialise(models.Decoder(models.META_NAMES, "neighbours", tied=False))
    args = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 61, "multiple_of": 16, "max_seq_len": 40}
    model = read_canonical(save(tmp_path, {"model": compiled(module), "model_args": args}))
    assert (model.dialect, model.hyper.architecture, model.hyper.n_ctx) == ("Meta Llama", "llama", 40)
    check(module, model, tmp_path)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_textbook_gpt(tmp_path: Path, qkv_bias: bool) -> None:
    module = models.initialise(models.TextbookGPT(qkv_bias=qkv_bias))
    model = read_canonical(save(tmp_path, {"model_state_dict": compiled(module), "cfg": {"n_heads": 4, "context_length": 24}}))
    assert (model.dialect, model.hyper.architecture, model.hyper.activation) == ("from-scratch GPT", "gpt2", "gelu_tanh")
    check(module, model, tmp_path)


def test_one_module_a_head(tmp_path: Path) -> None:
    module = models.initialise(models.LectureGPT())
    model = read_canonical(save(tmp_path, compiled(module)), overrides={"norm_eps": "1e-5", "activation": "relu"})
    assert (model.hyper.architecture, model.hyper.n_head) == ("pocketlm", 4)
    check(module, model, tmp_path)


SPELLINGS = [
    ("tok_emb", "layers", "attn", "ffn", ("norm1", "norm2", "norm")),
    ("embed", "blocks", "attention", "mlp", ("attn_norm", "ffn_norm", "norm_f")),
    ("embed_tokens", "h", "attn", "ffn", ("ln1", "ln2", "ln_f")),
    (
        "transformer.embed_tokens",
        "transformer.layers",
        "attention",
        "feed_forward",
        ("attention_norm", "ffn_norm", "final_norm"),
    ),
    ("token_embedding", "blocks", "self_attn", "ff", ("norm_1", "norm_2", "norm_out")),
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: "-".join(s[:4]))
def test_alibi_decoder_in_every_spelling(tmp_path: Path, spelling: tuple[Any, ...]) -> None:
    module = models.initialise(models.Decoder(models.spelled(*spelling), "alibi", n_head=8, n_kv_head=2, eps=1e-6))
    config = {"n_heads": 8, "max_seq_len": 64, "rms_norm_eps": 1e-6, "use_alibi": True}
    model = read_canonical(save(tmp_path, {"model": compiled(module), "config": config}))
    assert (model.hyper.architecture, model.hyper.position, model.hyper.n_kv_head) == ("refact", "alibi", 2)
    check(module, model, tmp_path)


def test_alibi_with_heads_that_are_no_power_of_two(tmp_path: Path) -> None:
    module = models.initialise(models.Decoder(models.spelled(*SPELLINGS[0]), "alibi", n_head=6, n_kv_head=3, n_embd=48))
    settings = {"n_head": "6", "n_ctx": "64", "norm_eps": "1e-5", "position": "alibi"}
    check(module, read_canonical(save(tmp_path, module.state_dict()), overrides=settings), tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"position": "none"}, {"position": "alibi", "max_bias": 4.0}, {"position": "alibi", "qkv_bias": True}],
    ids=["no positions", "flatter ALiBi", "ALiBi with biases"],
)
def test_mixes_that_no_architecture_describes_run_as_pocketlm(tmp_path: Path, options: dict[str, Any]) -> None:
    module = models.initialise(models.Decoder(models.spelled(*SPELLINGS[0]), **options))
    config = {
        "n_head": 4,
        "block_size": 64,
        "norm_eps": 1e-5,
        "position": options["position"],
        "alibi_max_bias": options.get("max_bias", 8),
    }
    model = read_canonical(save(tmp_path, {"model": module.state_dict(), "config": config}))
    assert model.hyper.architecture == "pocketlm"
    check(module, model, tmp_path)
