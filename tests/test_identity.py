"""What a model is called and recognised by: by its weights, not by its file."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from packing import fake_stub
from tiny_models import write_model

import pocketlm
from pocketlm.build.pack import open_stub, pack
from pocketlm.build.persona import Persona
from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.identity import fingerprint, readable_name
from pocketlm.runtime.model_file import open_model
from pocketlm.runtime.native.tiling import LAYOUTS
from pocketlm.runtime.tensor import Tensor


def identified(path):
    with open_model(path) as file:
        return fingerprint(file.tensors)


def test_a_copy_with_another_name_and_template_is_the_same_model(tmp_path):
    path = write_model(tmp_path / "a.gguf", metadata={"general.name": "Ada"})
    renamed = write_model(tmp_path / "b.gguf", metadata={"general.name": "Bob", "tokenizer.chat_template": "{{ messages }}"})
    shutil.copy(path, tmp_path / "c.gguf")
    assert identified(path) == identified(renamed) == identified(tmp_path / "c.gguf")
    with pocketlm.load(path, backend="numpy") as model:
        assert model.fingerprint == identified(path)
        assert len(model.fingerprint) == 32


def test_other_weights_formats_and_shapes_are_other_models(tmp_path):
    variants = [{}, {"seed": 1}, {"format": "Q8_0"}, {"n_layer": 1}, {"arch": "gpt2"}]
    files = [write_model(tmp_path / f"{n}.gguf", **options) for n, options in enumerate(variants)]
    assert len(set(map(identified, files))) == len(files)


def test_every_matrix_counts(tmp_path):
    path = write_model(tmp_path / "a.gguf", n_layer=1)
    found = set()
    with open_model(path) as file:
        for name, tensor in file.tensors.items():
            data = tensor.data.copy()
            data[:] ^= 1
            changed = {**file.tensors, name: type(tensor)(name, tensor.shape, tensor.format, data, 0, tensor.path)}
            found.add(fingerprint(changed))
        assert len(found) == len(file.tensors)


@pytest.mark.parametrize("format", LAYOUTS)
@pytest.mark.parametrize("n_embd", [256, 512])
def test_a_packed_model_is_recognised_as_its_gguf(format, n_embd, tmp_path):
    path = write_model(tmp_path / "model.gguf", format=format, n_embd=n_embd, n_ff=256, n_layer=1, rows=None)
    packed = pack(path, open_stub(fake_stub(tmp_path / "stub")), tmp_path / "friend", Persona())
    with open_model(packed) as file:
        assert format == "F32" or any(tensor.tiled for tensor in file.tensors.values())
    assert identified(packed) == identified(path)


@pytest.mark.parametrize("format", LAYOUTS)
def test_of_a_large_matrix_a_few_bytes_are_read(format):
    n_bytes = 1_000_000 * 1024 // LAYOUTS[format].block_size * LAYOUTS[format].block_bytes
    data = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (n_bytes,), (0,))  # gigabytes that nobody has
    tensor = Tensor(
        "a", (1_000_000, 1024), FORMATS[format], data, 0, Path("a.gguf")
    )
    assert 1 <= len(tensor.sample()) <= 64


@pytest.mark.parametrize(
    ("name", "path", "shown"),
    [
        ("Pocket", "small-talk.gguf", "Pocket"),
        ("Smollm2 135M 8k Lc100K Mix1 Ep2", "SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("Llama 3.2 1B Instruct", "x.gguf", "Llama 3.2 1B Instruct"),
        ("Phi 3 Mini 4k Instruct", "x.gguf", "Phi 3 Mini 4k Instruct"),
        ("Qwen2.5 0.5B", "x.gguf", "Qwen2.5 0.5B"),
        ("Stories Mix1", "x.gguf", "Stories Mix1"),
        ("ckpt 20000", "chekhov-q8_0.gguf", "chekhov"),
        ("my model step_4000", "tales.f16.gguf", "tales"),
        ("12fd25f77366fa6b3b4b768ec3050bf629380bac", "tales-BF16.gguf", "tales"),
        ("", "tales.gguf", "tales"),
        (None, "q4_0.gguf", "q4_0"),
        (7, "my.best.gguf", "my.best"),
        ("ckpt", "ckpt.gguf", "ckpt"),
    ],
)
def test_a_name_is_for_people(name, path, shown):
    metadata = {} if name is None else {"general.name": name}
    assert readable_name(metadata, Path(path)) == shown
