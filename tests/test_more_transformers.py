"""Random models of transformers' older families, exported: the logits are transformers' own, and llama.cpp reads the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agreement import compare
from llama_reference import LlamaReference

import pocketlm
from pocketlm.errors import FileError
from pocketlm.export.dialects import read_canonical
from pocketlm.export.export import export

torch = pytest.importorskip("torch", reason="transformers runs in PyTorch")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
attention = pytest.importorskip("rounded_attention")
numbers = pytest.importorskip("rounded_numbers")

LIMIT = 1e-3
N_VOCAB, N = 61, 40
SIZES: dict[str, Any] = {
    "vocab_size": N_VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
BLOOM = {"vocab_size": N_VOCAB, "hidden_size": 64, "n_layer": 3, "n_head": 4, "seq_length": 64, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
MPT = {"vocab_size": N_VOCAB, "d_model": 64, "n_layers": 3, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64}
# class, its options, the architecture, whether llama.cpp computes the same
MODELS: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "gptneox": ("GPTNeoX", SIZES, "gptneox", False),
    "gptneox, one after the other, tanh": (
        "GPTNeoX", {**SIZES, "use_parallel_residual": False, "hidden_act": "gelu_new"}, "gptneox", True,
    ),
    "phi2": ("Phi", GROUPED, "phi2", True),
    "stablelm": ("StableLm", GROUPED, "stablelm", True),
    "stablelm, biases": ("StableLm", {**GROUPED, "use_qkv_bias": True, "partial_rotary_factor": 0.5}, "stablelm", True),
    "stablelm, side by side, heads normalised": (
        "StableLm", {**GROUPED, "use_parallel_residual": True, "qk_layernorm": True}, "stablelm", True,
    ),
    "starcoder2": ("Starcoder2", {**GROUPED, "sliding_window": None}, "starcoder2", True),
    "starcoder2, a window": ("Starcoder2", {**GROUPED, "sliding_window": 16}, "starcoder2", False),
    "starcoder2, no biases": ("Starcoder2", {**GROUPED, "sliding_window": None, "use_bias": False}, "starcoder2", True),
    "exaone4": ("Exaone4", {**GROUPED, "sliding_window": None, "layer_types": ["full_attention"] * 3}, "exaone4", True),
    "exaone4, as deep as 32B": (
        "Exaone4", {**GROUPED, "num_hidden_layers": 64, "sliding_window": 16, "sliding_window_pattern": 4}, "exaone4", True,
    ),
    "bloom": ("Bloom", BLOOM, "bloom", True),
    "mpt": ("Mpt", MPT, "mpt", False),
    "mpt, wider": ("Mpt", {**MPT, "expansion_ratio": 4}, "mpt", False),
}  # fmt: skip


def make(name: str) -> Any:
    kind, options, _, _ = MODELS[name]
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            one = float(parameter_name.endswith("weight"))
            p.copy_(noise / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.2 * noise + one)
    return model


def logits_of(model: Any, ids: np.ndarray, rounded: bool) -> np.ndarray:
    """`rounded`: with keys and values as the native executor keeps them."""
    handles = []
    if rounded:
        if model.config.model_type in ("bloom", "mpt"):  # without rotary positions keys are what the product gives
            for module_name, module in model.named_modules():
                if module_name.endswith(("query_key_value", "Wqkv")):
                    by_head = module_name.endswith("query_key_value")

                    def hook(module: Any, inputs: Any, out: Any, by_head: bool = by_head) -> Any:
                        parts = out.unflatten(-1, (4, 3, 16) if by_head else (3, 64))
                        axis = -2
                        q, k, v = parts.unbind(axis)
                        k = numbers.keys(k.unflatten(-1, (-1, 16))).flatten(-2)
                        v = numbers.values(v.unflatten(-1, (-1, 16))).flatten(-2)
                        return torch.stack([q, k, v], axis).flatten(-3 if by_head else -2)

                    handles.append(module.register_forward_hook(hook))
        else:
            attention.round_keys_and_values(model)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].float().numpy()
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_transformers(tmp_path: Path, name: str) -> None:
    model, (_, _, architecture, same) = make(name), MODELS[name]
    model.save_pretrained(tmp_path / "checkpoint")
    characters = tmp_path / "characters.json"
    characters.write_text(json.dumps([chr(33 + i) for i in range(60)] + [" "]))
    canonical = read_canonical(tmp_path / "checkpoint", tokenizer=characters)
    assert canonical.hyper.architecture == architecture
    out = tmp_path / "model.gguf"
    receipt = export(canonical, "test", out, quant="f32", n_threads=1)
    ids = np.random.default_rng(3).integers(0, N_VOCAB, N)
    expected = logits_of(model, ids, rounded=False)
    for backend, wanted in (("numpy", expected), ("native", logits_of(model, ids, rounded=True))):
        with pocketlm.load(out, backend=backend, threads=2) as opened:
            limit = LIMIT if backend == "numpy" else numbers.NATIVE
            if opened.hyper.n_layer > 60:  # roundings add up
                limit *= 3
            assert np.abs(opened.logits(ids) - wanted).max() < limit, backend
            executor = opened.executor
            executor.cache.truncate(0)
            steps = np.concatenate([executor.forward(ids[i : i + 1]).copy() for i in range(N)])
            assert np.abs(steps - wanted).max() < limit, backend
    with LlamaReference(out) as llama:
        theirs = llama.logits(ids)
    differences = [note for note in receipt.notes if note.startswith("stock llama.cpp") and "tokenizes" not in note]
    if same:
        assert not differences
        assert compare(expected, theirs).worst_cosine > 0.9999
        return
    assert len(differences) == 1, differences
    if "a window" in name:
        assert "16 positions" in differences[0]
        assert compare(expected, theirs).worst_cosine < 0.999
        return
    assert "GELU by the tanh formula" in differences[0]
    settings = {"activation": "gelu_tanh", "n_ctx": "64"}
    switched = read_canonical(tmp_path / "checkpoint", tokenizer=characters, overrides=settings)
    export(switched, "test", out, quant="f32", n_threads=1)
    with pocketlm.load(out, backend="numpy", threads=2) as opened:
        assert np.abs(opened.logits(ids) - theirs).mean() < np.abs(expected - theirs).mean()


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("starcoder2")])
def test_a_starcoder_2_goes_back_to_transformers(tmp_path: Path, name: str) -> None:
    model = make(name)
    model.save_pretrained(tmp_path / "folder")
    export(read_canonical(tmp_path / "folder", tokenizer="none"), "test", tmp_path / "m.gguf", quant="f32", n_threads=1)
    again = read_canonical(tmp_path / "m.gguf")
    export(again, "test", tmp_path / "again", container="huggingface", quant="f32", n_threads=1)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, info = load(tmp_path / "again", dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = np.random.default_rng(3).integers(0, N_VOCAB, N)
    assert np.abs(logits_of(theirs.eval(), ids, rounded=False) - logits_of(model, ids, rounded=False)).max() < 1e-4


@pytest.mark.parametrize("name", ["gptneox", "phi2", "stablelm", "bloom"])
def test_what_a_configuration_leaves_out_is_what_transformers_does_then(tmp_path: Path, name: str) -> None:
    """The part of a head that turns; and BLOOM's context, which has no end by itself: what it was trained with."""
    make(name).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: v for key, v in config.items() if key not in ("rope_parameters", "seq_length")}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    canonical = read_canonical(tmp_path, tokenizer="none")
    assert canonical.hyper.n_ctx == (2048 if name == "bloom" else 64)
    export(canonical, "test", tmp_path / "model.gguf", quant="f32", n_threads=1)
    ids = np.random.default_rng(3).integers(0, N_VOCAB, N)
    with pocketlm.load(tmp_path / "model.gguf", backend="numpy", threads=2) as opened:
        assert np.abs(opened.logits(ids) - logits_of(theirs, ids, rounded=False)).max() < LIMIT


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("mpt", {"attn_config": {"clip_qkv": 6}}, "clip_qkv"), ("mpt", {"attn_config": {"alibi": False}}, "without ALiBi"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ("phi2", {"qk_layernorm": True}, "qk_layernorm"),
        ("exaone4", {"sliding_window": 16}, "3 layers that has sliding windows"),
        ("exaone4", {"sliding_window": ..., "layer_types": ...}, "3 layers that has sliding windows"),  # 4096 then
    ],
)  # fmt: skip
def test_what_their_code_can_and_pocketlm_cannot_is_refused_by_name(
    tmp_path: Path, name: str, change: dict[str, Any], said: str
) -> None:
    make(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    changed = {key: value for key, value in {**config, **change}.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(FileError, match=said):
        read_canonical(tmp_path, tokenizer="none", overrides={"n_ctx": "64"})
