"""The fp16 bin: written, read by a program that only knows the README, opened like a GGUF; broken folders are refused."""

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from canonical_models import GPT2, N_VOCAB, cosine, logits_of, make_hyper, make_model

from pocketlm.errors import FileError
from pocketlm.export.canonical import CanonicalModel, CanonicalTensor
from pocketlm.export.export import export
from pocketlm.export.from_model_file import read_model_file
from pocketlm.runtime.hyper import Hyper, read_hyper
from pocketlm.runtime.model_file import open_model, size_of
from pocketlm.tokenizer import from_metadata, load, to_metadata
from pocketlm.tokenizer.byte_bpe import LETTERS
from pocketlm.tokenizer.characters import from_table

IDS = np.random.default_rng(3).integers(0, N_VOCAB, 40)
HYPERS = {
    "llama": make_hyper("llama"),
    "alibi": make_hyper("refact", position="alibi"),
    "gpt2": make_hyper("gpt2", **GPT2),
    "own": make_hyper("pocketlm", position="none", activation="relu"),
}


def write(model: CanonicalModel, path: Path) -> Path:
    export(model, "checkpoint.pt", path, container="fp16")
    return path


@pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS.keys())
def test_logits_are_those_of_the_float32_weights(hyper: Hyper, tmp_path: Path):
    model = make_model(hyper)
    again = read_model_file(write(model, tmp_path / "bin"))
    assert again.hyper == model.hyper
    assert cosine(logits_of(again, IDS), logits_of(model, IDS)) > 0.9999


def test_a_program_that_only_knows_the_readme_reads_it(tmp_path: Path):
    model = make_model(make_hyper("llama"))
    folder = write(model, tmp_path / "bin")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    data, at = (folder / "weights.bin").read_bytes(), 0
    assert config["hyper"]["n_layer"] == 2
    for entry in config["tensors"]:
        count = math.prod(entry["shape"])
        assert entry["offset"] == at
        values = struct.unpack_from(f"<{count}e", data, at)
        np.testing.assert_array_equal(
            np.array(values).reshape(entry["shape"]), model.tensors[entry["name"]].read().astype("f2")
        )
        at += 2 * count
    assert at == len(data)
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    assert vocabulary["pieces"] == model.metadata["tokenizer.ggml.tokens"]
    assert len(vocabulary["pieces"]) == len(vocabulary["scores"]) == len(vocabulary["types"]) == N_VOCAB


@pytest.mark.parametrize("kind", ["characters", "byte_bpe", "sentencepiece"])
def test_the_folder_is_a_tokenizers_file_too(kind: str, tmp_path: Path):
    if kind == "sentencepiece":
        model = make_model(make_hyper("llama"))
    else:
        letters = [*LETTERS, "he", "Ġhe"] if kind == "byte_bpe" else list("abehl o")
        keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": letters, "tokenizer.ggml.merges": ["h e", "Ġ he"]}
        stoi = {letter: i for i, letter in enumerate(letters)}
        original = from_metadata(keys, "x") if kind == "byte_bpe" else from_table("x", stoi)
        model = make_model(make_hyper("llama", n_vocab=len(letters)))
        model = replace(model, metadata=to_metadata(original, len(letters)))
    export(model, "checkpoint.pt", tmp_path / "m", container="fp16")
    expected = from_metadata(model.metadata, "x")
    for text in ("hello", " a he  bo", "ab"):
        assert load(tmp_path / "m").encode(text) == expected.encode(text)


def test_metadata_and_tokenizer_are_the_ggufs(tmp_path: Path):
    model = make_model(make_hyper("llama"))
    export(model, "c", tmp_path / "tiny.gguf", container="gguf", quant="f16")
    write(model, tmp_path / "tiny")
    with open_model(tmp_path / "tiny.gguf") as gguf, open_model(tmp_path / "tiny") as folder:
        assert set(gguf.metadata) - set(folder.metadata) == {"general.file_type", "general.quantization_version"}
        for key, value in folder.metadata.items():
            expected = gguf.metadata[key]
            assert type(expected) is type(value), key
            np.testing.assert_allclose(value, expected) if isinstance(value, float | np.ndarray) else None
            assert isinstance(value, float | np.ndarray) or value == expected
        text = "the quick brown fox"
        assert from_metadata(gguf.metadata, "a").encode(text) == from_metadata(folder.metadata, "b").encode(text)


def test_a_gguf_becomes_a_folder_and_a_folder_a_gguf(tmp_path: Path):
    model = make_model(make_hyper("llama"))
    export(model, "c", tmp_path / "m.gguf", container="gguf", quant="f16")
    write(read_model_file(tmp_path / "m.gguf"), tmp_path / "bin")
    export(read_model_file(tmp_path / "bin"), "bin", tmp_path / "n.gguf", container="gguf", quant="f16")
    with open_model(tmp_path / "m.gguf") as a, open_model(tmp_path / "n.gguf") as b:
        matrices = [name for name in a.tensors if a.tensors[name].format.name == "F16"]
        for name in matrices:
            np.testing.assert_array_equal(a.tensors[name].data, b.tensors[name].data)
        assert read_hyper(a.metadata, N_VOCAB, "a") == read_hyper(b.metadata, N_VOCAB, "b")


def test_the_same_input_gives_the_same_bytes(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(make_model(make_hyper("llama")), tmp_path / name / "bin")
    for path in (tmp_path / "a" / "bin").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "bin" / path.name).read_bytes()


def test_an_old_folder_is_replaced_whole(tmp_path: Path):
    write(make_model(make_hyper("llama")), tmp_path / "bin")
    write(make_model(make_hyper("gpt2", **GPT2)), tmp_path / "bin")
    with open_model(tmp_path / "bin") as folder:
        assert folder.metadata["general.architecture"] == "gpt2"
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_an_old_folder_survives_a_failure(tmp_path: Path):
    model = make_model(make_hyper("llama"))
    write(model, tmp_path / "bin")
    before = {path.name: path.read_bytes() for path in (tmp_path / "bin").iterdir()}

    def interrupted() -> np.ndarray:
        raise KeyboardInterrupt

    last = list(model.tensors)[-1]
    broken = replace(model, tensors={**model.tensors, last: CanonicalTensor(model.tensors[last].shape, interrupted)})
    with pytest.raises(KeyboardInterrupt):
        write(broken, tmp_path / "bin")
    assert {path.name: path.read_bytes() for path in (tmp_path / "bin").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_a_folder_with_something_else_in_it_is_not_replaced(tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(FileError, match=r"thesis: is there already and holds chapter1.tex"):
        write(make_model(make_hyper("llama")), tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_weights_beyond_float16_are_refused(tmp_path: Path):
    model = make_model(make_hyper("llama"))
    tensors = {**model.tensors, "blk.0.attn_q.weight": CanonicalTensor((48, 48), lambda: np.full((48, 48), 1e6, np.float32))}
    with pytest.raises(FileError, match=r"tensor blk.0.attn_q.weight has weights up to 1e\+06"):
        write(replace(model, tensors=tensors), tmp_path / "bin")


def test_the_size_of_a_folder_is_that_of_its_files(tmp_path: Path):
    folder = write(make_model(make_hyper("llama")), tmp_path / "bin")
    assert size_of(folder) == sum(len(path.read_bytes()) for path in folder.iterdir())


# ── folders that are not sound ───────────────────────────────────────────────────────────────────────────────────────


def change(**values: Any) -> Any:
    return lambda config: config.update(values)


def first_tensor(**values: Any) -> Any:
    return lambda config: config["tensors"][0].update(values)


@pytest.mark.parametrize(
    "damage",
    [
        change(format="other"),
        change(version=2),
        change(tensors=[]),
        change(tensors={}),
        change(tensors=["x"]),
        change(metadata=[]),
        change(metadata={"a": {"b": 1}}),
        change(metadata={"a": [1, "b"]}),
        change(metadata={"a": [10**400, 0.5]}),
        first_tensor(shape=[]),
        first_tensor(shape=[0, 48]),
        first_tensor(shape=[-1, 48]),
        first_tensor(shape=[True, 48]),
        first_tensor(shape=["9", 48]),
        first_tensor(shape=[1 << 62, 1 << 62]),
        first_tensor(shape=[1, 1, 1, 1, 48]),
        first_tensor(offset=2),
        first_tensor(offset=-2),
        first_tensor(name=None),
        lambda config: config["tensors"].append(config["tensors"][0]),
        lambda config: config["tensors"].pop(),
        lambda config: config["tensors"].reverse(),
    ],
)
def test_a_damaged_configuration_is_one_line(damage: Any, tmp_path: Path):
    folder = write(make_model(make_hyper("llama")), tmp_path / "bin")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    damage(config)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(FileError) as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "vocab.json"])
@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100000])
def test_a_file_that_is_no_json_object_is_one_line(name: str, content: bytes, tmp_path: Path):
    folder = write(make_model(make_hyper("llama")), tmp_path / "bin")
    (folder / name).write_bytes(content)
    with pytest.raises(FileError, match=name):
        open_model(folder)


@pytest.mark.parametrize("n_bytes", [0, 1, 1000])
def test_weights_cut_short_are_one_line(n_bytes: int, tmp_path: Path):
    folder = write(make_model(make_hyper("llama")), tmp_path / "bin")
    (folder / "weights.bin").write_bytes((folder / "weights.bin").read_bytes()[:n_bytes])
    with pytest.raises(FileError, match=r"weights.bin"):
        open_model(folder)


def test_a_folder_of_something_else_says_what_to_do(tmp_path: Path):
    with pytest.raises(FileError, match="pocketlm export"):
        open_model(tmp_path)
