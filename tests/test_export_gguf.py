"""GGUF files that are written: read back here, by the package gguf and by llama.cpp; whole, or not there at all."""

import math
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_reference
import numpy as np
import pytest
from canonical_models import GPT2, N_VOCAB, cosine, logits_of, make_hyper, make_model
from llama_reference import LlamaReference

from pocketlm.errors import FileError, PocketlmError, UsageError
from pocketlm.export import export as job
from pocketlm.export.canonical import CanonicalModel, CanonicalTensor
from pocketlm.export.export import export
from pocketlm.export.from_model_file import read_model_file
from pocketlm.export.hyper_keys import architecture_keys
from pocketlm.export.llama_cpp_compat import stock_notes
from pocketlm.export.rules import QUANTS
from pocketlm.runtime.gguf_reader import open_gguf
from pocketlm.runtime.hyper import Hyper, Rope, read_hyper

IDS = np.random.default_rng(3).integers(0, N_VOCAB, 40)


def write(model: CanonicalModel, path: Path, quant: str = "f32", **options: Any) -> job.Receipt:
    return export(model, "checkpoint.pt", path, container="gguf", quant=quant, **options)


def formats_of(path: Path) -> dict[str, str]:
    with open_gguf(path) as file:
        return {name: tensor.format.name for name, tensor in file.tensors.items()}


# ── what is in the file ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "hyper",
    [
        make_hyper("llama"),
        make_hyper("llama", head_dim=16, rope=Rope(5e5, 8, "half", original_ctx=64)),
        make_hyper("llama", rope=Rope(1e4, 8, "interleaved", "yarn", 4.0, 16, 1.5, 16.0, 2.0)),
        make_hyper("refact", position="alibi", alibi_max_bias=4.0),
        make_hyper("gpt2", **GPT2),
        make_hyper("gpt2", **{**GPT2, "activation": "gelu_erf"}),
        make_hyper("pocketlm", position="none", norm="layer", activation="relu", gated=False, norm_eps=1e-6),
    ],
)
def test_hyper_parameters_survive_as_keys(hyper: Hyper):
    keys = {"general.architecture": hyper.architecture, **architecture_keys(hyper)}
    assert read_hyper(keys, hyper.n_vocab, "file") == hyper


def test_the_gguf_package_reads_the_same_keys_and_tensors(tmp_path: Path):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    model = make_model(make_hyper("llama", n_embd=64, n_head=4, head_dim=16))
    extra = {
        "test.small": 7, "test.negative": -7, "test.large": 1 << 40, "test.true": True, "test.real": 0.25, "test.text": "ğ🌍",
        "test.bytes": np.arange(5, dtype=np.uint8), "test.longs": np.array([-(1 << 40)]), "test.texts": ["", "a", "世界"],
    }  # fmt: skip
    write(replace(model, metadata={**model.metadata, **extra}), tmp_path / "m.gguf", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    for key, value in extra.items():
        field = reader.get_field(key)
        assert field is not None
        found = field.contents()
        assert found == (value.tolist() if isinstance(value, np.ndarray) else value), key
    assert [t.name for t in reader.tensors] == list(model.tensors)
    for tensor in reader.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(model.tensors[tensor.name].shape)
        np.testing.assert_allclose(weights, model.tensors[tensor.name].read(), atol=0.02)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path):
    model = make_model(make_hyper("llama"))
    paths = [tmp_path / "m.gguf", tmp_path / "again" / "m.gguf"]
    paths[1].parent.mkdir()
    for path, n_threads in zip(paths, (1, 3), strict=True):
        write(model, path, "q4_0", n_threads=n_threads)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("quant", QUANTS)
def test_norms_and_positions_stay_float32_and_the_head_gets_more_bits(tmp_path: Path, quant: str):
    model = make_model(make_hyper("gpt2", **{**GPT2, "n_embd": 256, "n_head": 4, "n_kv_head": 4, "head_dim": 64, "n_ff": 512}))
    write(model, tmp_path / "m.gguf", quant)
    formats = formats_of(tmp_path / "m.gguf")
    assert formats["position_embd.weight"] == formats["output_norm.weight"] == formats["blk.1.attn_norm.weight"] == "F32"
    matrices = {"mxfp4": "Q8_0"}.get(quant, quant.upper().removesuffix("_M"))  # MXFP4 is for experts, which are not here
    assert formats["blk.0.ffn_up.weight"] == formats["blk.1.attn_q.weight"] == matrices
    assert formats["token_embd.weight"] == (matrices if matrices in ("F32", "F16", "BF16", "Q8_0") else "Q6_K")


@pytest.mark.parametrize(
    ("quant", "width", "expected", "head"),
    [
        ("q4_k", 96, "Q5_0", "Q8_0"),
        ("q5_k", 96, "Q5_1", "Q8_0"),
        ("q6_k", 96, "Q8_0", "Q8_0"),
        ("q4_0", 48, "F16", "F16"),
        ("q4_k", 48, "F16", "F16"),
    ],
)
def test_widths_that_no_block_divides_fall_back_and_are_named(tmp_path: Path, quant: str, width: int, expected: str, head: str):
    receipt = write(
        make_model(make_hyper("llama", n_embd=width, n_head=6, n_kv_head=2, head_dim=width // 6, n_ff=256), tied=False),
        tmp_path / "m.gguf",
        quant,
    )
    formats = formats_of(tmp_path / "m.gguf")
    assert formats["blk.0.attn_q.weight"] == expected
    assert formats["blk.0.ffn_down.weight"] == quant.upper()
    assert formats["output.weight"] == head
    assert any("blk.*.attn_q.weight x2" in line and f"these have {width}" in line for line in receipt.lines())


@pytest.mark.parametrize("quant", ["q4_0", "q6_k", *(name for name, row in QUANTS.items() if row.more)])
@pytest.mark.parametrize(("n_kv_head", "fused"), [(1, False), (4, True)])
def test_every_tensor_gets_the_format_that_llama_cpp_gives_it(tmp_path: Path, quant: str, n_kv_head: int, fused: bool):
    shape = {"n_embd": 256, "n_head": 4, "n_kv_head": n_kv_head, "head_dim": 64, "n_ff": 256, "n_vocab": 32, "n_ctx": 8}
    shape["n_layer"] = 17 if quant == "q3_k_m" else 9
    hyper = make_hyper("gpt2", **{**GPT2, **shape}) if fused else make_hyper("llama", **shape)
    model = make_model(hyper, fused=fused, tied=fused, bias=fused)
    write(model, tmp_path / "f32.gguf", "f32")
    write(model, tmp_path / "ours.gguf", quant)
    llama_reference.quantize_file(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", QUANTS[quant].file_type)
    ours, theirs = formats_of(tmp_path / "ours.gguf"), formats_of(tmp_path / "theirs.gguf")
    assert ours == theirs


def test_pure_gives_the_head_the_same_format(tmp_path: Path):
    write(make_model(make_hyper("llama", n_embd=64, n_head=4, head_dim=16)), tmp_path / "m.gguf", "q4_0", pure=True)
    assert formats_of(tmp_path / "m.gguf")["token_embd.weight"] == "Q4_0"


@pytest.mark.parametrize(("scale", "words"), [(1e6, "do not fit into F16"), (1e-6, "too small for the scales of F16")])
def test_weights_that_half_precision_cannot_hold_stay_float32(tmp_path: Path, scale: float, words: str):
    model = make_model(make_hyper("llama"))
    odd = CanonicalTensor((48, 48), lambda: np.full((48, 48), scale, np.float32))
    receipt = write(replace(model, tensors={**model.tensors, "blk.0.attn_q.weight": odd}), tmp_path / "m.gguf", "f16")
    with open_gguf(tmp_path / "m.gguf") as file:
        np.testing.assert_array_equal(file.tensors["blk.0.attn_q.weight"].to_float32(), odd.read())
    assert any(words in line for line in receipt.lines())


def test_a_nan_is_refused_by_name(tmp_path: Path):
    model = make_model(make_hyper("llama"))
    bad = CanonicalTensor((48, 48), lambda: np.full((48, 48), np.nan, np.float32))
    with pytest.raises(FileError, match=r"checkpoint.pt: tensor blk.1.attn_q.weight holds NaN"):
        write(replace(model, tensors={**model.tensors, "blk.1.attn_q.weight": bad}), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_missing_tensors_are_listed_and_nothing_is_written(tmp_path: Path):
    model = make_model(make_hyper("llama"))
    del model.tensors["blk.1.attn_q.weight"]
    with pytest.raises(FileError, match=r"blk.1.attn_q.weight is missing"):
        write(model, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_the_receipt_counts_parameters_and_finds_the_worst_tensor(tmp_path: Path):
    model = make_model(make_hyper("llama", n_embd=64, n_head=4, head_dim=16, n_ff=128))
    spiky = np.zeros((64, 64), np.float32)
    spiky[:, ::32], spiky[:, 1::32] = 8.0, 0.4  # 0.4 is lost beside 8
    tensors = {**model.tensors, "blk.1.attn_output.weight": CanonicalTensor((64, 64), spiky.copy)}
    receipt = write(replace(model, tensors=tensors, added=frozenset({"output_norm.weight"})), tmp_path / "m.gguf", "q4_0")
    assert receipt.n_parameters == sum(int(np.prod(t.shape)) for t in tensors.values()) - 64
    back = open_gguf(tmp_path / "m.gguf").tensors
    for tensor in receipt.tensors:
        weights = tensors[tensor.name].read()
        error = np.sqrt(np.sum((back[tensor.name].to_float32() - weights) ** 2) / np.sum(weights**2))
        assert tensor.error == pytest.approx(error, rel=1e-3, abs=1e-7)
    assert f"{receipt.worst.error:.3%} (relative RMSE) in {receipt.worst.name}" in receipt.lines()[-1]


# ── requantisation ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_gguf_is_requantised_with_all_its_keys(tmp_path: Path):
    model = make_model(make_hyper("llama", n_embd=64, n_head=4, head_dim=16, n_ff=128))
    model.metadata["someone.else"] = [1.5, 2.5]
    write(model, tmp_path / "a.gguf", "f32")
    write(model, tmp_path / "direct.gguf", "q5_1")
    write(read_model_file(tmp_path / "a.gguf"), tmp_path / "b.gguf", "q5_1")
    with open_gguf(tmp_path / "direct.gguf") as direct, open_gguf(tmp_path / "b.gguf") as b:
        assert set(direct.metadata) == set(b.metadata)
        for key in direct.metadata:
            np.testing.assert_array_equal(direct.metadata[key], b.metadata[key])
        for name, tensor in direct.tensors.items():
            np.testing.assert_array_equal(tensor.data, b.tensors[name].data)


def test_the_real_model_requantised_to_its_own_format_is_itself(smollm2_path: Path, tmp_path: Path):
    model = read_model_file(smollm2_path)
    few = {name: tensor for name, tensor in model.tensors.items() if name.startswith(("blk.0.", "output_norm"))}
    table = CanonicalTensor((32, model.hyper.n_embd), lambda: np.ones((32, model.hyper.n_embd), np.float32))
    hyper = replace(model.hyper, n_layer=1, n_vocab=32)
    write(CanonicalModel(hyper, {"token_embd.weight": table, **few}, {}, "GGUF"), tmp_path / "m.gguf", "q4_1")
    with open_gguf(smollm2_path) as old, open_gguf(tmp_path / "m.gguf") as new:
        for name in few:
            a, b = old.tensors[name].to_float32(), new.tensors[name].to_float32()
            np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(a).max(), rtol=0)


# ── llama.cpp ────────────────────────────────────────────────────────────────────────────────────────────────────────

STOCK = {
    "llama": make_model(make_hyper("llama")),
    "llama, heads wider than the model": make_model(make_hyper("llama", head_dim=16, n_kv_head=3), tied=False),
    "refact": make_model(make_hyper("refact", position="alibi")),
    "gpt2": make_model(make_hyper("gpt2", **GPT2), bias=True, fused=True),
}


@pytest.mark.parametrize("model", STOCK.values(), ids=STOCK.keys())
def test_llama_cpp_computes_the_same(model: CanonicalModel, tmp_path: Path):
    write(model, tmp_path / "m.gguf", "f32")
    with LlamaReference(tmp_path / "m.gguf", n_ctx=64) as reference:
        theirs = reference.logits(IDS)
    assert cosine(theirs, logits_of(model, IDS)) > 0.999


@pytest.mark.parametrize("quant", [name for name in QUANTS if name != "f32"])
def test_llama_cpp_runs_every_format(quant: str, tmp_path: Path):
    hyper = make_hyper("llama", n_embd=256, n_head=4, n_kv_head=2, head_dim=64, n_ff=512, n_layer=1)
    write(make_model(hyper, spread=1 / 16), tmp_path / "m.gguf", quant)  # llama.cpp rounds activations, too
    ours = logits_of(read_model_file(tmp_path / "m.gguf"), IDS)
    with LlamaReference(tmp_path / "m.gguf", n_ctx=64) as reference:
        assert cosine(reference.logits(IDS), ours) > 0.999


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        (make_hyper("llama"), None),
        (make_hyper("gpt2", **GPT2), None),
        (make_hyper("gpt2", **{**GPT2, "activation": "gelu_erf"}), "tanh"),
        (make_hyper("llama", activation="relu"), "activation relu for llama"),
        (make_hyper("pocketlm"), "does not know this architecture"),
    ],
)
def test_what_stock_llama_cpp_does_not_do_is_noted(hyper: Hyper, words: str | None):
    notes = stock_notes(hyper, {}, Path("m.gguf"))
    assert not notes if words is None else len(notes) == 1 and words in notes[0]


def test_texts_that_stock_llama_cpp_tokenizes_differently_are_noted():
    metadata = make_model(make_hyper("llama")).metadata
    texts = {"pocketlm.tokenizer.test_texts": ["the", "he"], "pocketlm.tokenizer.test_ids": ["5 6 7", "1 2"]}
    assert (
        "2 of the 2 test texts differently: 'the', 'he'"
        in stock_notes(make_hyper("llama"), {**metadata, **texts}, Path("m"))[0]
    )


# ── whole or not at all ──────────────────────────────────────────────────────────────────────────────────────────────


def failing(model: CanonicalModel, error: BaseException) -> CanonicalModel:
    """The model, whose last layer raises `error` when it is read."""

    def read() -> np.ndarray:
        raise error

    return replace(model, tensors={**model.tensors, "blk.1.ffn_up.weight": CanonicalTensor((80, 48), read)})


@pytest.mark.parametrize("old", [b"the old file", None])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
def test_a_failure_half_way_leaves_the_old_file_and_no_other(tmp_path: Path, old: bytes | None, error: BaseException):
    path = tmp_path / "m.gguf"
    if old:
        path.write_bytes(old)
    with pytest.raises((type(error), FileError)) as caught:
        write(failing(make_model(make_hyper("llama")), error), path)
    assert not isinstance(error, OSError) or "m.gguf: cannot be written (No space left on device)" in str(caught.value)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([old] if old else [])


CHILD = """
    import resource, signal, sys, time
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from canonical_models import make_hyper, make_model
    from pocketlm.errors import PocketlmError
    from pocketlm.export.export import export
    {setup}
    try:
        export(make_model(make_hyper("llama", n_embd=480, n_head=60)), "c", Path({out!r}), quant="f32", progress=progress)
    except PocketlmError as error:
        print(error)
"""


def child(out: Path, setup: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(CHILD).format(tests=str(Path(__file__).parent), out=str(out), setup=setup)]


@pytest.mark.skipif(os.name == "nt", reason="there is no limit on the size of files on Windows")
def test_a_write_that_the_system_refuses_is_one_line_and_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"the old file")
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (99999, 99999))"
    setup = f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN); {limit}; progress = None"
    done = subprocess.run(child(path, setup), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{path}: cannot be written (File too large); the old one is unchanged"]
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"the old file"]
    path.unlink()
    done = subprocess.run(child(path, setup), capture_output=True, text=True, check=True)
    advice = "make room, or choose another folder"  # and no word of an old file
    assert done.stdout.splitlines() == [f"{path}: cannot be written (File too large); {advice}"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_process_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"the old file")
    setup = "progress = lambda name, n: (print(name, flush=True), time.sleep(60)) if name == 'blk.1.ffn_up.weight' else None"
    with subprocess.Popen(child(path, setup), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "blk.1.ffn_up.weight"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert path.read_bytes() == b"the old file"
    write(make_model(make_hyper("llama")), path)  # what is left over does not stand in the way
    assert open_gguf(path).tensors


def test_a_file_that_does_not_read_back_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = job.write_gguf

    def damaging(file: Any, *arguments: Any) -> Any:
        done = real(file, *arguments)
        file.seek(-100, os.SEEK_END)
        file.write(b"\xff")
        return done

    monkeypatch.setattr(job, "write_gguf", damaging)
    with pytest.raises(FileError, match="is not what was written"):
        write(make_model(make_hyper("llama")), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(FileError, match=r"needs 0\.\d MB where 0\.0 MB are free"):
        write(make_model(make_hyper("llama")), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["missing/m.gguf", ""])
def test_an_output_that_cannot_be_is_refused(tmp_path: Path, target: str):
    with pytest.raises(FileError, match=r"folder does not exist|is there already and is not a file"):
        write(make_model(make_hyper("llama")), tmp_path / target)


def test_an_unknown_format_names_those_there_are(tmp_path: Path):
    with pytest.raises(UsageError, match=r"--quant q3_k: gguf knows f16, f32"):
        write(make_model(make_hyper("llama")), tmp_path / "m.gguf", "q3_k")


def test_a_key_that_no_file_holds_is_refused(tmp_path: Path):
    model = make_model(make_hyper("llama"))
    with pytest.raises(PocketlmError, match="the value of odd cannot be written"):
        write(replace(model, metadata={**model.metadata, "odd": {"a": 1}}), tmp_path / "m.gguf")


def test_memory_stays_small_beside_the_file(tmp_path: Path):
    psutil = pytest.importorskip("psutil", reason="psutil is not installed")
    rows = np.ones((1, 1024), np.float32)
    hyper = make_hyper("llama", n_layer=8, n_embd=1024, n_head=8, n_kv_head=8, head_dim=128, n_ff=1024)
    small = make_model(make_hyper("llama", n_layer=8, n_kv_head=6, n_ff=48))
    tensors: dict[str, CanonicalTensor] = {}
    for name, tensor in small.tensors.items():
        shape = tuple(1024 if size == 48 else size for size in tensor.shape)
        tensors[name] = CanonicalTensor(shape, lambda shape=shape: np.resize(rows, shape))
    sizes = [4 * math.prod(tensor.shape) for tensor in tensors.values()]
    peaks, process, before = [], psutil.Process(), psutil.Process().memory_info().rss
    write(
        CanonicalModel(hyper, tensors, {}, "test"),
        tmp_path / "m.gguf",
        "q8_0",
        progress=lambda *_: peaks.append(process.memory_info().rss),
    )
    assert max(peaks) - before < 4 * max(sizes) + (100 << 20) < sum(sizes)
