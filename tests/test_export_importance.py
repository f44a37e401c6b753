"""An importance matrix: errors go where they do little harm. Against exact logits, llama.cpp's files and what they say."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from canonical_models import logits_of, make_hyper, make_model
from families import write_random
from tiny_models import write_out

from pocketlm import cli
from pocketlm.errors import FileError, UsageError
from pocketlm.export import importance as importance_module
from pocketlm.export.export import export
from pocketlm.export.from_model_file import read_model_file
from pocketlm.export.importance import importance
from pocketlm.export.quantize import QUANTIZERS, quantize
from pocketlm.runtime.formats import FORMATS, dequantize

SEARCHED = [name for name in QUANTIZERS if name not in ("F32", "F16", "BF16", "Q8_0", "MXFP4")]  # MXFP4: see its quantizer


@pytest.fixture
def uneven():
    """A model whose first norm makes some columns many times as large as others."""
    model = make_model(make_hyper("llama", n_embd=64, n_head=4, head_dim=16, n_ff=64, n_vocab=300), spread=0.1)
    for i in range(2):
        for name in (f"blk.{i}.attn_norm.weight", f"blk.{i}.ffn_norm.weight", "output_norm.weight"):
            scale = (np.exp(np.random.default_rng(i).normal(size=64) * 1.5) / 3).astype(np.float32)
            model.tensors[name] = replace(model.tensors[name], read=scale.copy)
    tokens = [f"<0x{i:02X}>" for i in range(256)] + [f"t{i}" for i in range(44)]
    kinds = np.array([6] * 256 + [1] * 44, np.int32)
    keys = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": np.arange(300, dtype=np.float32), "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }  # fmt: skip
    return replace(model, metadata={**model.metadata, **keys})


@pytest.mark.parametrize("fmt", SEARCHED)
def test_errors_go_where_they_count_little(fmt: str):
    random = np.random.default_rng(3)
    weights = (random.normal(size=(64, 512)) * 0.02).astype(np.float32)
    counts = np.broadcast_to(np.exp(random.normal(size=512) * 1.5).astype(np.float32), weights.shape)

    def harm(data: np.ndarray) -> float:
        back = np.empty_like(weights)
        dequantize(FORMATS[fmt], data, back)
        return float(np.sum(counts * (back - weights) ** 2))

    assert harm(quantize(fmt, weights, counts)) < 0.95 * harm(quantize(fmt, weights))


@pytest.mark.parametrize("fmt", SEARCHED)
def test_equal_counts_lose_no_more_than_none(fmt: str):
    weights = (np.random.default_rng(4).normal(size=(64, 512)) * 0.02).astype(np.float32)
    errors = []
    for counts in (np.ones_like(weights), None):
        back = np.empty_like(weights)
        dequantize(FORMATS[fmt], quantize(fmt, weights, counts), back)
        errors.append(float(np.sum((back - weights) ** 2)))
    assert errors[0] <= errors[1] * 1.001


@pytest.mark.parametrize("quant", ["q4_0", "q5_1", "iq4_nl"])
def test_a_text_brings_the_logits_closer_to_the_exact_ones(uneven, tmp_path: Path, quant: str):
    (tmp_path / "text.txt").write_text("Merhaba! Привет, dzień dobry. " * 60, encoding="utf-8")
    counts = importance(tmp_path / "text.txt", uneven)
    assert set(counts) == {name for name, t in uneven.tensors.items() if len(t.shape) == 2}
    ids = np.frombuffer("Она сказала: to jest dom. Evet.".encode(), np.uint8).astype(np.int64)
    exact, errors = logits_of(uneven, ids), []
    for name, given in (("plain", None), ("counted", counts)):
        export(uneven, "m.pt", tmp_path / f"{name}.gguf", quant=quant, importance=given)
        errors.append(float(np.mean((logits_of(read_model_file(tmp_path / f"{name}.gguf"), ids) - exact) ** 2)))
    assert errors[1] < 0.7 * errors[0]


def test_means_are_those_of_what_the_matrices_are_multiplied_with(uneven, tmp_path: Path):
    """The first matrix's input is known without a model: normed rows of the token table."""
    text = "abcdefgh" * 128
    (tmp_path / "text.txt").write_text(text)
    table, norm = uneven.tensors["token_embd.weight"].read(), uneven.tensors["blk.0.attn_norm.weight"].read()
    rows = table[np.frombuffer(text.encode(), np.uint8)]
    squares = ((rows / np.sqrt((rows**2).mean(1, keepdims=True) + 1e-5) * norm) ** 2).mean(0)
    found = importance(tmp_path / "text.txt", uneven)["blk.0.attn_q.weight"]
    np.testing.assert_allclose(found, np.maximum(squares / squares.mean(), importance_module.LEAST), rtol=1e-4)


def _old_file(path: Path, entries: dict[str, np.ndarray], runs: int) -> None:
    data = struct.pack("<i", len(entries))
    for name, values in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", runs, values.size)
        data += (values * runs).astype("<f4").tobytes()
    path.write_bytes(data + struct.pack("<i", 7) + struct.pack("<i", 4) + b"text")


def _new_file(path: Path, entries: dict[str, np.ndarray], runs: int) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    for name, values in entries.items():
        writer.add_tensor(f"{name}.in_sum2", (values * runs).astype(np.float32)[None])
        writer.add_tensor(f"{name}.counts", np.array([[runs]], np.float32))
    write_out(writer)


@pytest.mark.parametrize("write", [_old_file, _new_file])
def test_llama_cpps_files_say_the_same_as_the_text_they_were_made_of(uneven, tmp_path: Path, write):
    (tmp_path / "text.txt").write_text("abcdefgh" * 128)
    counts = importance(tmp_path / "text.txt", uneven)
    write(tmp_path / "imatrix", counts, 12)
    read = importance(tmp_path / "imatrix", uneven)
    assert set(read) == set(counts)
    for name, values in counts.items():
        np.testing.assert_allclose(read[name], values, rtol=1e-3)


def test_an_entry_that_leads_back_is_no_importance_matrix(uneven, tmp_path: Path):
    """Two thousand million of them were read, all the same one."""
    file = tmp_path / "imatrix"
    file.write_bytes(struct.pack("<ii12xiii", 2**31 - 1, 12, 0, 0, -24) + bytes(16))
    with pytest.raises(FileError, match="UTF-8"):
        importance(file, uneven)


# ── experts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


NEVER = 2  # the expert that no token goes to


@pytest.fixture
def routed(tmp_path: Path):
    """A model of five experts, two of them chosen for each token, whose norms make columns as uneven as those of `uneven`."""
    sizes = {"n_embd": 64, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "n_ff": 64, "n_layer": 2, "n_ctx": 128}
    keys = {"expert_count": 5, "expert_used_count": 2}
    biases = {f"blk.{i}.ffn_gate_inp.bias": (5,) for i in range(2)}
    model = read_model_file(write_random(tmp_path / "routed.gguf", "llama", sizes, keys, biases))
    away = np.where(np.arange(5) == NEVER, np.float32(-1000), np.float32(0))
    for i in range(2):
        scale = (np.exp(np.random.default_rng(i).normal(size=64) * 1.5) / 3).astype(np.float32)
        for name, values in ((f"blk.{i}.ffn_norm.weight", scale), (f"blk.{i}.ffn_gate_inp.bias", away)):
            model.tensors[name] = replace(model.tensors[name], read=values.copy)
    (tmp_path / "text.txt").write_text("Merhaba! Dzień dobry, the quick brown fox. " * 60, encoding="utf-8")
    return model


def experts_of(model) -> list[str]:
    return [name for name in model.tensors if name.endswith("_exps.weight")]


def test_every_expert_is_counted_by_the_tokens_that_went_to_it(routed, tmp_path: Path):
    ids = np.random.default_rng(5).integers(0, 256, 700)
    sums = importance_module._mean_squares(routed, ids, tmp_path)
    for i in range(2):
        gate, up, down = (sums[f"blk.{i}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
        np.testing.assert_array_equal(gate, up)
        np.testing.assert_allclose(gate.sum(0), 2 * sums[f"blk.{i}.ffn_gate_inp.weight"], rtol=1e-5)  # two for each token
        assert not gate[NEVER].any()
        assert not down[NEVER].any()
        assert (np.delete(gate, NEVER, 0) > 0).all()
        assert down.shape == (5, 64)
    counts = importance(tmp_path / "text.txt", routed)
    assert set(experts_of(routed)) <= set(counts)


@pytest.mark.parametrize("quant", ["q4_0", "q5_1", "iq4_nl"])
def test_experts_gain_by_a_text_and_one_that_it_never_asks_is_quantised_as_without(routed, tmp_path: Path, quant: str):
    counts = importance(tmp_path / "text.txt", routed)
    ids = np.frombuffer(b"Dobry fox, quick the brown Merhaba.", np.uint8).astype(np.int64)
    exact, errors, data = logits_of(routed, ids), [], []
    for name, given in (("plain", {}), ("counted", {name: counts[name] for name in experts_of(routed)})):
        export(routed, "m.pt", path := tmp_path / f"{name}.gguf", quant=quant, importance=given)
        data.append({name: read_tensor(path, name).reshape(5, -1) for name in experts_of(routed)})
        rounded = read_model_file(path).tensors
        last = {name: rounded[name] for name in experts_of(routed) if name.startswith("blk.1.")}  # no router comes after them
        errors.append(float(np.mean((logits_of(replace(routed, tensors={**routed.tensors, **last}), ids) - exact) ** 2)))
    assert errors[1] < 0.8 * errors[0]
    for name, plain in data[0].items():
        same = (plain == data[1][name]).all(1)
        np.testing.assert_array_equal(same, np.arange(5) == NEVER)


@pytest.mark.parametrize("write", ["old", "new"])
def test_llama_cpps_files_say_it_of_every_expert(routed, tmp_path: Path, write: str):
    """The new ones have no sums of an expert that was never asked, and a count of zero; the old ones the mean 1 instead."""
    counts = {name: values for name, values in importance(tmp_path / "text.txt", routed).items() if "_exps" in name}
    if write == "old":
        filled = {name: np.where(values.any(1, keepdims=True), values, 1).ravel() for name, values in counts.items()}
        _old_file(tmp_path / "imatrix", filled, 12)
    else:
        gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
        writer, tokens = gguf.GGUFWriter(tmp_path / "imatrix", ""), np.array([[3], [40], [0], [7], [1]], np.float32)
        for name, values in counts.items():
            writer.add_tensor(f"{name}.in_sum2", values * tokens)
            writer.add_tensor(f"{name}.counts", tokens)
        write_out(writer)
    read = importance(tmp_path / "imatrix", routed)
    assert set(read) == set(counts)
    for name, values in counts.items():
        assert np.isfinite(read[name]).all()
        np.testing.assert_allclose(read[name], values, rtol=1e-3)


def test_a_matrix_of_another_number_of_experts_is_one_line(routed, tmp_path: Path):
    _old_file(tmp_path / "other", {"blk.0.ffn_up_exps.weight": np.ones(4 * 64)}, 1)
    with pytest.raises(FileError, match=r"blk\.0\.ffn_up_exps\.weight has 256 columns there"):
        importance(tmp_path / "other", routed)


def test_what_is_no_importance_matrix_of_this_model_is_one_line(uneven, tmp_path: Path):
    _old_file(tmp_path / "wide", {"blk.0.attn_q.weight": np.ones(65)}, 1)
    _old_file(tmp_path / "other", {"model.layers.0": np.ones(64)}, 1)
    (tmp_path / "short").write_text("too short")
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9" * 1000)
    for name, words in (
        ("wide", "blk.0.attn_q.weight has 65 columns there"), ("other", "names none of its matrices"),
        ("short", "has 11 tokens"), ("latin", "is not UTF-8"), ("nosuch", "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(FileError, match=words):
            importance(tmp_path / name, uneven)
    for quant, container in (("f16", "gguf"), ("int8", "onnx"), (None, "fp16")):
        with pytest.raises(UsageError, match="--imatrix is for quantised GGUFs"):
            export(uneven, "m.pt", tmp_path / "out", container=container, quant=quant, importance={"a": np.ones(1)})
    assert not (tmp_path / "out").exists()


def test_the_command_takes_it(uneven, tmp_path: Path):
    export(uneven, "m.pt", tmp_path / "m.gguf", quant="f32")
    (tmp_path / "text.txt").write_text("abcdefgh" * 128)
    out = tmp_path / "small.gguf"
    asked = ["--quant", "q4_0", "--imatrix", str(tmp_path / "text.txt")]
    assert cli.main(["export", str(tmp_path / "m.gguf"), "-o", str(out), *asked]) == 0
    weights, counts = uneven.tensors["blk.0.attn_q.weight"].read(), importance(tmp_path / "text.txt", uneven)
    expected = quantize("Q4_0", weights, np.broadcast_to(counts["blk.0.attn_q.weight"], weights.shape))
    np.testing.assert_array_equal(read_tensor(out, "blk.0.attn_q.weight"), expected)


def read_tensor(path: Path, name: str) -> np.ndarray:
    assert name in read_model_file(path).tensors
    from pocketlm.runtime.gguf_reader import open_gguf

    with open_gguf(path) as file:
        return file.tensors[name].data.copy()
