"""Checkpoints of nanochat, litGPT, minimind and GPT-Neo: what is exported gives the logits of their own forward."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agreement import compare
from checkpoint_checks import save
from home_made_checks import SIZES, check, in_onnx, logits_of, made, models
from llama_reference import LlamaReference
from tiny_models import TOKENS, vocabulary

import pocketlm
from pocketlm.errors import FileError, PocketlmError
from pocketlm.export.dialects import read_canonical
from pocketlm.export.export import export
from pocketlm.tokenizer.pretokenize import PRE_TOKENIZERS

ONLY_HERE = "stock llama.cpp does not know this architecture: the file runs in pocketlm only"

# ── nanochat ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_nanochat(folder: Path, module: Any) -> Path:
    state = {f"_orig_mod.{name}": tensor for name, tensor in module.state_dict().items()}
    (folder / "meta_000650.json").write_text(json.dumps({"step": 650, "model_config": module.args}))
    return save(folder, state, "model_000650.pt")


NANOCHATS: dict[str, dict[str, Any]] = {
    "October 2025": {},
    "December 2025: padded": {"padded": 64},
    "January 2026: lambdas": {"padded": 64, "since": "lambdas"},
    "January 2026: windows": {"padded": 64, "since": "lambdas", "pattern": "SSL", "n_layer": 5},
    "16 January: values": {"padded": 64, "since": "values", "pattern": "SL", "n_layer": 4},
    "3 March: capped": {"padded": 64, "since": "capped", "pattern": "SSL", "n_layer": 5},
    "9 March: tuned": {"padded": 64, "since": "tuned", "pattern": "SL", "seq": 256},
    "14 March: smear": {"padded": 64, "since": "smear", "pattern": "SSL", "n_layer": 4, "seq": 256, "n_kv_head": 4},
    "14 March: smear, windows of all": {"padded": 64, "since": "smear", "pattern": "SSSL", "n_layer": 5},
}


@pytest.mark.parametrize("generation", NANOCHATS)
def test_nanochat(tmp_path: Path, generation: str) -> None:
    options = NANOCHATS[generation]
    module = made.randomise(made.NanoChat(**options))
    path = save_nanochat(tmp_path, module)
    undecided = {"logit_softcap": "20" if module.age == 3 else "15"} if module.age in (2, 3) else {}
    if undecided:
        with pytest.raises(FileError, match=r"logit_softcap.*add --set logit_softcap=15\|20"):
            read_canonical(path, tokenizer="none")
    n = 3 * module.args["sequence_len"] // 4
    model, notes = check(module, path, n=n, overrides=undecided)
    if module.age < 5:
        in_onnx(module, model, tmp_path / "out.onnx")
    else:
        with pytest.raises(PocketlmError, match=r"looks at the token before each, .* export a GGUF"):
            in_onnx(module, model, tmp_path / "out.onnx")
    assert (model.dialect, model.hyper.architecture, model.hyper.n_vocab) == ("nanochat", "nanochat", 61)
    assert ONLY_HERE in notes


def test_a_softcap_for_a_model_without_one_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, made.MiniMind3(n_layer=1).state_dict(), "full_sft_64.pth")
    with pytest.raises(FileError, match=r"logit_softcap = 15.*does not compute that"):
        read_canonical(path, tokenizer="none", overrides={"logit_softcap": "15"})


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_a_token_knows_the_one_before_it_wherever_a_text_comes_from(tmp_path: Path, backend: str) -> None:
    """Cut back, in a fork, from a file, and after a part of it was dropped."""
    module = made.randomise(made.NanoChat(since="smear", n_embd=64, n_head=2, seq=512))
    path = save_nanochat(tmp_path, module)
    export(read_canonical(path, tokenizer="none"), path, tmp_path / "m.gguf", quant="f32", n_threads=1)
    ids = np.random.default_rng(0).integers(0, 61, 300).tolist()
    with pocketlm.load(tmp_path / "m.gguf", backend=backend, threads=1) as model:
        session = model.session()
        session.state.advance(ids)
        session.save(tmp_path / "a.state")
        for other in (session, session.fork(), model.session(load=tmp_path / "a.state")):
            for text in ([*ids, 5], [*ids[:200], 5], [*ids[:200], 7, 5], [8], [9]):
                found = other.state.advance(text)[0]
                np.testing.assert_allclose(found, model.logits(text)[-1], atol=0 if backend == "native" else 1e-4)
        session.state.advance(ids)
        shorter = ids[:20] + ids[120:]
        session.state.advance([*shorter, 1], shift=True)
        assert session.state.cache.ids[:201].tolist() == [*shorter, 1]


def test_a_nanochat_chats_in_its_own_words(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="writes the tokenizer")
    words = ("bos", "user_start", "user_end", "assistant_start", "assistant_end")
    markers = {f"<|{word}|>": 256 + i for i, word in enumerate(words)}
    pattern = PRE_TOKENIZERS["nanochat"][0]
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("rustbpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=markers)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    module = made.randomise(made.NanoChat(vocab=265, padded=320))
    path = save(tmp_path, module.state_dict(), "model_000001.pt")
    (tmp_path / "meta_000001.json").write_text(json.dumps({"model_config": module.args}))
    export(read_canonical(path), path, tmp_path / "chat.gguf", quant="f32", n_threads=1)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi, 123!"}]
    with pocketlm.load(tmp_path / "chat.gguf", backend="numpy") as model:
        ids = model.template.encode(messages, model.tokenizer)
        assert 260 in model.tokenizer.vocabulary.end_ids
    assert ids == [256, 257, *b"Be kind.\n\nHi, 123!", 258, 259]


@pytest.mark.parametrize("sign", ["tied", "code"])
def test_a_modded_nanogpt_is_not_taken_for_a_nanochat(sign: str, tmp_path: Path) -> None:
    """In autumn 2024 it had the same names, and other numbers: neither a normalised embedding nor, at first, capped logits."""
    state = made.NanoChat().state_dict()
    if sign == "tied":
        state["lm_head.weight"] = state["transformer.wte.weight"]
    path = save(tmp_path, {"step": 10, "model": state, **({"code": "import torch"} if sign == "code" else {})}, "state.pt")
    with pytest.raises(FileError, match=r"is a checkpoint of modded-nanogpt|have no place"):
        read_canonical(path, tokenizer="none", overrides={"n_head": "4", "n_ctx": "64"})


def test_a_nanochat_without_its_meta_file_asks_for_the_heads(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="--set n_head=8 --set n_ctx=1024"):
        read_canonical(save(tmp_path, made.NanoChat().state_dict(), "model_000650.pt"), tokenizer="none")

# ── litGPT ───────────────────────────────────────────────────────────────────────────────────────────────────────────

LITGPT: dict[str, tuple[dict[str, Any], str]] = {
    "Pythia": ({}, "gptneox"),
    "Pythia, grouped rows": ({"grouped": True}, "gptneox"),
    "phi": ({"shared": True, "n_kv_head": 4}, "phi2"),
    "StableLM 2 12B": ({"shared": True, "mlp": "LLaMAMLP", "bias": False}, "stablelm"),
    "Llama": ({"mlp": "LLaMAMLP", "norm": "RMSNorm", "parallel": False, "part": 1.0, "bias": False}, "llama"),
    "Llama, grouped rows": (
        {"mlp": "LLaMAMLP", "norm": "RMSNorm", "parallel": False, "part": 1.0, "bias": False, "grouped": True}, "llama",
    ),
    "Llama, positions divided": (
        {"mlp": "LLaMAMLP", "norm": "RMSNorm", "parallel": False, "part": 1.0, "bias": False, "ratio": 4}, "llama",
    ),
    "sequential LayerNorm": ({"parallel": False}, "pocketlm"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "architecture"), LITGPT.values(), ids=LITGPT)
def test_litgpt(tmp_path: Path, options: dict[str, Any], architecture: str) -> None:
    module = made.randomise(made.LitGPT(**options))
    save(tmp_path, {"model": module.state_dict()}, "lit_model.pth")
    (tmp_path / "model_config.yaml").write_text(module.yaml())
    model, notes = check(module, tmp_path / "lit_model.pth")
    in_onnx(module, model, tmp_path / "out.onnx")
    assert (model.hyper.architecture, model.hyper.n_ctx) == (architecture, 48)
    assert (ONLY_HERE in notes) == (architecture == "pocketlm")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scale_embeddings": "true"}, "scale_embeddings"), ({"norm_qk": "true"}, "norm_qk"),
        ({"rope_interleave": "true"}, "rope_interleave"), ({"rope_condense_ratio": "[4]"}, "rope.scaling.factor"),
        ({"rope_local_base_freq": "500.0"}, "rope_local_base_freq"), ({"norm_2": "false"}, "norm_2"),
        ({"rope_adjustments": "\n  factor: 8.0\n  low_freq_factor: 1.0"}, "rope_adjustments"),
        ({"rope_indices": "\n- 0\n- 1"}, "rope_indices"),
        ({"mlp_class_name": "LLaMAMoE", "n_expert": "8"}, "n_expert"),
    ],
)  # fmt: skip
def test_what_litgpt_can_and_pocketlm_cannot_is_refused_by_name(tmp_path: Path, change: dict[str, str], said: str) -> None:
    module = made.LitGPT()
    save(tmp_path, module.state_dict(), "lit_model.pth")
    text = module.yaml()
    for name, value in change.items():
        text = re.sub(rf"^{name}: .*\n", "", text, flags=re.MULTILINE) + f"{name}: {value}\n"
    (tmp_path / "model_config.yaml").write_text(text)
    with pytest.raises(FileError, match=said):
        read_canonical(tmp_path / "lit_model.pth", tokenizer="none")


# ── minimind and TinyStories ─────────────────────────────────────────────────────────────────────────────────────────


def test_minimind2(tmp_path: Path) -> None:
    sizes = {"n_layer": 2, "n_head": 8, "n_kv_head": 2, "n_embd": 64, "n_ff": 96, "n_vocab": 6400}
    module = models.initialise(models.Decoder(models.NAMES, "halves", theta=1e6, **sizes)).half().float()
    state = {**module.state_dict(), "lm_head.weight": module.state_dict()["model.embed_tokens.weight"]}
    model, _ = check(module, save(tmp_path, {k: t.half() for k, t in state.items()}, "full_sft_64.pth"), n=12)
    assert (model.dialect, model.hyper.architecture, model.hyper.n_head) == ("minimind", "llama", 8)


def test_minimind_3(tmp_path: Path) -> None:
    module = made.randomise(made.MiniMind3()).half().float()
    state = {**module.state_dict(), "lm_head.weight": module.state_dict()["model.embed_tokens.weight"]}
    model, _ = check(module, save(tmp_path, {k: t.half() for k, t in state.items()}, "full_sft_64.pth"), n=12)
    assert (model.dialect, model.hyper.architecture, model.hyper.n_head) == ("minimind 3", "qwen3", 4)


def test_queries_that_are_normalised_are_scaled_after_that(tmp_path: Path) -> None:
    path = save(tmp_path, made.randomise(made.MiniMind3()).state_dict(), "full_sft_64.pth")
    by_head, by_width = (
        read_canonical(path, overrides={"attention_scale": scale}, tokenizer="none") for scale in ("head_dim", "n_embd")
    )
    factor = np.float32((by_head.hyper.head_dim / by_head.hyper.n_embd) ** 0.5)
    for name, tensor in by_head.tensors.items():
        assert np.array_equal(tensor.read() * (factor if "attn_q_norm" in name else 1), by_width.tensors[name].read()), name


def test_minimind_3_with_experts_is_a_qwen3moe(tmp_path: Path) -> None:
    module = made.randomise(made.MiniMind3(n_experts=4)).half().float()
    path = save(tmp_path, {k: t.half() for k, t in module.state_dict().items()}, "full_sft_64_moe.pth")
    model, notes = check(module, path, n=12)
    assert (model.dialect, model.hyper.architecture) == ("minimind 3", "qwen3moe")
    assert model.hyper.settings["expert_used_count"] == 1
    assert not any("llama.cpp does not know" in note for note in notes)
    module.n_used = 3
    check(module, path, n=12, overrides={"n_experts_used": "3"})


@pytest.mark.parametrize("n_shared", [0, 1, 2])
def test_minimind2_with_experts_is_a_granitemoe(tmp_path: Path, n_shared: int) -> None:
    """Whose factors are all 1; layers that every token shares are one wide one there."""
    module = made.randomise(made.MiniMind3(norms=False, n_experts=4, n_used=2, n_shared=n_shared)).half().float()
    path = save(tmp_path, {k: t.half() for k, t in module.state_dict().items()}, "full_sft_64_moe.pth")
    model, notes = check(module, path, n=12)
    assert (model.dialect, model.hyper.architecture) == ("minimind", "granitemoe")
    assert (model.hyper.settings["expert_count"], model.hyper.settings["expert_used_count"]) == (4, 2)
    assert not any("llama.cpp does not know" in note for note in notes)
    ids = np.random.default_rng(1).integers(0, 256, 30)
    expected = logits_of(module, ids, kept=False)
    words = vocabulary([*TOKENS, *(f"word {i}" for i in range(6400 - len(TOKENS)))])  # llama.cpp wants some
    export(replace(model, metadata=words), path, tmp_path / "words.gguf", quant="f32", n_threads=1)
    with LlamaReference(tmp_path / "words.gguf") as llama:
        assert compare(expected, llama.logits(ids)).worst_cosine >= 0.9999


def test_a_minimind_with_its_configuration_beside_it(tmp_path: Path) -> None:
    """As its authors publish it: their own model type, and experts named there whether there are some or not."""
    module = made.randomise(made.MiniMind3(n_experts=4, n_used=2))
    save(tmp_path, module.state_dict(), "pytorch_model.bin")
    said = {
        "model_type": "minimind", "architectures": ["MiniMindForCausalLM"], "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "tie_word_embeddings": True, "use_moe": True, "num_experts": 4, "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(said))
    model, _ = check(module, tmp_path, n=12)
    assert model.hyper.settings["expert_used_count"] == 2
    (tmp_path / "config.json").write_text(json.dumps({**said, "norm_topk_prob": False}))
    with pytest.raises(FileError, match="weighs experts by something else"):
        read_canonical(tmp_path, tokenizer="none")


def test_minimind_1(tmp_path: Path) -> None:
    module = models.initialise(models.Decoder(models.META_NAMES, "neighbours", **{**SIZES, "n_vocab": 6400}))
    path = save(tmp_path, module.state_dict(), "pretrain_32.pth")
    with pytest.raises(FileError, match="--set n_head=8 --set n_ctx=1024"):
        read_canonical(path, tokenizer="none")
    check(module, path, overrides={"n_head": "4", "n_ctx": "64"})


def test_tinystories_looks_through_its_windows(tmp_path: Path) -> None:
    module = made.randomise(made.GPTNeo())
    save(tmp_path, module.state_dict(), "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(module.config))
    model, notes = check(module, tmp_path / "pytorch_model.bin", n=60)
    in_onnx(module, model, tmp_path / "out.onnx")
    assert (model.dialect, model.hyper.architecture) == ("GPT-Neo", "gptneo")
    assert ONLY_HERE in notes
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileError, match="--set n_head"):
        read_canonical(tmp_path / "pytorch_model.bin", tokenizer="none")


@pytest.mark.parametrize(
    "change",
    [
        {"attention_types": [[["global", "local"], 10**12]]}, {"attention_types": [[[], 3], 5]}, {"attention_types": "local"},
        {"attention_layers": ["local", "sideways", "local", "local"]}, {"window_size": None}, {"window_size": "8"},
    ],
    ids=str,
)  # fmt: skip
def test_layers_that_a_gpt_neos_configuration_does_not_name_are_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    module = made.GPTNeo()
    save(tmp_path, module.state_dict(), "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(module.config | change))
    with pytest.raises(FileError, match=r"nothing says (which|how).*; put its config.json beside it"):
        read_canonical(tmp_path / "pytorch_model.bin", tokenizer="none")
