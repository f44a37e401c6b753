"""`pocketlm train`: its arguments, and the way from texts to a run's folder. PyTorch is imported when training starts.

A run's folder holds the tokenizer, `data/`, `log.jsonl`, `last.pt` and `best.pt`. The same command goes on where an
interrupted one left off.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketlm.errors import FileError, PocketlmError, UsageError, did_you_mean
from pocketlm.train.presets import PRESETS, Cadence, Settings, Shape, changed

if TYPE_CHECKING:
    from pocketlm.tokenizer import Tokenizer
    from pocketlm.train.batches import Stage

TEMPLATE = "chat_template.jinja"  # where export looks for it
RECIPES = ("small-talk",)
SETTINGS = {  # settings with a flag of their own (the name with dashes) → help
    "steps": "number of steps", "batch": "sequences per step, over all processes",
    "micro_batch": "sequences computed at once; divides the batch", "context": "tokens per sequence",
    "lr": "peak learning rate", "min_lr": "learning rate of the last step (default: a tenth of the peak)",
    "warmup": "steps until the peak", "weight_decay": "weight decay of the matrices", "beta2": "AdamW's second decay rate",
    "clip": "largest norm of the gradient", "dropout": "share of values set to 0", "dtype": "fp32, bf16 or fp16",
    "optimizer": "adamw, or adamw8bit: less memory, by the package bitsandbytes",
    "checkpointing": "compute every layer twice to save memory", "compile": "torch.compile the model, or not",
    "seed": "decides everything that is drawn at random",
}  # fmt: skip
CADENCE = {
    "log_every": "a line of progress every N steps", "eval_every": "validation every N steps",
    "save_seconds": "seconds between checkpoints", "keep": "keep the last N checkpoints, one at every validation",
    "keep_every": "keep the checkpoint of every N-th step for good",
    "patience": "stop after N validations without a better one",
}  # fmt: skip
FREE = ("steps", "micro_batch", "dtype", "compile", "checkpointing")  # settings that may change in the middle of a run


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `pocketlm train`."""
    add = parser.add_argument
    add("data", nargs="*", metavar="FILE", help="texts (.txt) and conversations (.jsonl) to learn")
    add("-o", "--output", metavar="RUN", help="the run's folder; a run that was stopped there goes on")
    add("--preset", default="tiny", metavar="NAME", help=f"{', '.join(PRESETS)} (default tiny)")
    add("--recipe", metavar="NAME", help="small-talk: make the model that comes with the package")
    add("--plot", nargs="?", const="", metavar="RUN", help="draw a run's log to RUN/log.png; in training, at every validation")
    add("--set", action="append", default=[], metavar="K=V", help="change the preset's shape, as in n_layer=6")
    add("--from", dest="start", metavar="WEIGHTS", help="begin with a run, checkpoint, Hugging Face folder or GGUF")
    add("--rope-theta", type=float, default=0.0, metavar="X", help="with --from: another base of the rotary angles")
    add("--tokenizer", metavar="NAME", help="bytes, sentencepiece, characters, or a tokenizer's folder")
    add("--chat", default="chatml", metavar="NAME", help="how conversations are marked: chatml (default) or markers")
    add("--learn", default="assistant", choices=("assistant", "all"), help="whose turns are learnt (default assistant)")
    add("--val", action="append", default=[], metavar="FILE", help="texts for validation (default: a share of FILE)")
    add("--val-every", type=int, default=20, metavar="N", help="one document in N is kept for validation (default 20)")
    add("--mix", nargs="+", action="extend", default=[], metavar="FILE=SHARE", help="the shares of the texts (train/README.md)")
    add("--device", default="", metavar="NAME", help="cpu, cuda, cuda:1, mps … (default: cuda where there is one)")
    add("--threads", type=int, default=0, metavar="N", help="threads of each process (default: PyTorch's choice)")
    add("--sample", action="append", default=[], metavar="TEXT", help="a prompt to continue at every validation")
    add("--samples", type=int, default=2, metavar="N", help="continuations of each (default 2)")
    add("--sample-tokens", type=int, default=60, metavar="N", help="their length (default 60)")
    add("--sample-temp", type=float, default=0.8, metavar="X", help="their temperature (default 0.8)")
    add("--sample-top-k", type=int, default=40, metavar="N", help="of the N likeliest tokens (default 40; 0: of all)")
    _table(parser.add_argument_group("what is seen and kept of a run"), CADENCE, Cadence())
    _table(parser.add_argument_group("how to train (defaults: the preset's)"), SETTINGS, Settings())


def _table(group: Any, rows: dict[str, str], defaults: Any) -> None:
    """One flag for each field of `defaults` that has a row; a preset's settings are not what their fields begin with."""
    for name, text in rows.items():
        value = getattr(defaults, name)
        how: dict[str, Any] = {"type": type(value), "metavar": {int: "N", float: "X", str: "TYPE"}.get(type(value))}
        if isinstance(value, bool):
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(defaults, Cadence):
            how["default"], text = value, f"{text} (default {value:g})"
        group.add_argument(f"--{name.replace('_', '-')}", help=text, **how)


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line asks; the exit status. Raises PocketlmError for everything a user can cause."""
    if arguments.plot is not None:
        from pocketlm.train.log import check_can_plot, plot

        check_can_plot()
        if not arguments.data and not arguments.mix:
            print(plot(Path(arguments.plot or arguments.output or ".")))
            return 0
    if arguments.recipe:
        from pocketlm.train.small_talk.recipe import cook

        if arguments.recipe not in RECIPES:
            near = did_you_mean(arguments.recipe, RECIPES)
            raise UsageError(f"--recipe {arguments.recipe}: expected {', '.join(RECIPES)}{near}")
        return cook(Path(arguments.output or arguments.recipe), arguments.threads, bool(arguments.compile))
    from pocketlm.train import batches

    stages = batches.read_mix(arguments.mix)
    arguments.data = batches.mixed_files(stages, arguments.data)
    if not arguments.data or not arguments.output:
        raise UsageError("train: give the texts to learn and the run's folder, as in: pocketlm train book.txt -o run")
    if arguments.preset not in PRESETS:
        near = did_you_mean(arguments.preset, PRESETS)
        raise UsageError(f"--preset {arguments.preset}: expected one of {', '.join(PRESETS)}{near}")
    if arguments.start and arguments.set:
        raise UsageError("--set changes a new model; the one of --from has its shape already")
    if wrong := [pair for pair in arguments.set if "=" not in pair]:
        raise UsageError(f"--set {wrong[0]}: expected a name and a value, as n_layer=6")
    if min(arguments.val_every - 1, arguments.samples, arguments.sample_tokens) < 1 or arguments.threads < 0:
        raise UsageError("--samples and --sample-tokens are 1 or more, --val-every 2 or more, --threads 0 or more")
    if not 0 <= arguments.sample_temp < 100 or arguments.sample_top_k < 0:
        raise UsageError("--sample-temp and --sample-top-k are 0 or more")
    preset = PRESETS[arguments.preset]
    given, seen = (
        {f.name: value for f in fields(kind) if (value := getattr(arguments, f.name, None)) is not None}
        for kind in (Settings, Cadence)
    )
    shape = changed(preset.shape, dict(pair.split("=", 1) for pair in arguments.set))
    try:
        import torch
    except ImportError:
        raise PocketlmError("training needs PyTorch; get it with: pip install 'pocketlm[train]'") from None
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    kind, settings = arguments.tokenizer or preset.tokenizer, replace(preset.settings, **given)
    _train(arguments, shape, kind, settings, Cadence(**seen), stages)
    return 0


def _train(
    arguments: argparse.Namespace, shape: Shape, kind: str, settings: Settings, cadence: Cadence, stages: list[Stage]
) -> None:
    import torch
    import torch.distributed as dist

    from pocketlm import tokenizer
    from pocketlm.train import batches, checkpoints, checks, data, devices, log, loop
    from pocketlm.train.decoder import Decoder
    from pocketlm.train.starting_weights import read_start

    folder, notes = Path(arguments.output), []
    model = None
    if arguments.start:
        model, notes = read_start(Path(arguments.start), settings, arguments.rope_theta)
        shape = model.shape
    with devices.process_group(arguments.device) as ranks:
        if ranks.leads:
            _prepare(folder, kind, shape.n_vocab, arguments)
        if ranks.size > 1:
            dist.barrier()
        tok = tokenizer.load(folder)
        if not model:
            shape = replace(shape, n_vocab=tok.n_vocab, n_ctx=max(shape.n_ctx, settings.context))
        if tok.n_vocab > shape.n_vocab:
            problem = f"its tokenizer has {tok.n_vocab} tokens, the model {shape.n_vocab}"
            raise FileError(folder, problem, "give the model's own with --tokenizer")
        settings = replace(settings, context=settings.context or shape.n_ctx)
        if not arguments.dtype:
            settings = replace(settings, dtype=devices.dtype_here(settings.dtype, ranks.device))
        torch.manual_seed(settings.seed)
        if model is None:
            model = Decoder(shape, settings.dropout, settings.checkpointing)
            checks.check_fresh(model)
        train, val = (data.open_corpus(folder / "data", split, settings.context, tok.n_vocab) for split in data.SPLITS)
        feed = batches.Feed(train, settings.batch, settings.seed, stages, settings.steps)
        sizes = {name: weight.numel() for name, weight in model.named_parameters()}
        for line in [*notes, *log.facts(sizes, tok, train, settings)]:
            ranks.say(line)
        with devices.memory_errors(settings, ranks):
            at = loop.train(
                model.to(ranks.device), devices.compiled(model, settings, ranks, bool(arguments.compile)), feed, val, settings,
                cadence, folder, ranks, identity=_identity(arguments, model.shape, settings),
                sample=loop.sampler(
                    tok, arguments.sample, arguments.samples, arguments.sample_tokens, arguments.sample_temp,
                    arguments.sample_top_k,
                ),
                plot=arguments.plot is not None,
            )  # fmt: skip
        if ranks.leads:
            print(f"{folder / checkpoints.LAST}: validation loss {at.val_loss:.4f} after {at.step} steps")


def _identity(arguments: argparse.Namespace, shape: Shape, settings: Settings) -> dict[str, Any]:
    """What a run cannot change half way."""
    same = {name: value for name, value in asdict(settings).items() if name not in FREE}
    return {**asdict(shape), **same, "from": arguments.start or "", "chat": arguments.chat, "learn": arguments.learn}


def _prepare(folder: Path, kind: str, n_vocab: int, arguments: argparse.Namespace) -> None:
    """The run's tokenizer, chat template and encoded data, each made where it is not there yet."""
    from pocketlm.train import data, vocabularies

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(folder, f"cannot be made ({error.strerror})", "choose another folder with -o") from None
    files, val_files = ([Path(name) for name in names] for names in (arguments.data, arguments.val))
    markers = data.markers_of(arguments.chat)
    learnt = [*files, *val_files] if kind == "characters" else files  # a rare letter may be in what measures alone
    tok = _tokenizer(folder, learnt, kind, n_vocab, markers, arguments.start)
    encoder = data.Encoder(tok, arguments.chat, data.ROLES if arguments.learn == "all" else ("assistant",), folder)
    vocabularies.write(folder / TEMPLATE, _template(files, arguments))
    every = 0 if val_files else arguments.val_every
    data.prepare(files, val_files, folder / "data", encoder, every, lambda text: print(text, file=sys.stderr))


def _template(files: list[Path], arguments: argparse.Namespace) -> str:
    """How to talk to the model: as its conversations are written, as before where it learns more texts, else as to a text."""
    from pocketlm.chat.templates import BUILT_IN, PLAIN_JINJA
    from pocketlm.train import data
    from pocketlm.train.starting_weights import template_beside

    if data.has_conversations(files):
        return data.jinja(BUILT_IN[arguments.chat])
    return (template_beside(Path(arguments.start)) if arguments.start else None) or PLAIN_JINJA


def _tokenizer(
    folder: Path, files: list[Path], kind: str, n_vocab: int, markers: tuple[str, ...], start: str | None
) -> Tokenizer:
    from pocketlm import tokenizer
    from pocketlm.train import data, vocabularies
    from pocketlm.train.starting_weights import tokenizer_beside

    if any((folder / name).exists() for name in vocabularies.FILES):
        return tokenizer.load(folder)
    if kind in vocabularies.KINDS and not start:
        return vocabularies.make_tokenizer(kind, data.read_texts(files), n_vocab, markers, folder)
    source = tokenizer_beside(Path(start), folder) if start and kind in vocabularies.KINDS else Path(kind)
    if not source.exists():
        kinds = ", ".join(vocabularies.KINDS)
        near = did_you_mean(kind, vocabularies.KINDS)
        raise UsageError(f"--tokenizer {kind}: expected {kinds}, or a tokenizer's file or folder{near}")
    tokenizer.load(source)  # says what is wrong with it
    for name in (*vocabularies.FILES, "tokenizer_config.json"):
        if source != folder and (file := (source if source.is_dir() else source.parent) / name).is_file():
            shutil.copyfile(file, folder / name)
    return tokenizer.load(folder)
