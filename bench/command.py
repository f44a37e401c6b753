"""`pocketlm bench`: its arguments, and what it prints. Tables go to stdout, progress to stderr."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from pocketlm import terminal_text
from pocketlm.errors import FileError, UsageError
from pocketlm.signals import handled

QUICK = {"rounds": 2, "tokens": 8, "prompts": (32,), "depths": (0,), "user_rounds": 1, "user_tokens": 16}
ALONE = {"prompts": (), "depths": (), "user_rounds": 0}  # with --pp and --tg nothing is measured that was not asked for
LLAMA_BENCH_ROUNDS = 5  # its own default


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `pocketlm bench`."""
    parser.add_argument(
        "models", nargs="*", metavar="MODEL",
        help="a model file, smollm2, or a shape with random weights: 48M-Q4_0, 48M-Q8_0, 48M-F16, 1.3B-class-Q4_0",
    )  # fmt: skip
    parser.add_argument("--backends", metavar="A,B", help="only these, as native,llama.cpp; default: all that are installed")
    parser.add_argument("--threads", type=int, metavar="N", help="of every backend; default: the number of physical cores")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of every task (default 4; 5 with --pp or --tg)")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens decoded in a round (default 16)")
    parser.add_argument("--prompts", metavar="N,M", help="lengths of prompts (default 32,256)")
    parser.add_argument("--depths", metavar="N,M", help="tokens in the cache before decoding (default 0,512)")
    parser.add_argument("--pp", metavar="N,M", help="as llama-bench: a prompt of N random tokens; nothing else is measured")
    parser.add_argument("--tg", metavar="N,M", help="as llama-bench: N tokens one by one, from an empty cache")
    parser.add_argument("--time-limit", type=float, metavar="S", help="a request that takes longer has hung (default 180)")
    parser.add_argument("--quick", action="store_true", help="two short rounds: does it work?")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object; bench/README.md has its schema")
    form.add_argument("--markdown", action="store_true", help="tables for a README")
    form.add_argument("--csv", action="store_true", help="a line a model and backend, with machine, date and versions")
    parser.add_argument("--save", metavar="FILE", help="write the JSON object to this file too")
    parser.add_argument("--from", dest="saved", metavar="FILE", help="show a saved JSON object again instead of measuring")
    parser.add_argument("--plot", metavar="FILE", help="draw bars into a .png, .svg or .pdf")
    parser.add_argument("--compare", metavar="FILE", help="a saved JSON object: say what got slower or faster since")


def run(arguments: argparse.Namespace) -> int:
    """Measure, or read what was measured; print. 1: no figures. Raises PocketlmError for everything that goes wrong."""
    from pocketlm.bench import compare, plot, report, schema
    from pocketlm.bench.tasks import TASKS
    from pocketlm.runtime.atomic import check_file, replacing_file

    if bool(arguments.models) == bool(arguments.saved):
        raise UsageError("bench: name a model to measure (as smollm2), or a saved result with --from")
    old = schema.read(Path(arguments.compare)) if arguments.compare else None
    if arguments.plot:
        plot.require(Path(arguments.plot))
    if arguments.save:
        check_file(Path(arguments.save))
        if not Path(arguments.save).absolute().parent.is_dir():
            raise FileError(arguments.save, "its folder does not exist", "make it, or name another file")
    result = schema.read(Path(arguments.saved)) if arguments.saved else _measure(arguments)
    extra = [compare.compare(result, old)] if old else []
    if arguments.json:
        print(json.dumps(result))
    elif arguments.csv:
        print(report.comma_separated(result))
    else:
        print(report.markdown(result, extra) if arguments.markdown else report.terminal(result, extra))
    if not arguments.saved and any(text.startswith(schema.STOPPED) for text in result["warnings"]):
        for name in filter(None, (arguments.save, arguments.plot)):  # there may be a whole result
            terminal_text.print(f"{name}: not written, the run was stopped", file=sys.stderr)
        return 130
    if arguments.save:  # after the table: what took minutes to measure is shown even if the disk is full
        with replacing_file(Path(arguments.save)) as part:
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        plot.plot(result, Path(arguments.plot))
    rows = [row for model in result["models"] for row in model["backends"]]
    return 0 if any(row.get(task.name) for row in rows for task in TASKS) else 1


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    from pocketlm.bench import measure, schema
    from pocketlm.bench.protocol import choose
    from pocketlm.bench.tasks import TASKS
    from pocketlm.runtime.threads import check_threads

    backends = choose(arguments.backends)
    given = {name: getattr(arguments, name) for name in ("rounds", "tokens", "time_limit")}
    given |= {task.setting: _numbers(task.setting, getattr(arguments, task.setting)) for task in TASKS}
    for name, value in given.items():
        least = min(value) if isinstance(value, tuple) else value
        if least is not None and not least >= (0 if name == "depths" else 1):
            raise UsageError(f"--{name.replace('_', '-')} {least}: expected {0 if name == 'depths' else 1} or more")
    chosen = QUICK if arguments.quick else {}
    if given["pp"] or given["tg"]:
        chosen = {"rounds": LLAMA_BENCH_ROUNDS, **chosen, **ALONE}
    chosen = {**chosen, **{name: value for name, value in given.items() if value is not None}}
    settings = measure.Settings(threads=check_threads(arguments.threads), **chosen)
    paths = [_find(name) for name in arguments.models]
    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    with handled(ends, lambda number, _: sys.exit(128 + number)):  # else a child that hangs would go on for ever
        say = partial(terminal_text.print, file=sys.stderr, flush=True)
        return schema.showable(measure.bench(paths, backends, settings, say))


def _numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"--{name} {text}: expected whole numbers with commas between them, as 32,512") from None


def _find(name: str) -> Path:
    """A model file by its path or short name, a shape by its name."""
    from pocketlm.bench import convert, shapes
    from pocketlm.model import find_model

    return shapes.find(name, convert.folder()) if name in shapes.NAMES and not Path(name).exists() else find_model(name)
