"""`pocketlm export`: its arguments, and what it prints. Progress goes to a terminal's stderr, the receipt to stdout."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketlm.cli_options import read_text
from pocketlm.errors import UsageError
from pocketlm.runtime.atomic import check_other
from pocketlm.terminal_text import StatusLine, print

if TYPE_CHECKING:
    from pocketlm.export.canonical import CanonicalModel

BAR = 24  # characters of the progress bar


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `pocketlm export`."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a .pt, .safetensors or .npz file, a folder of one, a GGUF, or its short name"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="a .gguf or .onnx file; any other name makes a folder (fp16 bin)"
    )
    parser.add_argument("--to", metavar="KIND", help="gguf, fp16, onnx, ollama or huggingface; default: what OUT's ending says")
    model_options(parser)
    parser.add_argument(
        "--verify", nargs="?", const="", metavar="FILE", help="run the result and the float32 weights over a text and compare"
    )


_OF_CHECKPOINTS = ("set", "map", "tokenizer")  # a model file says all of that itself


def model_options(parser: argparse._ActionsContainer) -> None:
    """Declare what a model becomes on its way from a checkpoint, which `read_model` reads. `pocketlm pack` takes these, too."""
    quant = (
        "GGUF: f32 f16 (default) bf16 q8_0 q6_k q5_k_m q5_k q5_1 q5_0 q4_k_m q4_k q4_1 q4_0 iq4_nl mxfp4 q3_k_m; "
        "ONNX: f32 (default) f16 int8; Hugging Face: f16 (default) f32 bf16"
    )
    pure = "every matrix in the same format, the output too, none in a better one"
    imatrix = "a text like those the model is for, or llama.cpp's importance matrix: quantised to be good at that"
    settings = "what the checkpoint does not say, as n_head=12; may be given again"
    tokenizer = "tokenizer.json, .model, gpt2, …, where it is not beside the checkpoint; none: token ids only"
    lora = "a LoRA to merge: PEFT's folder, or a checkpoint with .lora.A and .lora.B"
    scale = "what the LoRA is multiplied by, where it does not say so itself"
    name = "what the model calls itself; default: the checkpoint's name, or its folder's"
    parser.add_argument("--quant", metavar="FORMAT", help=quant)
    parser.add_argument("--pure", action="store_true", help=pure)
    parser.add_argument("--imatrix", metavar="FILE", help=imatrix)
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help=settings)
    parser.add_argument("--map", metavar="FILE", help="a TOML file with the names of a code base that is not recognised")
    parser.add_argument("--tokenizer", metavar="FILE", help=tokenizer)
    parser.add_argument("--lora", metavar="PATH", help=lora)
    parser.add_argument("--lora-scale", type=float, metavar="X", help=scale)
    parser.add_argument("--name", metavar="NAME", help=name)
    parser.add_argument(
        "--chat-template", metavar="NAME", help="the model's chat template: chatml, markers, alpaca, plain or a Jinja file"
    )


def run(arguments: argparse.Namespace) -> int:
    """Export, and print the receipt; the exit status. Raises PocketlmError."""
    from pocketlm.export.export import container_for, export
    from pocketlm.model import find_model

    source, out = find_model(arguments.checkpoint), Path(arguments.output)
    check_other(out, inputs(arguments, source))
    container = container_for(out, arguments.to)
    text = read_text(arguments.verify) if arguments.verify else None
    model = read_model(arguments, source)
    with Progress(sum(math.prod(tensor.shape) for tensor in model.tensors.values())) as progress:
        receipt = export(
            model, source, out, container=container, quant=arguments.quant, pure=arguments.pure, progress=progress.step,
            importance=read_importance(arguments, model),
        )  # fmt: skip
    print(*receipt.lines(), sep="\n")
    if arguments.verify is not None:
        from pocketlm.export.verify import verify

        print(verify(model, out, text).line())
    return 0


def inputs(arguments: argparse.Namespace, source: Path) -> list[Path]:
    """The files and folders that a command reads besides writing its output: `source`, and what its options name."""
    from pocketlm.runtime.model_file import parts_of

    options = ("map", "tokenizer", "lora", "imatrix", "chat_template", "verify", "stub", "icon")
    named = (getattr(arguments, option, None) for option in options)
    return [*parts_of(source), *(Path(name) for name in named if name)]


def read_model(arguments: argparse.Namespace, source: Path) -> CanonicalModel:
    """The model, changed as the options say. Raises PocketlmError."""
    from dataclasses import replace

    from pocketlm.export.dialects import read_canonical
    from pocketlm.export.from_model_file import is_model_file, with_tokenizer
    from pocketlm.export.lora import read_lora
    from pocketlm.export.model_config import read_pairs
    from pocketlm.export.tokenizer_data import chat_template
    from pocketlm.tokenizer.readers import find_in

    if arguments.lora_scale is not None and not arguments.lora:
        raise UsageError("--lora-scale is for --lora")
    lora = read_lora(Path(arguments.lora), arguments.lora_scale) if arguments.lora else None
    # a LoRA comes with the tokenizer that it was trained with, which may have more tokens than the base's, or another template
    trained_with = lora.path if lora and not arguments.tokenizer and lora.path.is_dir() else None
    own, template = (find_in(trained_with), chat_template(trained_with)) if trained_with else (None, None)
    notes = [lora.note] if lora else []
    given = [flag for flag in _OF_CHECKPOINTS if getattr(arguments, flag)]
    if not is_model_file(source):
        overrides, tokenizer = read_pairs(arguments.set), arguments.tokenizer or own
        model = read_canonical(source, overrides=overrides, mapping=arguments.map, tokenizer=tokenizer, change=lora)
        if own:
            notes.append(f"its tokenizer is {own}")
            if not template and (usual := chat_template(source if source.is_dir() else source.parent)):
                model.metadata["tokenizer.chat_template"] = usual
    else:
        model = read_canonical(source, change=lora)
        if given == ["tokenizer"] and "tokenizer.ggml.tokens" not in model.metadata:
            model = with_tokenizer(model, source, arguments.tokenizer)
        elif given:
            raise UsageError(f"--{given[0]} is for checkpoints; {source} is a model file and says all of that itself")
    metadata = {**model.metadata, **own_keys(arguments)}
    has_tokenizer = "tokenizer.ggml.tokens" in metadata
    if template and has_tokenizer and not arguments.chat_template and template != metadata.get("tokenizer.chat_template"):
        metadata["tokenizer.chat_template"] = template
        notes.append(f"its chat template is that of {trained_with}")
    return replace(model, metadata=metadata, notes=[*model.notes, *notes])


def read_importance(arguments: argparse.Namespace, model: CanonicalModel) -> Mapping[str, Any] | None:
    """The importance matrices of --imatrix (importance.py), None without it. Raises PocketlmError."""
    if not arguments.imatrix:
        return None
    from pocketlm.export.importance import importance

    return importance(Path(arguments.imatrix), model)


def own_keys(arguments: argparse.Namespace) -> dict[str, str]:
    """The keys of the model file that --name and --chat-template set."""
    keys = {"general.name": arguments.name} if arguments.name else {}
    if name := arguments.chat_template:
        from pocketlm.chat.templates import BUILT_IN

        keys["tokenizer.chat_template"] = BUILT_IN[name].jinja if name in BUILT_IN else read_text(name)
    return keys


class Progress(StatusLine):
    """A progress bar for `n_weights`."""

    def __init__(self, n_weights: int):
        super().__init__()
        self._total, self._done = max(n_weights, 1), 0

    def step(self, name: str, n_weights: int) -> None:
        """`n_weights` more are done, of the tensor `name`."""
        self._done += n_weights
        share = min(self._done / self._total, 1.0)
        self.show(f"{'#' * int(BAR * share):<{BAR}} {share:4.0%} {name[:40]}")
