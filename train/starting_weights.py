"""What a run begins with: weights that were trained before, here or elsewhere, and the tokenizer and template beside them.

In: whatever `pocketlm export` reads: a checkpoint of this trainer or of nanoGPT, a Hugging Face folder, a GGUF, … Out: a
`Decoder` that computes the same. Knows no names but the canonical ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch

from pocketlm import tokenizer
from pocketlm.errors import FileError, UsageError, did_you_mean
from pocketlm.export.canonical import CanonicalModel, CanonicalTensor
from pocketlm.export.dialects import read_canonical, role_of
from pocketlm.export.from_model_file import is_model_file
from pocketlm.export.tensor_parts import interleave, split_qkv
from pocketlm.export.tokenizer_data import PUBLISHED, chat_template, load_named
from pocketlm.runtime.hyper import Hyper
from pocketlm.tokenizer import Tokenizer
from pocketlm.train.decoder import ALIBI_MAX_BIAS, Decoder
from pocketlm.train.presets import CHOICES, Settings, Shape
from pocketlm.train.vocabularies import FILES, KINDS

ARCHITECTURES = ("gpt2", "llama", "refact", "pocketlm")  # whose operations are the decoder's


def read_start(
    path: Path, settings: Settings, rope_theta: float = 0.0, said: Mapping[str, str] | None = None
) -> tuple[Decoder, list[str]]:
    """A model with the weights in a file or folder, for `settings.context` positions (0: its own), and notes for the user.
    If it has some biases and lacks others, these begin as zeros. `said`: names and values of `--set`, for what the weights do
    not say themselves.

    Raises FileError if this is no checkpoint, or of a model that the decoder cannot be; UsageError if its table of positions is
    too short.
    """
    if said and is_model_file(path):
        raise UsageError(f"--set says what weights do not say; {path} says all of it")
    model = read_canonical(path, overrides=said, tokenizer="none")
    shape = _shape(path, model)
    if shape.position == "learned" and settings.context > shape.n_ctx:
        problem = f"the model has learned positions, for {shape.n_ctx} tokens; give at most that"
        raise UsageError(f"--context {settings.context}: {problem}")
    shape = replace(shape, n_ctx=max(settings.context, shape.n_ctx), rope_theta=rope_theta or shape.rope_theta)
    decoder, weights = Decoder(shape, settings.dropout, settings.checkpointing), _weights(model)
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            canonical = role_of(name) or name
            value = weights.pop(canonical, None)
            if value is not None and tuple(value.shape) == tuple(weight.shape):
                weight.copy_(torch.from_numpy(value.read()))
            elif value is None and name.endswith("bias"):
                weight.zero_()
            else:
                raise FileError(path, f"has no {canonical} of the shape {tuple(weight.shape)}", "it cannot be trained here")
    if weights:
        raise FileError(path, f"has {next(iter(weights))}, which this trainer does not know", "it cannot be trained here")
    return decoder, [note for note in model.notes if "tokenizer" not in note]


def _shape(path: Path, model: CanonicalModel) -> Shape:
    hyper, rope = model.hyper, model.hyper.rope
    known = {f.name for f in fields(Shape)} | {"architecture", "head_dim", "rope", "alibi_max_bias"}
    strange = ["architecture"] if hyper.architecture not in ARCHITECTURES else []
    strange += [f.name for f in fields(Hyper) if f.name not in known and getattr(hyper, f.name) not in (f.default, {})]
    strange += [name for name in CHOICES if getattr(hyper, name, CHOICES[name][0]) not in CHOICES[name]]
    strange += ["head_dim"] if hyper.n_head * hyper.head_dim != hyper.n_embd else []
    strange += ["alibi_max_bias"] if hyper.position == "alibi" and hyper.alibi_max_bias != ALIBI_MAX_BIAS else []
    if rope and (rope.scaling != "none" or rope.n_dims != hyper.head_dim or "rope_freqs.weight" in model.tensors):
        strange.append("rope")
    if strange:
        raise FileError(path, f"has {strange[0]} = {getattr(hyper, strange[0])}, which this trainer has not", "train another")
    same = {f.name: getattr(hyper, f.name) for f in fields(Shape) if hasattr(hyper, f.name)}
    learnt = model.tensors.keys() - model.added
    bias, tied = any(name.endswith(".bias") for name in learnt), "output.weight" not in learnt
    return Shape(**same, rope_theta=rope.theta if rope else 10000.0, bias=bias, tied=tied)


def _weights(model: CanonicalModel) -> dict[str, CanonicalTensor]:
    """What was learnt, with q, k and v apart and the two of a rotary pair half a head apart."""
    hyper = model.hyper
    weights = {name: tensor for name, tensor in model.tensors.items() if name not in model.added}
    split_qkv(weights, hyper.q_width, hyper.kv_width)
    if hyper.rope and hyper.rope.pairs == "interleaved":
        interleave(weights, (hyper.n_head, hyper.n_kv_head, hyper.head_dim), hyper.rope.n_dims, back=True)
    return weights


def add_rows(model: Decoder, first: int, n_vocab: int) -> None:
    """Make it a model of `n_vocab` tokens; those from `first` on are new. Their rows in the token table, and in an output
    matrix that is not tied to it, are drawn around the mean of the others with a tenth of their standard deviation.
    """
    dice = torch.Generator().manual_seed(first)
    for layer in (model.tok_emb, model.head):
        if layer is not None:
            old = layer.weight.data[:first]
            new = torch.randn((n_vocab - first, old.shape[1]), generator=dice) * old.std(0) / 10 + old.mean(0)
            layer.weight = torch.nn.Parameter(torch.cat([old, new]))
    model.tok_emb.num_embeddings, model.shape = n_vocab, replace(model.shape, n_vocab=n_vocab)


def taken(kind: str, start: str | None) -> Tokenizer:
    """The tokenizer of a run: `--tokenizer`'s, else that of the weights it starts from. Raises UsageError for none."""
    if kind not in KINDS:
        if not Path(kind).exists() and kind not in PUBLISHED:
            kinds = (*KINDS, *PUBLISHED)
            expected = f"{', '.join(kinds)}, or a tokenizer's file or folder{did_you_mean(kind, kinds)}"
            raise UsageError(f"--tokenizer {kind}: expected {expected}")
        return load_named(kind)
    folder = path if (path := Path(start or "")).is_dir() else path.parent
    if not is_model_file(path) and any((folder / name).is_file() for name in FILES):
        return tokenizer.load(folder)
    return tokenizer.from_metadata(read_canonical(path).metadata, path)


def template_beside(start: Path) -> str | None:
    """The chat template of such weights, as Jinja."""
    if not is_model_file(start):
        return chat_template(start if start.is_dir() else start.parent)
    template = read_canonical(start).metadata.get("tokenizer.chat_template")
    return template if isinstance(template, str) else None
