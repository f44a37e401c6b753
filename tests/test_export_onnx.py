"""ONNX files run by onnxruntime, against the numpy executor: every option, with and without cache, padded and not."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from canonical_models import GPT2, cosine, logits_of, make_hyper, make_model

from pocketlm.errors import FileError, PocketlmError, UsageError
from pocketlm.export.canonical import CanonicalModel, CanonicalTensor
from pocketlm.export.export import export
from pocketlm.runtime.hyper import Hyper, Rope

onnx = pytest.importorskip("onnx", reason="the package onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

SMALL: dict[str, Any] = {"n_vocab": 67}
IDS = np.random.default_rng(3).integers(0, 67, (3, 33))
CUTS = {"at once": [], "in parts": [1, 2, 20], "one by one": list(range(1, 33))}  # where a text is cut; the cache joins it


def options(hyper: Hyper, **layout: bool) -> tuple[Hyper, dict[str, bool]]:
    return hyper, layout


MODELS = {
    "llama": options(make_hyper("llama", **SMALL)),
    "llama, untied, one head for all": options(make_hyper("llama", n_kv_head=1, **SMALL), tied=False),
    "half-split pairs": options(make_hyper(rope=Rope(1e4, 8, "half", original_ctx=64), **SMALL)),
    "some dimensions turned": options(make_hyper(rope=Rope(1e3, 6, "interleaved", original_ctx=64), **SMALL), bias=True),
    "yarn, fused": options(make_hyper(rope=Rope(1e4, 8, "half", "yarn", 4.0, 16), **SMALL), fused=True),
    "alibi": options(make_hyper("refact", position="alibi", **SMALL)),
    "alibi, 6 heads alone": options(make_hyper("refact", position="alibi", n_kv_head=6, **SMALL), bias=True),
    "gpt2": options(make_hyper("gpt2", **{**GPT2, **SMALL}), bias=True, fused=True),
    "gpt2, erf, no biases": options(make_hyper("gpt2", **{**GPT2, **SMALL, "activation": "gelu_erf"})),
    "no positions, relu": options(make_hyper(position="none", activation="relu", gated=False, **SMALL), tied=False, bias=True),
    "wide heads, layer norm, gated gelu": options(
        make_hyper(head_dim=16, norm="layer", activation="gelu_erf", norm_eps=1e-3, **SMALL)
    ),
}  # fmt: skip


def write(model: CanonicalModel, path: Path, quant: str = "f32") -> Any:
    export(model, "checkpoint.pt", path, container="onnx", quant=quant)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # its threads wait by spinning, which is slow beside other programs
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session: Any, hyper: Hyper, ids: np.ndarray, cuts: list[int], mask: np.ndarray | None = None) -> np.ndarray:
    """Logits of ids [batch, n], given in parts, each with the cache that the one before it left."""
    mask = np.ones(ids.shape, np.int64) if mask is None else mask
    kind = np.float16 if "float16" in session.get_inputs()[2].type else np.float32
    names = [entry.name for entry in session.get_inputs()[2:]]
    assert names == [f"past_key_values.{i}.{part}" for i in range(hyper.n_layer) for part in ("key", "value")]
    assert [entry.name for entry in session.get_outputs()] == [
        "logits",
        *(n.replace("past_key_values", "present") for n in names),
    ]
    cache = [np.zeros((len(ids), hyper.n_kv_head, 0, hyper.head_dim), kind)] * len(names)
    parts, end = [], 0
    for part in np.split(ids, cuts, axis=1):
        end += part.shape[1]
        logits, *cache = session.run(
            None, {"input_ids": part, "attention_mask": mask[:, :end], **dict(zip(names, cache, strict=True))}
        )
        assert cache[0].shape == (len(ids), hyper.n_kv_head, end, hyper.head_dim)
        parts.append(logits)
    return np.concatenate(parts, axis=1)


def expected(model: CanonicalModel, ids: np.ndarray) -> np.ndarray:
    return np.stack([logits_of(model, row) for row in ids])


@pytest.mark.parametrize(("hyper", "layout"), MODELS.values(), ids=MODELS.keys())
def test_float32_logits_are_the_numpy_executors(hyper: Hyper, layout: dict[str, bool], tmp_path: Path):
    model = make_model(hyper, **layout)
    session, right = write(model, tmp_path / "m.onnx"), expected(model, IDS)
    for name, cuts in CUTS.items():
        assert np.abs(run(session, hyper, IDS, cuts) - right).max() < 1e-4, name


@pytest.mark.parametrize(("hyper", "layout"), MODELS.values(), ids=MODELS.keys())
def test_float16_logits_are_close(hyper: Hyper, layout: dict[str, bool], tmp_path: Path):
    model = make_model(hyper, **layout)
    session, right = write(model, tmp_path / "m.onnx", "f16"), expected(model, IDS)
    for name in ("at once", "in parts"):
        logits = run(session, hyper, IDS, CUTS[name])
        assert logits.dtype == np.float32
        assert cosine(logits, right) > 0.9999, name


@pytest.mark.parametrize("name", ["llama", "alibi", "gpt2"])
def test_int8_logits_are_near(name: str, tmp_path: Path):
    hyper, layout = MODELS[name]
    model = make_model(hyper, **layout, spread=0.1)
    logits = run(write(model, tmp_path / "m.onnx", "int8"), hyper, IDS, [1, 20])
    assert cosine(logits, expected(model, IDS)) > 0.995
    kinds = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert kinds & {"MatMulInteger", "DynamicQuantizeMatMul"}


@pytest.mark.parametrize("name", ["llama", "alibi", "gpt2"])
@pytest.mark.parametrize("cuts", [[], [4, 9]], ids=["at once", "in parts"])
def test_rows_padded_on_the_left_give_what_they_give_alone(name: str, cuts: list[int], tmp_path: Path):
    hyper, layout = MODELS[name]
    model = make_model(hyper, **layout)
    mask = np.ones((2, 20), np.int64)
    mask[1, :7] = 0
    logits = run(write(model, tmp_path / "m.onnx"), hyper, IDS[:2, :20], cuts, mask)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[0], logits_of(model, IDS[0, :20]), atol=1e-4)
    np.testing.assert_allclose(logits[1, 7:], logits_of(model, IDS[1, 7:20]), atol=1e-4)


@pytest.mark.parametrize("quant", ["f32", "f16", "int8"])
def test_the_file_is_sound_and_the_same_each_time(quant: str, tmp_path: Path):
    model = make_model(make_hyper("llama"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(model, tmp_path / name / "m.onnx", quant)
    assert (tmp_path / "a" / "m.onnx").read_bytes() == (tmp_path / "b" / "m.onnx").read_bytes()
    onnx.checker.check_model(str(tmp_path / "a" / "m.onnx"), full_check=True)
    built = onnx.load(tmp_path / "a" / "m.onnx")
    assert {entry.domain: entry.version for entry in built.opset_import}[""] == 17
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in built.graph.input}
    assert shapes["input_ids"] == ["batch", "n"]
    assert shapes["past_key_values.1.value"] == ["batch", 2, "past", 8]


def test_a_tied_table_is_stored_once(tmp_path: Path):
    hyper = make_hyper("llama", n_vocab=2000)
    sizes = []
    for tied in (True, False):
        write(make_model(hyper, tied=tied), tmp_path / "m.onnx")
        sizes.append((tmp_path / "m.onnx").stat().st_size)
    assert sizes[1] - sizes[0] > 0.9 * 2000 * 48 * 4


def test_the_tokenizer_travels_along(tmp_path: Path):
    model = make_model(make_hyper("llama"))
    write(model, tmp_path / "m.onnx")
    properties = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert json.loads(properties["tokenizer.ggml.tokens"]) == model.metadata["tokenizer.ggml.tokens"]
    assert properties["general.architecture"] == "llama"
    assert json.loads(properties["llama.attention.head_count"]) == 6


@pytest.mark.parametrize("quant", ["f32", "f16", "int8"])
def test_weights_too_large_for_one_file_go_beside_it(quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = make_model(make_hyper("llama", **SMALL))
    whole = run(write(model, tmp_path / "whole.onnx", quant), model.hyper, IDS, [5])
    monkeypatch.setattr("pocketlm.export.onnx_file.INLINE_BYTES", 1000)
    for _ in range(2):
        split = run(write(model, tmp_path / "split.onnx", quant), model.hyper, IDS, [5])
        np.testing.assert_array_equal(whole, split)
        assert len(list(tmp_path.glob("split.onnx_data_*"))) == 1
    first = next(iter(tmp_path.glob("split.onnx_data_*")))
    write(make_model(model.hyper, tied=False), tmp_path / "split.onnx", quant)
    assert not first.exists()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = make_model(make_hyper("llama", **SMALL))
    monkeypatch.setattr("pocketlm.export.onnx_file.INLINE_BYTES", 1000)
    write(model, tmp_path / "m.onnx")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted() -> np.ndarray:
        raise KeyboardInterrupt

    broken = {**model.tensors, "blk.1.ffn_down.weight": CanonicalTensor((48, 80), interrupted)}
    with pytest.raises(KeyboardInterrupt):
        write(replace(model, tensors=broken), tmp_path / "m.onnx")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nan_and_values_beyond_float16_are_refused(tmp_path: Path):
    model = make_model(make_hyper("llama", **SMALL))
    for value, quant, words in ((np.nan, "f32", "holds NaN"), (1e6, "f16", "too large for float16")):
        bad = CanonicalTensor((48, 48), lambda value=value: np.full((48, 48), value, np.float32))
        with pytest.raises(PocketlmError, match=words):
            write(replace(model, tensors={**model.tensors, "blk.0.attn_q.weight": bad}), tmp_path / "m.onnx", quant)
    with pytest.raises(UsageError, match="onnx knows f32, f16, int8"):
        write(model, tmp_path / "m.onnx", "q4_0")
    assert not list(tmp_path.iterdir())


def test_without_the_package_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "pocketlm.export.onnx_file", None)
    with pytest.raises(PocketlmError, match=r"pip install 'pocketlm\[export\]'"):
        write(make_model(make_hyper("llama", **SMALL)), tmp_path / "m.onnx")


def test_a_file_that_the_checker_refuses_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise onnx.checker.ValidationError("no such thing\nmore")

    monkeypatch.setattr("onnx.checker.check_model", refuse)
    with pytest.raises(FileError, match=r"\(no such thing\)"):
        write(make_model(make_hyper("llama", **SMALL)), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_int8_without_onnxruntime_is_refused_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, said = make_model(make_hyper("llama")), list[str]()
    where = {"out": tmp_path / "m.onnx", "container": "onnx", "quant": "int8"}
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(PocketlmError, match="ONNX in int8 needs onnxruntime; get it with: pip install onnxruntime"):
        export(model, "checkpoint.pt", **where, progress=lambda name, n: said.append(name))
    assert said == []
    assert not any(tmp_path.iterdir())
