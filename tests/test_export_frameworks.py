"""What trainers and other frameworks leave behind: read exactly, or refused in a line that says what it is and what to do."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketlm.errors import FileError
from pocketlm.export.checkpoint import open_checkpoint
from pocketlm.export.dialects import read_canonical

ONE = np.arange(6, dtype=np.float32).reshape(2, 3)


def npz(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(f"{name}.npy", content)
    return path


def npy(descr: str, shape: str, data: bytes, fortran: bool = False) -> bytes:
    """An array as MLX writes it: without the comma that NumPy puts behind the last entry of the header."""
    header = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': ({shape})}}   \n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def test_arrays_that_mlx_saved_are_read(tmp_path: Path) -> None:
    upper_halves = (ONE.view(np.uint32) >> 16).astype("<u2").tobytes()
    entries = {
        "matrix": npy("<f4", "2, 3, ", ONE.tobytes()), "vector": npy("<f2", "3, ", ONE[1].astype("<f2").tobytes(), True),
        "number": npy("<f4", "", ONE[0, :1].tobytes(), True), "bfloat16": npy("<V2", "2, 3, ", upper_halves),
    }  # fmt: skip
    found = open_checkpoint(npz(tmp_path / "weights.npz", entries)).tensors
    for name, expected in (("matrix", ONE), ("vector", ONE[1]), ("number", ONE[0, 0]), ("bfloat16", ONE)):
        np.testing.assert_array_equal(found[name].read(), expected, err_msg=name)
    assert found["bfloat16"].dtype == "bfloat16"
    with pytest.raises(FileError, match="holds a tensor of type V8"):  # float8 of which kind?
        open_checkpoint(npz(tmp_path / "weights.npz", {"float8": npy("|V1", "3, ", b"123")}))


def test_arrays_that_mlx_itself_saved_are_read(tmp_path: Path) -> None:
    mlx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    mlx.savez(str(tmp_path / "w.npz"), a=mlx.array(ONE), b=mlx.array(ONE).astype(mlx.bfloat16))
    found = open_checkpoint(tmp_path / "w.npz").tensors
    np.testing.assert_array_equal(found["a"].read(), ONE)
    np.testing.assert_array_equal(found["b"].read(), ONE)


@pytest.mark.parametrize(
    ("name", "is_zip", "said"),
    [
        ("m.keras", True, "Keras model or another HDF5 file"), ("model.weights.h5", False, "Keras model or another HDF5 file"),
        ("tf_model.h5", False, "a model for TensorFlow"), ("flax_model.msgpack", False, "a model for Flax"),
        ("model.ckpt.index", False, "a TensorFlow model"), ("model.ckpt.data-00000-of-00001", False, "a TensorFlow model"),
        ("manifest.ocdbt", False, "JAX's Orbax"), ("__0_0.distcp", True, r"of torch.distributed.checkpoint.*dcp_to_torch"),
        ("m.onnx", False, "an ONNX model"), ("m.pt2", True, r"a program of torch.export; save the model's state_dict"),
    ],
)  # fmt: skip
def test_the_files_of_other_frameworks_are_named(name: str, is_zip: bool, said: str, tmp_path: Path) -> None:
    if is_zip:
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr("x", b"")
    else:
        (tmp_path / name).write_bytes(b"\x08\x01 anything")
    with pytest.raises(FileError, match=f"{re.escape(name)}: is .*{said}"):
        open_checkpoint(tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileError, match=f": holds .*{said.split('.*')[0].split(';')[0]}, {re.escape(name)}, and no checkpoint"):
        open_checkpoint(tmp_path)


def test_a_program_of_torch_export_by_another_name(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch makes the program")
    program = torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),))
    torch.export.save(program, str(tmp_path / "m.pt2"))
    (tmp_path / "m.pt2").rename(tmp_path / "m.pt")
    with pytest.raises(FileError, match=r"m.pt: is a program of torch.export; save the model's state_dict\(\)"):
        open_checkpoint(tmp_path / "m.pt")


def test_the_shards_of_the_model_are_meant_not_the_optimisers(tmp_path: Path) -> None:
    for folder in ("optimizer_0", "pytorch_model_fsdp_0"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__0_0.distcp").write_bytes(b"PK")
    np.savez(tmp_path / "rng_state.npz", a=ONE)
    with pytest.raises(FileError, match=re.escape(f"dcp_to_torch {tmp_path / 'pytorch_model_fsdp_0'} model.pt")):
        open_checkpoint(tmp_path)


def test_the_files_of_a_training_state_beside_the_weights_are_left_alone(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="makes the checkpoints")
    for name in ("optimizer.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        torch.save({"x": torch.zeros(2, 3)}, tmp_path / name)
    for name in ("mine.pt", "pytorch_model_fsdp.bin"):  # the second comes first where both are there
        torch.save({"w": torch.from_numpy(ONE) + len(name)}, tmp_path / name)
        np.testing.assert_array_equal(open_checkpoint(tmp_path).tensors["w"].read(), ONE + len(name))


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def llama() -> tuple[dict[str, Any], dict[str, Any]]:
    """A folder's tensors and configuration."""
    models = pytest.importorskip("torch_models", reason="PyTorch makes the weights")
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "max_position_embeddings": 64, "hidden_act": "silu", "tie_word_embeddings": True,
    }  # fmt: skip
    return models.initialise(models.Decoder(models.NAMES, "halves")).state_dict(), config


@pytest.mark.parametrize("prefix", ["student.", "policy.actor.", "model._orig_mod."])
def test_the_attribute_that_a_training_class_keeps_the_model_in_does_not_matter(prefix: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="makes the checkpoints")

    weights, config = llama()
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(weights, tmp_path / "plain.pt")
    state = {"state_dict": {prefix + name: tensor for name, tensor in weights.items()}, "pytorch-lightning_version": "2.6.6"}
    torch.save(state, tmp_path / "epoch=1-step=3.ckpt")
    expected = read_canonical(tmp_path / "plain.pt", tokenizer="none").tensors
    found = read_canonical(tmp_path / "epoch=1-step=3.ckpt", tokenizer="none").tensors
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].read(), tensor.read(), err_msg=name)
    state["state_dict"] |= {"teacher." + name: tensor for name, tensor in weights.items()}
    torch.save(state, tmp_path / "two.ckpt")
    with pytest.raises(FileError, match="tensors have no place in the model"):
        read_canonical(tmp_path / "two.ckpt", tokenizer="none")


@pytest.mark.parametrize(
    ("added", "said", "config"),
    [
        ("x.weight.quant_state.bitsandbytes__nf4", r"quantised \(bitsandbytes\)", {}), ("x.SCB", r"\(bitsandbytes\)", {}),
        ("x.biases", r"\(mlx\); .* or what mlx_lm.convert -d makes of it", {"bits": 4, "group_size": 64}),
        ("x.qzeros", r"\(gptq or awq\)", {}), ("x.weight_scale_inv", r"\(scales apart\)", {}),
        ("x.weight_packed", r"\(compressed-tensors\)", {"quant_method": "compressed-tensors"}),
        ("", r"\(bitsandbytes\); .*if they are plain numbers, take quantization_config out", {"quant_method": "bitsandbytes"}),
        ("x.scale", "1 of .* tensors have no place", {}),
    ],
)  # fmt: skip
def test_quantised_weights_are_called_so(added: str, said: str, config: dict[str, Any], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="makes the checkpoints")

    weights, said_there = llama()
    (tmp_path / "config.json").write_text(json.dumps({**said_there, "quantization_config": config}))
    torch.save({**weights, **({added: torch.ones(3)} if added else {})}, tmp_path / "m.pt")
    with pytest.raises(FileError, match=said):
        read_canonical(tmp_path / "m.pt", tokenizer="none")
