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
from pocketlm.train.presets import PRESETS, Settings, Shape, changed

if TYPE_CHECKING:
    from pocketlm.tokenizer import Tokenizer

TEMPLATE = "chat_template.jinja"  # where export looks for it
RECIPES = ("small-talk",)
SETTINGS = {  # settings with a flag of their own (the name with dashes) → help
    "steps": "number of steps", "batch": "sequences per step, over all processes",
    "micro_batch": "sequences computed at once; divides the batch", "context": "tokens per sequence",
    "lr": "peak learning rate", "warmup": "steps until the peak", "weight_decay": "weight decay of the matrices",
    "clip": "largest norm of the gradient", "dropout": "share of values set to 0", "dtype": "fp32, bf16 or fp16",
    "seed": "decides everything that is drawn at random",
}  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `pocketlm train`."""
    add = parser.add_argument
    add("data", nargs="*", metavar="FILE", help="texts (.txt) and conversations (.jsonl) to learn")
    add("-o", "--output", metavar="RUN", help="the run's folder; a run that was stopped there goes on")
    add("--preset", default="tiny", metavar="NAME", help=f"{', '.join(PRESETS)} (default tiny)")
    add("--recipe", metavar="NAME", help="small-talk: make the model that comes with the package")
    add("--plot", metavar="RUN", help="draw a run's log to RUN/log.png")
    add("--set", action="append", default=[], metavar="K=V", help="change the preset's shape, as in n_layer=6")
    add("--from", dest="start", metavar="CHECKPOINT", help="begin with these weights: fine-tuning, longer context")
    add("--rope-theta", type=float, default=0.0, metavar="X", help="with --from: another base of the rotary angles")
    add("--tokenizer", metavar="NAME", help="bytes, sentencepiece, characters, or a tokenizer's folder")
    add("--chat", default="chatml", metavar="NAME", help="how conversations are marked: chatml (default) or markers")
    add("--learn", default="assistant", choices=("assistant", "all"), help="whose turns are learnt (default assistant)")
    add("--val", action="append", default=[], metavar="FILE", help="texts for validation (default: a share of FILE)")
    add("--val-every", type=int, default=20, metavar="N", help="one document in N is kept for validation (default 20)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model (default: the large presets do)")
    add("--device", default="", metavar="NAME", help="cpu, cuda, cuda:1 … (default: a GPU where there is one)")
    add("--threads", type=int, default=0, metavar="N", help="threads of each process (default: PyTorch's choice)")
    add("--sample", action="append", default=[], metavar="TEXT", help="a prompt to continue at every validation")
    add("--log-every", type=int, default=10, metavar="N", help="a line of progress every N steps (default 10)")
    add("--eval-every", type=int, default=100, metavar="N", help="validation every N steps (default 100)")
    add("--save-seconds", type=float, default=60.0, metavar="X", help="seconds between checkpoints (default 60)")
    group = parser.add_argument_group("how to train (defaults: the preset's)")
    for name, text in SETTINGS.items():
        kind = type(getattr(Settings(), name))
        metavar = {int: "N", float: "X", str: "TYPE"}[kind]
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line asks; the exit status. Raises PocketlmError for everything a user can cause."""
    if arguments.plot:
        from pocketlm.train.log import plot

        print(plot(Path(arguments.plot)))
        return 0
    if arguments.recipe:
        from pocketlm.train.small_talk.recipe import cook

        if arguments.recipe not in RECIPES:
            near = did_you_mean(arguments.recipe, RECIPES)
            raise UsageError(f"--recipe {arguments.recipe}: expected {', '.join(RECIPES)}{near}")
        return cook(Path(arguments.output or arguments.recipe), arguments.threads, bool(arguments.compile))
    if not arguments.data or not arguments.output:
        raise UsageError("train: give the texts to learn and the run's folder, as in: pocketlm train book.txt -o run")
    if arguments.preset not in PRESETS:
        near = did_you_mean(arguments.preset, PRESETS)
        raise UsageError(f"--preset {arguments.preset}: expected one of {', '.join(PRESETS)}{near}")
    if arguments.start and arguments.set:
        raise UsageError("--set changes a new model; the one of --from has its shape already")
    if wrong := [pair for pair in arguments.set if "=" not in pair]:
        raise UsageError(f"--set {wrong[0]}: expected a name and a value, as n_layer=6")
    if min(arguments.log_every, arguments.eval_every, arguments.val_every - 1) < 1 or arguments.threads < 0:
        raise UsageError("--log-every and --eval-every are 1 or more, --val-every 2 or more, --threads 0 or more")
    preset = PRESETS[arguments.preset]
    given = {f.name: value for f in fields(Settings) if (value := getattr(arguments, f.name, None)) is not None}
    shape = changed(preset.shape, dict(pair.split("=", 1) for pair in arguments.set))
    try:
        import torch
    except ImportError:
        raise PocketlmError("training needs PyTorch; get it with: pip install 'pocketlm[train]'") from None
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    _train(arguments, shape, arguments.tokenizer or preset.tokenizer, replace(preset.settings, **given))
    return 0


def _train(arguments: argparse.Namespace, shape: Shape, kind: str, settings: Settings) -> None:
    import torch
    import torch.distributed as dist

    from pocketlm import tokenizer
    from pocketlm.train import checkpoints, checks, data, loop
    from pocketlm.train.decoder import Decoder

    folder, start = Path(arguments.output), checkpoints.read(Path(arguments.start)) if arguments.start else None
    with loop.process_group(arguments.device) as ranks:
        if ranks.leads:
            _prepare(folder, kind, shape.n_vocab, arguments)
        if ranks.size > 1:
            dist.barrier()
        tok = tokenizer.load(folder)
        shape = start["shape"] if start else replace(shape, n_vocab=tok.n_vocab, n_ctx=max(shape.n_ctx, settings.context))
        if tok.n_vocab > shape.n_vocab:
            problem = f"its tokenizer has {tok.n_vocab} tokens, the model {shape.n_vocab}"
            raise FileError(folder, problem, "give the model's own with --tokenizer")
        settings = replace(settings, context=settings.context or shape.n_ctx)
        if settings.compile and (problem := loop.cannot_compile(ranks.device)):
            if arguments.compile:
                raise PocketlmError(f"--compile: {problem}")
            print(f"training without torch.compile, which is slower: {problem}", file=sys.stderr)
            settings = replace(settings, compile=False)
        torch.manual_seed(settings.seed)
        if start:
            model = checkpoints.build(start, settings.context, settings.dropout, arguments.rope_theta)
        else:
            model = Decoder(shape, settings.dropout)
            checks.check_fresh(model)
        train, val = (data.open_corpus(folder / "data", split, settings.context, tok.n_vocab) for split in data.SPLITS)
        if ranks.leads:
            n_parameters = sum(weight.numel() for weight in model.parameters())
            facts = f"{n_parameters:,} parameters, {train.n_tokens:,} tokens to learn from, a vocabulary of {tok.n_vocab:,}"
            print(facts, file=sys.stderr)
        loss = loop.train(
            model, train, val, settings, folder, ranks, identity=_identity(arguments, model.shape, settings, folder),
            sample=loop.sampler(tok, arguments.sample), log_every=arguments.log_every, eval_every=arguments.eval_every,
            save_seconds=arguments.save_seconds,
        )  # fmt: skip
        if ranks.leads:
            print(f"{folder / checkpoints.LAST}: validation loss {loss:.4f} after {settings.steps} steps")


def _identity(arguments: argparse.Namespace, shape: Shape, settings: Settings, folder: Path) -> dict[str, Any]:
    """What a run cannot change half way."""
    from pocketlm.train.data import read_state

    same = {name: value for name, value in asdict(settings).items() if name not in ("micro_batch", "compile")}
    data = [[part["train"], part["val"], *part["key"][:2]] for part in read_state(folder / "data").values()]
    given = {"from": arguments.start or "", "chat": arguments.chat, "learn": arguments.learn}
    return {**asdict(shape), **same, **given, "data": data}


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

    if data.has_conversations(files):
        return data.jinja(BUILT_IN[arguments.chat])
    before = Path(arguments.start).parent / TEMPLATE if arguments.start else None
    return before.read_text(encoding="utf-8") if before and before.is_file() else PLAIN_JINJA


def _tokenizer(
    folder: Path, files: list[Path], kind: str, n_vocab: int, markers: tuple[str, ...], start: str | None
) -> Tokenizer:
    from pocketlm import tokenizer
    from pocketlm.train import data, vocabularies

    if any((folder / name).exists() for name in vocabularies.FILES):
        return tokenizer.load(folder)
    if kind in vocabularies.KINDS and not start:
        return vocabularies.make_tokenizer(kind, data.read_texts(files), n_vocab, markers, folder)
    source = Path(start).parent if start and kind in vocabularies.KINDS else Path(kind)
    if not source.exists():
        kinds = ", ".join(vocabularies.KINDS)
        near = did_you_mean(kind, vocabularies.KINDS)
        raise UsageError(f"--tokenizer {kind}: expected {kinds}, or a tokenizer's file or folder{near}")
    tokenizer.load(source)  # says what is wrong with it
    for name in (*vocabularies.FILES, "tokenizer_config.json"):
        if (file := (source if source.is_dir() else source.parent) / name).is_file():
            shutil.copyfile(file, folder / name)
    return tokenizer.load(folder)
