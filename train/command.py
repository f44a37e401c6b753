"""`pocketlm train`: its arguments, and the way from texts to a run's folder. PyTorch is imported when training starts.

A run's folder holds the tokenizer, `data/`, `log.jsonl`, `last.pt` and `best.pt`. The same command goes on where an
interrupted one left off.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketlm.errors import FileError, PocketlmError, UsageError, did_you_mean
from pocketlm.train.presets import PRESETS, Settings, Shape, changed

if TYPE_CHECKING:
    from pocketlm.tokenizer import Tokenizer
    from pocketlm.train.documents import Reading

TEMPLATE = "chat_template.jinja"  # where export looks for it
RECIPES = ("small-talk",)
SETTINGS = {  # settings with a flag of their own (the name with dashes) → help
    "steps": "number of steps", "batch": "sequences per step, over all processes",
    "micro_batch": "sequences computed at once; divides the batch", "context": "tokens per sequence",
    "lr": "peak learning rate", "warmup": "steps until the peak", "weight_decay": "weight decay of the matrices",
    "clip": "largest norm of the gradient", "dropout": "share of values set to 0", "dtype": "fp32, bf16 or fp16",
    "seed": "decides everything that is drawn at random",
}  # fmt: skip

VOCABULARY: dict[str, dict[str, Any]] = {  # the options that decide what a run reads
    "tokenizer": {"metavar": "NAME", "help": "bytes, sentencepiece, characters, gpt2, or a tokenizer's file or folder"},
    "add-markers": {"action": "store_true", "help": "add the chat's markers to a tokenizer, and to a model, without them"},
    "symbols": {"metavar": "FILE", "help": "texts that are one token each in a vocabulary made here, one a line"},
    "character-coverage": {"type": float, "metavar": "X", "help": "share of the characters that get a token (sentencepiece)"},
    "normalize": {"action": "append", "default": [], "metavar": "FORM",
                  "help": "nfc, nfd, nfkc, nfkd, or a file of lines: what, a tab, by what; may be given again"},
    "documents": {"choices": ("file", "blank", "line"), "default": "file",
                  "help": "what ends a document of a text: its file (default), a blank line, each line"},
    "shortest": {"type": int, "default": 0, "metavar": "N", "help": "leave out texts of fewer characters"},
    "windows": {"choices": ("blocks", "sentences"), "default": "blocks", "help": "how a sequence is cut (default blocks)"},
}  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `pocketlm train`."""
    add = parser.add_argument
    add("data", nargs="*", metavar="FILE", help="texts (.txt), conversations (.jsonl) and ids (.npy, .bin) to learn")
    add("-o", "--output", metavar="RUN", help="the run's folder; a run that was stopped there goes on")
    add("--preset", default="tiny", metavar="NAME", help=f"{', '.join(PRESETS)} (default tiny)")
    add("--recipe", metavar="NAME", help="small-talk: make the model that comes with the package")
    add("--plot", metavar="RUN", help="draw a run's log to RUN/log.png")
    add("--set", action="append", default=[], metavar="K=V", help="change the preset's shape, as in n_layer=6")
    add("--from", dest="start", metavar="CHECKPOINT", help="begin with these weights: fine-tuning, longer context")
    add("--rope-theta", type=float, default=0.0, metavar="X", help="with --from: another base of the rotary angles")
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
    group = parser.add_argument_group("vocabulary and documents")
    for name, how in VOCABULARY.items():
        group.add_argument(f"--{name}", **how)
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
    from pocketlm.export import published
    from pocketlm.train import checkpoints, checks, data, loop
    from pocketlm.train.decoder import Decoder

    folder, start = Path(arguments.output), checkpoints.read(Path(arguments.start)) if arguments.start else None
    with loop.process_group(arguments.device) as ranks:
        if ranks.leads:
            _prepare(folder, kind, shape.n_vocab, arguments)
        if ranks.size > 1:
            dist.barrier()
        tok = tokenizer.load(folder)
        if start and arguments.add_markers:
            first = published.load(_source(kind, arguments.start) or folder).n_vocab
            if tok.n_vocab > first:
                start = checkpoints.add_rows(start, first, max(start["shape"].n_vocab, tok.n_vocab))
        shape = start["shape"] if start else replace(shape, n_vocab=tok.n_vocab, n_ctx=max(shape.n_ctx, settings.context))
        if tok.n_vocab > shape.n_vocab:
            problem = f"its tokenizer has {tok.n_vocab} tokens, the model {shape.n_vocab}"
            raise FileError(folder, problem, "give the model's own with --tokenizer, or more tokens with --add-markers")
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
        ends = {"train": data.sentence_ends(tok) if arguments.windows == "sentences" else None}
        train, val = (
            data.open_corpus(folder / "data", split, settings.context, tok.n_vocab, ends.get(split)) for split in data.SPLITS
        )
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
    given = {"from": arguments.start or "", "chat": arguments.chat, "learn": arguments.learn, "windows": arguments.windows}
    return {**asdict(shape), **same, **given, "data": data}


def _prepare(folder: Path, kind: str, n_vocab: int, arguments: argparse.Namespace) -> None:
    """The run's tokenizer, chat template and encoded data, each made where it is not there yet."""
    from pocketlm.train import data, documents, vocabularies

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(folder, f"cannot be made ({error.strerror})", "choose another folder with -o") from None
    files, val_files = ([Path(name) for name in names] for names in (arguments.data, arguments.val))
    for file, times in Counter(Path(name).resolve() for name in (*arguments.data, *arguments.val)).items():
        if times > 1:
            print(f"{file} is given {times} times", file=sys.stderr)
    reading = documents.Reading(arguments.documents, arguments.shortest)
    tok = _tokenizer(folder, kind, n_vocab, reading, arguments)
    encoder = data.Encoder(tok, arguments.chat, data.ROLES if arguments.learn == "all" else ("assistant",), folder)
    vocabularies.write(folder / TEMPLATE, _template(files, arguments))
    every = 0 if val_files else arguments.val_every
    data.prepare(files, val_files, folder / "data", encoder, every, lambda text: print(text, file=sys.stderr), reading)


def _template(files: list[Path], arguments: argparse.Namespace) -> str:
    """How to talk to the model: as its conversations are written, as before where it learns more texts, else as to a text."""
    from pocketlm.chat.templates import BUILT_IN, PLAIN_JINJA
    from pocketlm.train import data, documents

    if documents.has_conversations(files):
        return data.jinja(BUILT_IN[arguments.chat])
    before = Path(arguments.start).parent / TEMPLATE if arguments.start else None
    return before.read_text(encoding="utf-8") if before and before.is_file() else PLAIN_JINJA


def _source(kind: str, start: str | None) -> Path | None:
    """Where a run's tokenizer comes from; None: it is made here."""
    from pocketlm.train.vocabularies import KINDS

    return Path(kind) if kind not in KINDS else Path(start).parent if start else None


def _tokenizer(folder: Path, kind: str, n_vocab: int, reading: Reading, arguments: argparse.Namespace) -> Tokenizer:
    from pocketlm import tokenizer
    from pocketlm.export import published
    from pocketlm.tokenizer.normal_form import read_lines, read_normalizer
    from pocketlm.train import data, documents, vocabularies

    markers = data.markers_of(arguments.chat)
    if any((folder / name).exists() for name in vocabularies.FILES):
        return tokenizer.load(folder)
    made = [name for name in ("symbols", "character_coverage", "normalize") if getattr(arguments, name)]
    if source := _source(kind, arguments.start):
        if made:
            raise UsageError(f"--{made[0].replace('_', '-')} is for vocabularies that are made here; {source} is one already")
        if not source.exists() and kind not in published.NAMES:
            kinds = (*vocabularies.KINDS, *published.NAMES)
            near = did_you_mean(kind, kinds)
            raise UsageError(f"--tokenizer {kind}: expected {', '.join(kinds)}, or a tokenizer's file or folder{near}")
        return vocabularies.take_tokenizer(source, markers if arguments.add_markers else (), folder)
    if ids := [name for name in arguments.data if name.endswith(documents.IDS)]:
        raise UsageError(f"{ids[0]} holds ids: say which tokenizer made them with --tokenizer FILE")
    if arguments.character_coverage and (kind != "sentencepiece" or not 0.9 <= arguments.character_coverage <= 1):
        raise UsageError("--character-coverage is a number from 0.9 to 1, for --tokenizer sentencepiece")
    symbols = [line for _, line in read_lines(Path(arguments.symbols))] if arguments.symbols else []
    normalizer, coverage = read_normalizer(arguments.normalize), arguments.character_coverage or 0.9995
    wanted = vocabularies.Wanted(n_vocab, markers, tuple(symbols), coverage, normalizer)
    every_letter = kind == "characters"  # a rare one may be in what measures alone
    files = [Path(name) for name in (*arguments.data, *(arguments.val if every_letter else ()))]
    texts = documents.read_texts(files, reading, 0 if every_letter else vocabularies.MOST_BYTES)
    return vocabularies.make_tokenizer(kind, texts, wanted, folder)
