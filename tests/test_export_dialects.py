"""Every dialect: a checkpoint of an independent PyTorch module, compiled, must give that module's logits."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_checks import IDS, SPELLINGS, check, compiled, hf_folder, read_canonical, save

from pocketlm.errors import FileError
from pocketlm.export import dialects

torch = pytest.importorskip("torch", reason="checkpoints are made with PyTorch")
models = pytest.importorskip("torch_models")


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


LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48, "rms_norm_eps": 1e-6, "rope_theta": 5000.0, "max_position_embeddings": 64, "hidden_act": "silu",
    "tie_word_embeddings": False, "vocab_size": 61,
}  # fmt: skip


def test_nanogpt_without_biases_gets_zeros(tmp_path: Path) -> None:
    module = models.initialise(models.GPT(bias=False, masks=False))
    model = read_canonical(save(tmp_path, {"model": compiled(module), "model_args": {"n_head": 4}}))
    assert model.tensors["blk.1.attn_qkv.bias"].read().tolist() == [0.0] * 96
    assert {"blk.1.attn_qkv.bias", "output_norm.bias"} <= model.added
    check(module, model, tmp_path)


def test_mingpt(tmp_path: Path) -> None:
    """Masks, a head of its own, and the tanh formula."""
    module = models.initialise(models.GPT(tanh=True, tied=False))
    model = read_canonical(save(tmp_path, module.state_dict()), overrides={"n_head": "4"})
    assert (model.dialect, model.hyper.activation) == ("minGPT", "gelu_tanh")
    check(module, model, tmp_path)


@pytest.mark.parametrize(
    ("more", "activation"),
    [({}, "gelu_tanh"), ({"bias": True, "dropout": 0.0}, "gelu_erf"), ({"activation": "gelu"}, "gelu_erf")],
)
def test_build_nanogpt(tmp_path: Path, more: dict[str, Any], activation: str) -> None:
    module = models.initialise(models.GPT(masks=False, tanh=activation == "gelu_tanh"))
    config = {"block_size": 24, "vocab_size": 61, "n_layer": 2, "n_head": 4, "n_embd": 32, **more}
    model = read_canonical(save(tmp_path, {"model": module.state_dict(), "config": config, "step": 5, "val_loss": 3.0}))
    assert model.hyper.activation == activation
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


def test_two_sets_of_weights_are_told_apart(tmp_path: Path) -> None:
    module = models.initialise(models.Decoder(models.NAMES, "halves"))
    weights = module.state_dict()
    half = {name: tensor * 0.5 for name, tensor in weights.items()}
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "tie_word_embeddings": True}))
    torch.save({"model": weights, "ema": half}, tmp_path / "named.pt")
    torch.save({"raw": weights, "averaged": half}, tmp_path / "unnamed.pt")
    model = dialects.read_canonical(tmp_path / "named.pt", tokenizer="none")
    assert model.notes[0] == "these are the weights called model; --set weights=ema takes others"
    with pytest.raises(FileError, match="has several sets of weights: raw, averaged; choose one with --set weights=NAME"):
        dialects.read_canonical(tmp_path / "unnamed.pt", tokenizer="none")
    for file, name in (("named.pt", "ema"), ("unnamed.pt", "averaged")):
        chosen = dialects.read_canonical(tmp_path / file, tokenizer="none", overrides={"weights": name})
        whole, halved = (found.tensors["output_norm.weight"].read() for found in (model, chosen))
        np.testing.assert_array_equal(whole / 2, halved)


def test_a_module_of_transformers_that_was_saved_whole(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="makes the module")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    torch.save(module, tmp_path / "m.pt")
    found = dialects.read_canonical(tmp_path / "m.pt", tokenizer="none").tensors["token_embd.weight"].read()
    np.testing.assert_array_equal(found, module.model.embed_tokens.weight.detach().numpy())


def test_two_matrices_that_a_configuration_ties_stay_two(tmp_path: Path) -> None:
    """As transformers has it since version 5."""
    transformers = pytest.importorskip("transformers", reason="makes the module")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = dialects.read_canonical(tmp_path, tokenizer="none")
    np.testing.assert_array_equal(model.tensors["output.weight"].read(), theirs.lm_head.weight.detach().numpy())
    assert "but the file holds two: both are kept; --set tied=true leaves it out" in model.notes[0]
    tied = dialects.read_canonical(tmp_path, tokenizer="none", overrides={"tied": "true"})
    assert "output.weight" not in tied.tensors
    assert tied.notes[0].endswith("it was left out")


GPTQ = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights, config: config.update(head_dim=16), "its configuration says 4 heads of 16, the queries have 32 rows"),
        (
            lambda weights, config: weights.update({"model.norm.weight": weights["model.norm.weight"].to(torch.int8)}),
            r"model.norm.weight holds whole numbers \(int8\), so the weights are quantised",
        ),
        (
            lambda weights, config: (weights.update(q=torch.ones(2)), config.update(quantization_config=GPTQ)),
            r"its weights are quantised \(gptq\); export the checkpoint that it was made of",
        ),
    ],
)
def test_weights_that_are_not_what_they_seem_are_refused(tmp_path: Path, change: Any, said: str) -> None:
    weights = models.initialise(models.Decoder(models.NAMES, "halves")).state_dict()
    config: dict[str, Any] = {**LLAMA, "tie_word_embeddings": True}
    change(weights, config)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match=said):
        dialects.read_canonical(tmp_path, tokenizer="none")


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


@pytest.mark.parametrize("scale", ["head_dim", "n_embd"])
def test_one_module_a_head(scale: str, tmp_path: Path) -> None:
    """The first version of its code divides scores by the root of the model's width, later ones by that of a head's."""
    module = models.initialise(models.LectureGPT(divisor=32 if scale == "n_embd" else 0))
    path, settings = save(tmp_path, compiled(module)), {"norm_eps": "1e-5", "activation": "relu"}
    model = read_canonical(path, overrides=settings | ({"attention_scale": scale} if scale == "n_embd" else {}))
    assert ("--set attention_scale=n_embd" in " ".join(model.notes)) == (scale == "head_dim")
    assert (model.hyper.architecture, model.hyper.n_head) == ("pocketlm", 4)
    assert "compare an answer with --temp 0 with your own" in " ".join(model.notes)  # no sign says whose code it is
    check(module, model, tmp_path)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_the_scale_of_scores_changes_queries_alone_where_they_are_fused(qkv_bias: bool, tmp_path: Path) -> None:
    path = save(tmp_path, models.initialise(models.TextbookGPT(qkv_bias=qkv_bias)).state_dict())
    settings = {"n_head": "4", "activation": "gelu_erf"}
    by_head, by_width = (
        read_canonical(path, overrides=settings | {"attention_scale": scale}) for scale in ("head_dim", "n_embd")
    )
    for name, tensor in by_head.tensors.items():
        factors = np.ones(tensor.shape[0], np.float32)
        if "attn_qkv" in name:
            factors[: tensor.shape[0] // 3] = 0.5
        assert np.array_equal((tensor.read().T * factors).T, by_width.tensors[name].read())


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: "-".join(s[:4]))
def test_alibi_decoder_in_every_spelling(tmp_path: Path, spelling: tuple[Any, ...]) -> None:
    module = models.initialise(models.Decoder(models.spelled(*spelling), "alibi", n_head=8, n_kv_head=2, eps=1e-6))
    config = {"n_heads": 8, "max_seq_len": 64, "rms_norm_eps": 1e-6, "use_alibi": True}
    model = read_canonical(save(tmp_path, {"model": compiled(module), "config": config}))
    assert (model.hyper.architecture, model.hyper.position, model.hyper.n_kv_head) == ("refact", "alibi", 2)
    check(module, model, tmp_path)


def test_gate_and_up_are_told_apart_by_shape_where_matrices_are_numbered(tmp_path: Path) -> None:
    names = {**models.spelled(*SPELLINGS[0]), "gate": "ff.fc1", "up": "ff.fc2", "down": "ff.fc3"}
    module = models.initialise(models.Decoder(names, "alibi"))
    settings = {"n_head": "4", "n_ctx": "64", "norm_eps": "1e-5", "position": "alibi"}
    check(module, read_canonical(save(tmp_path, module.state_dict()), overrides=settings), tmp_path)


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


# ── what a configuration asks for that is not computed ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mamba"}, "model of type mamba"),
        ({"sliding_window": 32}, "sliding window of 32 positions; pocketlm does not; add --set n_ctx=32"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is None"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_local_experts": 4}, "num_local_experts = 4"),
        ({"tie_word_embeddings": False}, "is not tied"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)
def test_hugging_face_models_that_are_computed_otherwise_are_refused_by_name(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    module = models.Decoder(models.NAMES, "halves", tied=True)
    folder = hf_folder(tmp_path, module, {**LLAMA, "tie_word_embeddings": True, **change})
    with pytest.raises(FileError, match=re.escape(said)):
        read_canonical(folder)


# ── published sizes ──────────────────────────────────────────────────────────────────────────────────────────────────


def alibi(**sizes: int) -> tuple[Any, dict[str, Any]]:
    config = {"n_head": sizes["n_head"], "block_size": 1024, "norm_eps": 1e-5, "position": "alibi"}
    return models.Decoder(models.spelled(*SPELLINGS[0]), "alibi", **sizes), config


def gpt(**sizes: Any) -> tuple[Any, dict[str, Any]]:
    return models.GPT(masks=False, bias=sizes["n_layer"] == 12, **sizes), {"n_head": sizes["n_head"]}


@pytest.mark.parametrize(
    ("make", "sizes", "published", "with_positions"),
    [
        (alibi, {"n_embd": 256, "n_layer": 12, "n_head": 8, "n_kv_head": 2, "n_ff": 688, "n_vocab": 64000}, 24_697_088, True),
        (alibi, {"n_embd": 512, "n_layer": 12, "n_head": 8, "n_kv_head": 4, "n_ff": 1376, "n_vocab": 64000}, 67_600_000, True),
        (gpt, {"n_layer": 10, "n_head": 8, "n_embd": 512, "block_size": 1024, "vocab_size": 32000}, 47_850_000, False),
        (gpt, {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257}, 124_000_000, True),
        (gpt, {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 201}, 10_700_000, False),
    ],
)
def test_parameter_counts_are_the_published_ones(
    make: Any, sizes: dict[str, Any], published: int, with_positions: bool, tmp_path: Path
) -> None:
    with torch.device("meta"):  # shapes without memory
        module, config = make(**sizes)
    empty = {name: torch.empty(1).expand(tensor.shape) for name, tensor in module.state_dict().items()}
    empty.pop("lm_head.weight", None)  # tied; tensors without memory cannot show it
    model = dialects.read_canonical(save(tmp_path, {"model": empty, "config": config}), tokenizer="none")
    counted = {
        n: t for n, t in model.tensors.items() if n not in model.added and (with_positions or n != "position_embd.weight")
    }
    n_parameters = sum(math.prod(tensor.shape) for tensor in counted.values())
    if published % 1000:
        assert n_parameters == published
    else:  # published rounded
        assert abs(n_parameters - published) <= published * 0.004
