"""A model file as something to export again: requantisation of a GGUF, and the way from a GGUF to the other containers.

In: a GGUF or an fp16 bin. Out: a `CanonicalModel` that keeps every key of the file. Knows no checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pocketlm.errors import FileError
from pocketlm.export.arrays import LazyTensor
from pocketlm.export.canonical import CanonicalModel, CanonicalTensor
from pocketlm.export.checkpoint import Checkpoint
from pocketlm.export.tensor_parts import interleave
from pocketlm.export.tokenizer_data import find_tokenizer
from pocketlm.runtime.architectures.table import ARCHITECTURES
from pocketlm.runtime.fp16_bin_reader import is_fp16_bin
from pocketlm.runtime.gguf_reader import GGUF, TILED
from pocketlm.runtime.hyper import read_hyper
from pocketlm.runtime.model_file import open_model
from pocketlm.runtime.model_summary import not_learnt


def is_model_file(path: Path) -> bool:
    """Whether this is a GGUF, a packed executable or an fp16 bin; by its first bytes, or the files in the folder."""
    from pocketlm.runtime.container import beginning, find, is_program

    return is_fp16_bin(path) or beginning(path) == b"GGUF" or (is_program(path) and find(path) is not None)


def read_model_file(path: Path, change: Callable[[Checkpoint], Checkpoint] | None = None) -> CanonicalModel:
    """The model in a GGUF or an fp16 bin; `change` is applied to its tensors as to a checkpoint's.

    Raises FileError if there is no model in it, or none that pocketlm runs.
    """
    opened = open_model(path)
    if "token_embd.weight" not in opened.tensors:
        raise FileError(path, "it holds a vocabulary but no model", "name a file with weights")
    hyper = read_hyper(opened.metadata, opened.tensors["token_embd.weight"].shape[0], path)
    tensors = {name: CanonicalTensor(tensor.shape, tensor.to_float32) for name, tensor in opened.tensors.items()}
    metadata = {key: value for key, value in opened.metadata.items() if key != TILED and not key.startswith("split.")}
    formats = sorted({tensor.format.name for tensor in opened.tensors.values()} - {"F32", "F16", "BF16"})
    notes = [f"{path.name} was quantised already ({', '.join(formats)}): what that lost stays lost"] if formats else []
    kind = "GGUF" if isinstance(opened, GGUF) else "fp16 bin"
    model = CanonicalModel(hyper, tensors, metadata, kind, notes, added=not_learnt(opened.tensors))
    return _changed(model, path, change) if change else model


def with_tokenizer(model: CanonicalModel, path: Path, tokenizer: str) -> CanonicalModel:
    """`model`, from a model file without a tokenizer, with the one in the file or folder `tokenizer`. Raises FileError."""
    keys, notes = find_tokenizer(Checkpoint(path, {}, {}, (path,)), model.hyper.n_vocab, tokenizer)
    return replace(model, metadata={**model.metadata, **keys}, notes=[*model.notes, *notes])


def _changed(model: CanonicalModel, path: Path, change: Callable[[Checkpoint], Checkpoint]) -> CanonicalModel:
    """The model after `change`, which is given the rows of queries and keys in the order of Hugging Face's checkpoints."""
    hyper, rope = model.hyper, model.hyper.rope
    heads = (hyper.n_head, hyper.n_kv_head, hyper.head_dim)
    usual = ARCHITECTURES[hyper.architecture].USUAL.get("rope_pairs")
    turned = rope if rope and rope.pairs == usual == "interleaved" else None
    shown = dict(model.tensors)
    if turned:
        interleave(shown, heads, turned.n_dims, back=True)
    before = {name: LazyTensor(name, t.shape, "float32", t.read) for name, t in shown.items()}
    after = change(Checkpoint(path, before, {}, (path,))).tensors
    changed = {name: CanonicalTensor(t.shape, t.read) for name, t in after.items() if t is not before.get(name)}
    if turned:
        interleave(changed, heads, turned.n_dims)
    return replace(model, tensors={**model.tensors, **changed})
