"""What the tests of checkpoints share: saving one, and comparing what is written of it with the PyTorch module it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from canonical_models import cosine
from llama_reference import LlamaReference

from pocketlm.export import dialects
from pocketlm.export.canonical import CanonicalModel
from pocketlm.export.export import export
from pocketlm.runtime.hyper import read_hyper
from pocketlm.runtime.model_file import open_model
from pocketlm.runtime.numpy_executor import NumpyExecutor
from pocketlm.runtime.plan import make_plan

torch = pytest.importorskip("torch", reason="checkpoints are made with PyTorch")

IDS = [3, 14, 15, 9, 26, 5, 35, 58, 0, 60, 7, 7]
SPELLINGS = [  # arguments of torch_models.spelled
    ("tok_emb", "layers", "attn", "ffn", ("norm1", "norm2", "norm")),
    ("embed", "blocks", "attention", "mlp", ("attn_norm", "ffn_norm", "norm_f")),
    ("embed_tokens", "h", "attn", "ffn", ("ln1", "ln2", "ln_f")),
    (
        "transformer.embed_tokens",
        "transformer.layers",
        "attention",
        "feed_forward",
        ("attention_norm", "ffn_norm", "final_norm"),
    ),
    ("token_embedding", "blocks", "self_attn", "ff", ("norm_1", "norm_2", "norm_out")),
]
MAP = """
# a model that nobody foresaw
drop = ["stem.{i}.drawing", "note"]

[set]
n_head = 4
activation = "gelu_erf"  # exact
norm_eps = 1e-5
norm = "layer"

[names]
"words" = "token_embd.weight"
"places" = "position_embd.weight"
"stem.{i}.a.gain" = "blk.{i}.attn_norm.weight"
"stem.{i}.qkv_all" = "blk.{i}.attn_qkv.weight"
"stem.{i}.mix" = "blk.{i}.attn_output.weight"
"stem.{i}.b.gain" = "blk.{i}.ffn_norm.weight"
"stem.{i}.wide" = "blk.{i}.ffn_up.weight"
"stem.{i}.narrow" = "blk.{i}.ffn_down.weight"
last = "output_norm.weight"
"""


def read_canonical(path: Path, **options: Any) -> CanonicalModel:
    """The model with a tokenizer of 61 characters, for llama.cpp loads none without one."""
    characters = path.parent / "characters.json"
    characters.write_text(json.dumps([chr(33 + i) for i in range(60)] + [" "]))
    return dialects.read_canonical(path, tokenizer=characters, **options)


def logits_of(path: Path, ids: list[int], step: int = 0) -> np.ndarray:
    """The numpy executor's logits on a model file; with `step`, that many tokens at a time through the cache."""
    with open_model(path) as file:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        plan = make_plan(read_hyper(file.metadata, shapes["token_embd.weight"][0], path), shapes, path)
        executor = NumpyExecutor(plan, file.tensors, len(ids), 1)
        step = step or len(ids)
        parts = [executor.forward(np.array(ids[i : i + step]), rows="all") for i in range(0, len(ids), step)]
        executor.close()
    return np.concatenate(parts)


def onnx_logits_of(path: Path, ids: list[int], step: int = 0) -> np.ndarray:
    """onnxruntime's logits, the cache going from one call to the next."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the ONNX file")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    past = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs() if i.name.startswith("past")
    }
    names = [output.name for output in session.get_outputs()]
    parts, step = [], step or len(ids)
    for start in range(0, len(ids), step):
        now = np.array([ids[start : start + step]])
        mask = np.ones((1, start + now.shape[1]), np.int64)
        results = dict(zip(names, session.run(names, {"input_ids": now, "attention_mask": mask, **past}), strict=True))
        past = {name: results[name.replace("past_key_values", "present")] for name in past}
        parts.append(results["logits"][0])
    return np.concatenate(parts)


def check(module: Any, model: CanonicalModel, folder: Path, ids: list[int] = IDS) -> None:
    """What is written of `model`, in every container, computes what the PyTorch module does, with the cache and without."""
    with torch.no_grad():
        expected = module(torch.tensor(ids)).numpy()
    files = {"gguf": folder / "out.gguf", "fp16": folder / "out", "onnx": folder / "out.onnx"}
    for container, path in files.items():
        export(model, "test", path, container=container, quant="f16" if container == "fp16" else "f32", n_threads=1)
    for step in (0, 1):
        for logits in (logits_of(files["gguf"], ids, step), onnx_logits_of(files["onnx"], ids, step)):
            assert np.abs(logits - expected).max() < 1e-4
        half = logits_of(files["fp16"], ids, step)
        assert cosine(half, expected) > 0.9999
    if model.hyper.architecture != "pocketlm":
        with LlamaReference(files["gguf"]) as reference:
            assert cosine(reference.logits(ids), expected) > 0.999


def compiled(module: Any) -> dict[str, Any]:
    state = torch.compile(module).state_dict()
    assert all(name.startswith("_orig_mod.") for name in state)
    return state


def save(folder: Path, content: Any, name: str = "ckpt.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def hf_folder(folder: Path, module: Any, config: dict[str, Any]) -> Path:
    """A Hugging Face folder: config.json and model.safetensors."""
    safetensors = pytest.importorskip("safetensors.torch", reason="writes the checkpoint")
    safetensors.save_file(
        {name: t.contiguous().clone() for name, t in module.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder
