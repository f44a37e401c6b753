"""`pocketlm train`: its arguments, and the way from texts to a run's folder. PyTorch is imported when training starts.

A run's folder holds the tokenizer, `data/`, `log.jsonl`, `last.pt` and `best.pt`. The same command goes on where an
interrupted one left off.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pocketlm import tokenizer
from pocketlm.chat.templates import BUILT_IN, PLAIN_JINJA
from pocketlm.errors import FileError, PocketlmError, UsageError, needed, one_of, refused
from pocketlm.export.model_config import read_pairs
from pocketlm.runtime.atomic import check_plain, write_file
from pocketlm.terminal_text import count, print
from pocketlm.tokenizer.normalizer import read_lines, read_normalizer
from pocketlm.train import batches, data, documents, log, vocabularies
from pocketlm.train.presets import PRESETS, Cadence, Settings, Shape, changed

T = TypeVar("T", Cadence, Settings)
TEMPLATE = "chat_template.jinja"  # where export looks for it
WRITTEN = ("last.pt", "best.pt", "step_*.pt", "log.*", "tokenizer*", "vocab*.json", TEMPLATE, "data", "data/*")  # by a run
RECIPES = ("small-talk",)
OPTIONS = {Cadence: "what is seen and kept of a run", Settings: "how to train (defaults: the preset's)"}
FREE = ("steps", "micro_batch", "dtype", "compile", "checkpointing")  # settings that may change in the middle of a run


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `pocketlm train`."""
    add = parser.add_argument
    add("data", nargs="*", metavar="FILE", help="texts (.txt), conversations (.jsonl) and ids (.npy, .bin) to learn")
    add("-o", "--output", metavar="RUN", help="the run's folder; a run that was stopped there goes on")
    add("--preset", default="tiny", metavar="NAME", help=f"{', '.join(PRESETS)} (default tiny)")
    add("--recipe", metavar="NAME", help="small-talk: make the model that comes with the package")
    add("--plot", nargs="?", const="", metavar="RUN", help="draw a run's log to RUN/log.png; in training, at every validation")
    add("--set", action="append", default=[], metavar="K=V", help="n_layer=6, of the preset's shape; what --from does not say")
    add("--from", dest="start", metavar="WEIGHTS", help="begin with a run, checkpoint, Hugging Face folder or GGUF")
    add("--rope-theta", type=float, default=0.0, metavar="X", help="with --from: another base of the rotary angles")
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
    add = parser.add_argument_group("vocabulary and documents").add_argument
    add("--tokenizer", metavar="NAME", help="bytes, sentencepiece, characters, gpt2, or a tokenizer's file or folder")
    add("--add-markers", action="store_true", help="add the chat's markers to a tokenizer, and to a model, without them")
    add("--symbols", metavar="FILE", help="texts that are one token each in a vocabulary made here, one a line")
    add("--character-coverage", type=float, metavar="X", help="share of the characters that get a token (sentencepiece)")
    forms = "nfc, nfd, nfkc, nfkd, or a file of lines: what, a tab, by what; may be given again"
    add("--normalize", action="append", default=[], metavar="FORM", help=forms)
    ends = "what ends a document of a text: its file (default), a blank line, each line"
    add("--documents", choices=("file", "blank", "line"), default="file", help=ends)
    add("--shortest", type=int, default=0, metavar="N", help="leave out texts of fewer characters")
    add("--windows", choices=("blocks", "sentences"), default="blocks", help="how a sequence is cut (default blocks)")
    for kind, title in OPTIONS.items():
        group = parser.add_argument_group(title)
        for f in (f for f in fields(kind) if "help" in f.metadata):
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
            if not isinstance(f.default, bool):
                how = {"type": type(f.default), "metavar": {int: "N", float: "X", str: "TYPE"}[type(f.default)]}
            default = f" (default {f.default:g})" if kind is Cadence else ""
            group.add_argument(f"--{f.name.replace('_', '-')}", help=f"{f.metadata['help']}{default}", **how)


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line asks; the exit status. Raises PocketlmError for everything a user can cause."""
    if arguments.plot is not None:
        with needed("drawing", "matplotlib"):
            import matplotlib  # noqa: F401
        if not arguments.data and not arguments.mix:
            _check(folder := Path(arguments.plot or arguments.output or "."))
            print(log.plot(folder))
            return 0
    if arguments.recipe:
        from pocketlm.models.small_talk.recipe import cook

        one_of("--recipe", arguments.recipe, RECIPES)
        return cook(Path(arguments.output or arguments.recipe), arguments.threads, bool(arguments.compile))
    stages = batches.read_mix(arguments.mix)
    arguments.data = batches.mixed_files(stages, arguments.data)
    if not arguments.data or not arguments.output:
        raise UsageError("train: give the texts to learn and the run's folder, as in: pocketlm train book.txt -o run")
    preset, said = PRESETS[one_of("--preset", arguments.preset, PRESETS)], read_pairs(arguments.set)
    least = {"val_every": 2, "samples": 1, "sample_tokens": 1, "sample_temp": 0, "sample_top_k": 0, "threads": 0}
    for name in (name for name, number in least.items() if not number <= getattr(arguments, name) < 1 << 31):
        raise UsageError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected {least[name]} or more")
    at = preset.settings
    if arguments.batch and arguments.micro_batch is None:  # the preset's micro batch is for its own batch
        arguments.micro_batch = math.gcd(arguments.batch, at.micro_batch)
    cadence, settings = _given(Cadence(), arguments), _given(at, arguments)
    if arguments.start == "":
        raise UsageError("--from is empty; give a run, a checkpoint, a Hugging Face folder or a GGUF")
    if arguments.rope_theta and not arguments.start:
        raise UsageError("--rope-theta is for --from; a new model has --set rope_theta=X")
    shape = preset.shape if arguments.start else changed(preset.shape, said)
    with needed("training", "PyTorch", "'pocketlm[train]'"):
        import torch
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    _train(arguments, shape, arguments.tokenizer or preset.tokenizer, settings, cadence, stages)
    return 0


def _given(at: T, arguments: argparse.Namespace) -> T:
    """`at` with the fields that options of their names were given for."""
    given = {field.name: getattr(arguments, field.name, None) for field in fields(at)}
    return replace(at, **{name: value for name, value in given.items() if value is not None})


def _train(
    arguments: argparse.Namespace, shape: Shape, kind: str, settings: Settings, cadence: Cadence, stages: list[batches.Stage]
) -> None:
    import torch
    import torch.distributed as dist

    from pocketlm.train import checkpoints, checks, devices, loop
    from pocketlm.train.decoder import Decoder
    from pocketlm.train.starting_weights import add_rows, read_start, taken

    folder, notes = Path(arguments.output), []
    model = None
    if arguments.start:
        model, notes = read_start(Path(arguments.start), settings, arguments.rope_theta, read_pairs(arguments.set))
        shape = model.shape
    with devices.process_group(arguments.device) as ranks:
        if ranks.leads:
            _prepare(folder, kind, shape.n_vocab, arguments)
        if ranks.size > 1:
            dist.barrier()
        tok = tokenizer.load(folder)
        if not model:
            shape = replace(shape, n_vocab=tok.n_vocab, n_ctx=max(shape.n_ctx, settings.context))
        elif arguments.add_markers and tok.n_vocab > (first := taken(kind, arguments.start).n_vocab):
            add_rows(model, first, max(shape.n_vocab, tok.n_vocab))
            shape = model.shape
        if tok.n_vocab > shape.n_vocab:
            problem = f"its tokenizer has {tok.n_vocab} tokens, the model {shape.n_vocab}"
            raise FileError(folder, problem, "give the model's own with --tokenizer, or more tokens with --add-markers")
        settings = replace(settings, context=settings.context or shape.n_ctx)
        if not arguments.dtype:
            settings = replace(settings, dtype=devices.dtype_here(settings.dtype, ranks.device))
        torch.manual_seed(settings.seed)
        if model is None:
            model = Decoder(shape, settings.dropout, settings.checkpointing)
            checks.check_fresh(model)
        ends = {"train": data.sentence_ends(tok) if arguments.windows == "sentences" else None}
        train, val = (
            data.open_corpus(folder / "data", split, settings.context, tok.n_vocab, ends.get(split)) for split in data.SPLITS
        )
        feed = batches.Feed(train, settings.batch, settings.seed, stages, settings.steps)
        sizes = {name: weight.numel() for name, weight in model.named_parameters()}
        for line in [*notes, *log.facts(sizes, tok, train, settings)]:
            ranks.say(line)
        made_of = {**asdict(model.shape), **asdict(settings), "from": arguments.start or ""}
        made_of |= {name: getattr(arguments, name) for name in ("chat", "learn", "windows")}
        identity = {name: value for name, value in made_of.items() if name not in FREE}
        how = (getattr(arguments, name) for name in ("sample", "samples", "sample_tokens", "sample_temp", "sample_top_k"))
        sample, plot = loop.sampler(tok, *how), arguments.plot is not None
        with devices.memory_errors(settings, ranks):
            model, fast = model.to(ranks.device), devices.compiled(model, settings, ranks, bool(arguments.compile))
            at = loop.train(
                model, fast, feed, val, settings, cadence, folder, ranks, identity=identity, sample=sample, plot=plot
            )
        if ranks.leads:
            print(f"{folder / checkpoints.LAST}: validation loss {at.val_loss:.4f} after {count(at.step, 'step')}")


def _prepare(folder: Path, kind: str, n_vocab: int, arguments: argparse.Namespace) -> None:
    """The run's tokenizer, chat template and encoded data, each made where it is not there yet."""
    from pocketlm.train.starting_weights import template_beside

    with refused(folder, "choose another folder with -o", "cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    _check(folder)
    files, val_files = ([Path(name) for name in names] for names in (arguments.data, arguments.val))
    reading = documents.Reading(arguments.documents, arguments.shortest)
    tok = _tokenizer(folder, kind, n_vocab, reading, arguments)
    encoder = data.Encoder(tok, arguments.chat, vocabularies.ROLES if arguments.learn == "all" else ("assistant",), folder)
    if documents.has_conversations(files):
        template = BUILT_IN[arguments.chat].jinja
    else:  # as it was talked to before, or else as to a text
        template = (template_beside(Path(arguments.start)) if arguments.start else None) or PLAIN_JINJA
    write_file(folder / TEMPLATE, template)
    every = 0 if val_files else arguments.val_every
    data.prepare(files, val_files, folder / "data", encoder, every, lambda text: print(text, file=sys.stderr), reading)


def _check(folder: Path) -> None:
    check_plain((path for name in WRITTEN for path in folder.glob(name)), "put a file there, or choose another folder with -o")


def _tokenizer(
    folder: Path, kind: str, n_vocab: int, reading: documents.Reading, arguments: argparse.Namespace
) -> tokenizer.Tokenizer:
    from pocketlm.train.starting_weights import taken

    markers = data.markers_of(arguments.chat)
    if kind not in vocabularies.KINDS or arguments.start:
        made_here = [name for name in ("symbols", "character_coverage", "normalize") if getattr(arguments, name)]
        for name in made_here:
            raise UsageError(f"--{name.replace('_', '-')} is for vocabularies that are made here, not for one that is taken")
        added = markers if arguments.add_markers else ()
        try:
            text = vocabularies.taken_as(taken(kind, arguments.start), added)
        except PocketlmError:
            if vocabularies.has_weights(folder):  # it is there no longer, and the run has it
                return tokenizer.load(folder)
            raise
        name = f"one that was taken ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
        return vocabularies.kept_or_made(folder, {"tokenizer": name}, [], lambda at: write_file(at / "vocab.json", text))
    if arguments.character_coverage and (kind != "sentencepiece" or not 0.9 <= arguments.character_coverage <= 1):
        raise UsageError("--character-coverage is a number from 0.9 to 1, for --tokenizer sentencepiece")
    symbols = [line for _, line in read_lines(Path(arguments.symbols))] if arguments.symbols else []
    normalizer, coverage = read_normalizer(arguments.normalize), arguments.character_coverage or 0.9995
    wanted = vocabularies.Wanted(n_vocab, markers, tuple(symbols), coverage, normalizer)
    every_letter = kind == "characters"  # a rare one may be in what measures alone
    files = [Path(name) for name in (*arguments.data, *(arguments.val if every_letter else ()))]

    def make(at: Path) -> None:
        if ids := [name for name in arguments.data if name.endswith(documents.IDS)]:
            raise UsageError(f"{ids[0]} holds ids: say which tokenizer made them with --tokenizer FILE")
        texts = documents.read_texts(files, reading, 0 if every_letter else vocabularies.MOST_BYTES)
        vocabularies.make_tokenizer(kind, texts, wanted, at)

    options = {"tokenizer": kind, "vocabulary": n_vocab, "markers": markers, "symbols": symbols, "character coverage": coverage,
               "normalize": [normalizer.form, *normalizer.replacements]}  # fmt: skip
    return vocabularies.kept_or_made(folder, options, files, make)
