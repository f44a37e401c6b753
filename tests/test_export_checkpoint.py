"""Checkpoints of every container give the tensors and the configuration that PyTorch, safetensors and NumPy put in."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import struct
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketlm.errors import FileError
from pocketlm.export.checkpoint import name_of, open_checkpoint

torch = pytest.importorskip("torch", reason="writes the checkpoints")

DTYPES = [
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64",
    "bool",
    "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip
NEW_ONLY = {"uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"}  # PyTorch cannot save these in its old format
FORMATS = pytest.mark.parametrize("new_format", [True, False], ids=["zip", "old"])


def saved(folder: Path, content: Any, new_format: bool = True) -> Path:
    torch.save(content, folder / "ckpt.pt", _use_new_zipfile_serialization=new_format)
    return folder / "ckpt.pt"


def as_float32(tensor: Any) -> np.ndarray:
    return tensor.detach().to(torch.float32).numpy()


def check(path: Path) -> None:
    """Every tensor of the state dict is what torch.load reads."""
    expected = torch.load(path, weights_only=True)
    found = open_checkpoint(path).tensors
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        values = found[name].read()
        assert values.dtype == np.float32
        assert values.flags.c_contiguous
        assert values.shape == found[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(values, as_float32(tensor), err_msg=name)


@pytest.mark.parametrize(
    ("dtype", "new_format"), [(d, new) for d in DTYPES for new in (True, False) if new or d not in NEW_ONLY]
)
def test_every_dtype(dtype: str, new_format: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    if dtype.startswith(("float8", "bfloat16")):
        n_bytes = 256 if dtype.startswith("float8") else 65536  # every value there is
        codes = np.arange(n_bytes, dtype=np.uint8 if n_bytes == 256 else np.uint16)
        tensor = torch.from_numpy(codes.view(np.uint8)).view(getattr(torch, dtype)).reshape(2, -1)
    else:
        tensor = (torch.randn(3, 5, generator=generator) * 40).abs().to(getattr(torch, dtype))
    check(saved(tmp_path, {"w": tensor, "scalar": tensor[0, 0], "empty": tensor[:0]}, new_format))


@FORMATS
def test_views_of_one_storage(new_format: bool, tmp_path: Path) -> None:
    base = torch.randn(8, 6, 4)
    views = {
        "whole": base, "transposed": base.permute(2, 0, 1), "part": base[2:5, 1:3, ::2], "row": base[3, 4], "again": base,
        "expanded": base[0, 0, :1].expand(100), "parameter": torch.nn.Parameter(base[1]),
    }  # fmt: skip
    path = saved(tmp_path, views, new_format)
    check(path)
    tensors = open_checkpoint(path).tensors
    assert tensors["whole"].source == tensors["again"].source != tensors["transposed"].source


@dataclasses.dataclass
class ModelArgs:
    n_head: int = 4
    dropout: float = 0.1
    names: tuple[str, ...] = ("a", "b")


class Config(dict):  # as EasyDict and others
    pass


@FORMATS
def test_configurations_of_every_kind_are_plain_data(new_format: bool, tmp_path: Path) -> None:
    config = {
        "dataclass": ModelArgs(), "namespace": argparse.Namespace(n_layer=2, nested=argparse.Namespace(x=None)),
        "simple": types.SimpleNamespace(lr=1e-4), "dict": Config(vocab=7), "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(int, b=2), "path": pathlib.PurePosixPath("/data/x"), "device": torch.device("cpu"),
        "dtype": torch.bfloat16, "size": torch.Size([2, 3]), "set": {1}, "numpy": np.float64(0.5), "step": np.int64(7),
        "big": 2**100,
        "flag": True, "text": "Ğ", "bytes": b"no", 5: "number", "tensor": torch.ones(2),
    }  # fmt: skip
    checkpoint = open_checkpoint(saved(tmp_path, {"model": {"w": torch.ones(2, 2)}, "config": config}, new_format))
    assert checkpoint.config["config"] == {
        "dataclass": {"n_head": 4, "dropout": 0.1, "names": ["a", "b"]}, "namespace": {"n_layer": 2, "nested": {"x": None}},
        "simple": {"lr": 1e-4}, "dict": {"vocab": 7}, "ordered": {"a": 1}, "default": {"b": 2}, "path": "/data/x",
        "device": "cpu",
        "dtype": "torch.bfloat16", "size": [2, 3], "set": [1], "numpy": 0.5, "step": 7, "big": 2**100, "flag": True,
        "text": "Ğ",
        "bytes": None, "5": "number",
    }  # fmt: skip


WEIGHTS = {"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(3)}
OPTIMISER = {
    "state": {0: {"exp_avg": torch.ones(2, 2), "step": torch.tensor(5.0)}},
    "param_groups": [{"lr": 1e-3, "params": [0]}],
}


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"model": WEIGHTS, "optimizer": OPTIMISER, "best_val_loss": torch.tensor(1.5), "iter_num": 5},
        {"model_state_dict": WEIGHTS, "optimizer_state_dict": OPTIMISER, "epoch": 1},
        {"state_dict": WEIGHTS, "optimizer_states": [OPTIMISER], "pytorch-lightning_version": "2"},
        {"epoch": 1, "ema": WEIGHTS},
        {"ema": {name: tensor + 1 for name, tensor in WEIGHTS.items()}, "model": WEIGHTS},
        {"optim": OPTIMISER, "something": {"state_dict": WEIGHTS}},
        {"module": WEIGHTS, "optimizer": OPTIMISER},
        {"train_losses": [0.5] * 100_000, "rng_state": torch.ones(5056, dtype=torch.uint8), "gpt": WEIGHTS},
        {"model": {"a": {"weight": WEIGHTS["a.weight"]}, "b": {"weight": WEIGHTS["b.weight"]}}},
        {"_orig_mod.module.a.weight": WEIGHTS["a.weight"], "module._orig_mod.b.weight": WEIGHTS["b.weight"]},
        {"module.module.a._orig_mod.weight": WEIGHTS["a.weight"], "_orig_mod._orig_mod.b.weight": WEIGHTS["b.weight"]},
    ],
)
def test_the_weights_are_found_and_prefixes_go(content: Any, tmp_path: Path) -> None:
    tensors = open_checkpoint(saved(tmp_path, content)).tensors
    assert sorted(tensors) == ["a.weight", "b.weight"]
    assert tensors["a.weight"].read().tolist() == [[1, 1], [1, 1]]


def test_a_module_saved_whole_gives_its_parameters(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.LayerNorm(3))
    tensors = open_checkpoint(saved(tmp_path, module)).tensors
    assert set(tensors) == set(module.state_dict())
    np.testing.assert_array_equal(tensors["0.weight"].read(), as_float32(module.state_dict()["0.weight"]))


def test_names_that_become_the_same_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"two tensors are called a\.weight"):
        open_checkpoint(saved(tmp_path, {"module.a.weight": torch.ones(2), "a.weight": torch.zeros(2)}))


def test_a_checkpoint_without_weights_is_an_error(tmp_path: Path) -> None:
    for content in ({}, {"epoch": 3}, {"optimizer": OPTIMISER}, [1, 2]):
        with pytest.raises(FileError, match="holds no weights"):
            open_checkpoint(saved(tmp_path, content))


def test_checkpoints_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path, WEIGHTS)
    finally:
        torch.serialization.set_crc32_options(True)
    check(path)


# ── other containers ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_safetensors_of_every_dtype(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch", reason="writes the file")
    tensors = {name: (torch.randn(3, 5) * 20).abs().to(getattr(torch, name)) for name in DTYPES}
    library.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = open_checkpoint(tmp_path / "model.safetensors")
    assert found.config["metadata"] == {"format": "pt"}
    assert set(found.tensors) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found.tensors[name].read(), as_float32(tensor), err_msg=name)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_hugging_face_folder_in_several_files(ending: str, tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch", reason="writes the files")
    parts = [{f"layer.{i}.{j}": torch.randn(4, 3) for j in range(3)} for i in range(2)]
    places = {}
    for i, part in enumerate(parts):
        file = tmp_path / f"part-{i}.{ending}"
        library.save_file(part, file) if ending == "safetensors" else torch.save(part, file)
        places |= dict.fromkeys(part, file.name)
    stem = "model" if ending == "safetensors" else "pytorch_model"
    (tmp_path / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text(json.dumps({"n_head": 3}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config["config.json"] == {"n_head": 3}
    for name, tensor in {**parts[0], **parts[1]}.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), as_float32(tensor))
    (tmp_path / f"part-1.{ending}").unlink()
    with pytest.raises(FileError, match="there is no such file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save: Any, tmp_path: Path) -> None:
    chosen = np.random.default_rng(1)
    arrays = {
        **{np.dtype(kind).name: (chosen.standard_normal((3, 5)) * 20).astype(kind) for kind in ("f8", "f4", "f2", "i8", "i4",
        "i2", "i1")},
        "unsigned": np.arange(6, dtype=np.uint16), "bool": np.array([True, False]), "big": np.arange(6, dtype=">f4"),
        "fortran": np.asfortranarray(chosen.standard_normal((4, 3, 2))), "scalar": np.float32(2.5), "empty": np.zeros((0, 3)),
        "layers.0.w": chosen.standard_normal((200, 300)).astype("f4"),
    }  # fmt: skip
    save(tmp_path / "w.npz", **arrays)
    found = open_checkpoint(tmp_path / "w.npz").tensors
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name].read(), np.asarray(array, np.float32), err_msg=name)


@pytest.mark.parametrize(
    ("files", "said"),
    [((), "without a checkpoint"), (("a.pt", "b.pt"), "holds 2 checkpoints"), (("config.json",), "without a checkpoint")],
)
def test_folders_that_are_no_checkpoint(files: tuple[str, ...], said: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(FileError, match=said):
        open_checkpoint(tmp_path)


def test_a_training_folder_names_its_last_checkpoint(tmp_path: Path) -> None:
    for step in (900, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(FileError, match=r"without a checkpoint in it; name one of those in it, as .*checkpoint-1000"):
        open_checkpoint(tmp_path)


def test_one_file_of_a_sharded_model_names_the_folder(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "pytorch_model-00001-of-00003.bin")
    with pytest.raises(FileError, match="is one of the 3 files of a model; name the folder they lie in"):
        open_checkpoint(tmp_path / "pytorch_model-00001-of-00003.bin")


AVERAGE = {name: tensor * 0.5 for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"model": WEIGHTS, "ema": AVERAGE}, {"state_dict": WEIGHTS, "ema": {"decay": 0.9, "shadow": AVERAGE}, "step": 3},
        {"model": WEIGHTS, "ema": {"n_averaged": torch.tensor(7), **{f"module.{n}": t for n, t in AVERAGE.items()}}},
    ],
)  # fmt: skip
def test_of_two_sets_of_weights_one_is_chosen(content: dict[str, Any], tmp_path: Path) -> None:
    path = saved(tmp_path, content)
    first, second = open_checkpoint(path), open_checkpoint(path, "ema")
    assert (set(first.sets), second.sets[0]) == (content.keys() - {"step"}, "ema")
    assert first.sets[0] != "ema"
    np.testing.assert_array_equal(first.tensors["a.weight"].read(), 1.0)
    np.testing.assert_array_equal(second.tensors["a.weight"].read(), 0.5)
    with pytest.raises(FileError, match=r"has \w+, ema, nothing that is called emo; choose one of these"):
        open_checkpoint(path, "emo")


@pytest.mark.parametrize(
    "content", [WEIGHTS, {"model": WEIGHTS, "optimizer": AVERAGE}, {"net": {"a": WEIGHTS, "b": {"c": WEIGHTS}}}]
)
def test_one_set_of_weights_is_one(content: dict[str, Any], tmp_path: Path) -> None:
    assert open_checkpoint(saved(tmp_path, content)).sets == ()


def test_what_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    for path, said in ((tmp_path / "no.pt", "no such file"), (tmp_path / "empty.pt", "is empty")):
        with pytest.raises(FileError, match=said):
            open_checkpoint(path)


def test_reading_a_tensor_gives_its_pages_back(tmp_path: Path) -> None:
    """The peak of a process that reads all tensors of a mapped file one by one is far below the file's size."""
    resident = Path("/proc/self/statm")
    if not resident.exists():
        pytest.skip("the resident size is read from /proc")
    path = saved(tmp_path, {f"w{i}": torch.ones(1 << 21) for i in range(24)})  # 8 MB each
    checkpoint = open_checkpoint(path)

    def pages() -> int:
        return int(resident.read_text().split()[1])

    before = pages()
    for tensor in checkpoint.tensors.values():
        tensor.read()
    assert (pages() - before) * 4096 < 64 << 20


@pytest.mark.parametrize("length", [0x80, 0x4B50], ids=["as a pickle begins", "as a zip archive begins"])
def test_a_safetensors_file_is_one_whatever_its_length_looks_like(tmp_path: Path, length: int) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(length)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + header + struct.pack("<2f", 1.5, -2.0))
    assert open_checkpoint(tmp_path / "model.safetensors").tensors["w"].read().tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("verse/ckpt.pt", "verse"), ("verse/out/ckpt.pt", "verse"), ("verse/out/shakespeare.pt", "shakespeare"),
        ("out-tiny/model.safetensors.index.json", "out-tiny"), ("verse/checkpoint-500", "verse"), ("verse/last.ckpt", "verse"),
        ("verse/checkpoints/epoch=3-step=100.ckpt", "verse"), ("verse/latest", "verse"), ("стихи/model_000650.pt", "стихи"),
        ("tiny-verse", "tiny-verse"), ("verse/1.pth", "verse"), ("out/run/ckpt.pt", "ckpt"),
    ],
)  # fmt: skip
def test_a_checkpoint_called_as_all_are_is_called_after_its_folder(tmp_path, monkeypatch, path, expected):
    where = tmp_path / "data" / path
    (where if not where.suffix else where.parent).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "data")
    assert name_of(Path(path)) == name_of(where) == expected
    monkeypatch.chdir(where if where.is_dir() else where.parent)
    assert name_of(Path("." if where.is_dir() else where.name)) == expected
