"""A result as tables: for a terminal (rich, or plain text without it), Markdown and CSV. Knows the result, not how it came."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pocketlm.bench import machine, summary
from pocketlm.bench.tasks import TASKS, keys
from pocketlm.terminal_text import count

MB = 1e6
Result = dict[str, Any]


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def tables(result: Result) -> list[Table]:
    """Speed, the same as llama-bench shows it, and costs of every model; with several models the ladder of their sizes."""
    found = []
    for model in result["models"]:
        drawn = [*_speed(model, result["settings"]), *_like_llama_bench(model, result), *_cost(model)]
        if drawn:
            drawn[0].notes.extend(_notes(model))
        found += drawn
    return found + ([_ladder(result["models"])] if len(result["models"]) > 1 else [])


def head(result: Result) -> list[str]:
    """The machine and the settings, a line each."""
    facts = result["machine"]
    return [machine.line(facts), f"{count(facts['threads'], 'thread')}, {facts['bandwidth'] / 1e9:.1f} GB/s from memory"]


def foot(result: Result) -> list[str]:
    """Backends that are not installed, in one line, and the warnings."""
    missing: dict[str, list[str]] = {}
    for row in (row for model in result["models"] for row in model["backends"] if row["status"] == "missing"):
        names = missing.setdefault(row["reason"], [])
        names += [row["name"]] if row["name"] not in names else []
    groups = "; ".join(f"{', '.join(names)} ({command})" for command, names in missing.items())
    return ([f"not installed: {groups}"] if groups else []) + [f"warning: {text}" for text in result["warnings"]]


def _rows(model: Result) -> list[Result]:
    return [row for row in model["backends"] if row["status"] != "missing"]


def _title(model: Result) -> str:
    millions = model["parameters"] / 1e6
    return f"{model['name']}: {millions:{'.0f' if millions >= 100 else '.3g'}} M parameters, {model['file_bytes'] / MB:.1f} MB"


def _notes(model: Result) -> list[str]:
    """Notes for a model's first table: what bounds its speed, and which rows are not ok."""
    bound = (
        f"bound: {model['bound']:.0f} tokens/s, the memory's bandwidth over the {model['bytes_per_token'] / MB:.1f} MB of this "
        "file that a token reads; a file that fits into the processor's cache may pass it"
    )
    return [bound, *(f"{row['name']}: {row['status']}: {row['reason']}" for row in _rows(model) if row["status"] != "ok")]


def _speed(model: Result, settings: Result) -> list[Table]:
    columns = [(task, key) for task in TASKS if not task.like_llama_bench for key in keys(model, task)]
    user = any("user" in row for row in model["backends"])
    rows = [
        [
            row["name"],
            *(_figure(row.get(task.name, {}).get(key)) for task, key in columns),
            *([_figure(row.get("user"))] if user else []),
            row["status"],
        ]
        for row in _rows(model)
    ]
    if not rows or not (columns or settings["prompts"] or settings["depths"]):
        return []
    header = ["tokens/s", *(task.column.format(key) for task, key in columns), *(["user sees"] if user else []), "status"]
    rounds, tokens = settings["rounds"], settings["tokens"]
    spread = "± what another run's median may be off by" if rounds >= summary.FEWEST else "too few for a ±"
    note = f"after N: {count(tokens, 'token')} with N in the cache; medians of {count(rounds, 'round')}, {spread}"
    return [Table(_title(model), header, rows, [note])]


def _like_llama_bench(model: Result, result: Result) -> list[Table]:
    """The table of llama.cpp's own bench tool, with its names and units: published figures can stand beside it."""
    rows = []
    size = model.get("tensor_bytes", model["file_bytes"]) / 2**20
    billions = model["parameters"] / 1e9
    of_model = [
        model["name"],
        f"{size:.2f} MiB" if size < 1024 else f"{size / 1024:.2f} GiB",
        f"{billions:.2f} B" if billions >= 1 else f"{1000 * billions:.2f} M",
    ]
    for task in TASKS:
        for key in keys(model, task) if task.like_llama_bench else ():
            for row in (row for row in _rows(model) if key in row.get(task.name, {})):
                mean, deviation = summary.shown(row[task.name][key])
                figure = f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")
                threads = str(result["machine"]["threads"])
                rows.append([*of_model, row["name"], threads, task.column.format(key), figure])
    if not rows:
        return []
    rounds = result["settings"]["rounds"]
    spread = "means ± standard deviations" if rounds >= summary.FEWEST else "means"
    note = f"N random tokens as one prompt (pp) or one by one (tg) from an empty cache; {spread} of {count(rounds, 'round')}"
    header = ["model", "size", "params", "backend", "threads", "test", "t/s"]
    return [Table(f"{_title(model)}, as llama-bench counts", header, rows, [note])]


def _cost(model: Result) -> list[Table]:
    decoding = next(((task, key) for task in TASKS if task.generates for key in keys(model, task)), None)
    header = ["", "load s", "first token s", "ms a token", "95 %", "99 %", "peak MB", "file MB", "J a token", "cosine",
              "same first", "perplexity"]  # fmt: skip
    rows = []
    for row in _rows(model):
        figures = row.get(decoding[0].name, {}).get(decoding[1], {}) if decoding else {}
        latency, agreement = figures.get("latency_ms", {}), row.get("agreement", {})
        rows.append([
            row["name"], _number(row.get("load_seconds"), ".2f"), _number(row.get("first_token_seconds"), ".2f"),
            *(_number(latency.get(key), ".2f") for key in ("p50", "p95", "p99")),
            _number(row.get("peak_bytes"), ".0f", MB), _number(row.get("file_bytes"), ".1f", MB),
            _number(figures.get("joules_per_token"), ".3f"), _number(agreement.get("cosine"), ".6f"),
            _number(agreement.get("same_first"), ".1%"), _number(agreement.get("perplexity"), ".5g"),
        ])  # fmt: skip
    notes = []
    if decoding:
        task, key = decoding
        notes = [f"milliseconds and joules are of {'' if task.like_llama_bench else 'decoding '}{task.legend.format(key)}"]
    made = [row["converted"]["kind"] for row in model["backends"] if "converted" in row]
    notes += [f"converted from the GGUF, dequantised: {', '.join(dict.fromkeys(made))}"] if made else []
    return [Table(f"{model['name']}: what it costs, and is it the same model?", header, rows, notes)] if rows else []


def _ladder(models: list[Result]) -> Table:
    names = list(dict.fromkeys(row["name"] for model in models for row in _rows(model)))
    rows = []
    for model in models:
        by_name = {row["name"]: row for row in model["backends"]}
        exact = next((row["agreement"].get("perplexity") for row in (by_name.get(n, {}) for n in ("numpy", "native"))
                      if "agreement" in row), None)  # fmt: skip
        first = {
            name: next((figures for task in TASKS if task.generates for figures in row.get(task.name, {}).values()), None)
            for name, row in by_name.items()
        }
        bits = 8 * model["file_bytes"] / model["parameters"]
        rows.append([model["name"], _number(model["file_bytes"], ".1f", MB), f"{bits:.2f}", _number(exact, ".5g"),
                     *(_figure(first.get(name)) for name in names)])  # fmt: skip
    header = ["", "MB", "bits a weight", "perplexity", *names]
    return Table("Decoding, model beside model (tokens/s)", header, rows)


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "–" if value is None else format(value / unit, form)


def _figure(measure: Result | None) -> str:
    if measure is None:
        return "–"
    value, spread = summary.shown(measure)
    share = "" if spread is None else f" ±{spread / value if value else 0:.0%}"
    return f"{value:{'.0f' if value >= 100 else '.1f'}}{share}"


# ── the forms ────────────────────────────────────────────────────────────────────────────────────────────────────────


def columns(cells: list[list[str]], n_names: int = 1) -> list[str]:
    """A header and rows as lines; the first `n_names` columns are names, the others figures."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    names, figures = widths[:n_names], widths[n_names:]
    return ["  ".join([*map(str.ljust, row, names), *map(str.rjust, row[n_names:], figures)]).rstrip() for row in cells]


def markdown_rows(cells: list[list[str]], n_names: int = 1) -> list[str]:
    """The same header and rows as lines of a Markdown table."""
    rule = ["---"] * n_names + ["--:"] * (len(cells[0]) - n_names)
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in [cells[0], rule, *cells[1:]]]


def plain(result: Result, extra: Iterable[Table] = ()) -> str:
    """Columns in spaces, for where rich is not installed or the output is not a terminal."""
    lines = head(result)
    for table in [*tables(result), *extra]:
        lines += ["", table.title, *columns([table.header, *table.rows]), *table.notes]
    return "\n".join([*lines, "", *foot(result)]).rstrip()


def markdown(result: Result, extra: Iterable[Table] = ()) -> str:
    """The result as Markdown, for a README."""
    lines = [f"{line}.  " for line in head(result)]
    for table in [*tables(result), *extra]:
        lines += ["", f"**{table.title}**", "", *markdown_rows([table.header, *table.rows])]
        lines += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join([*lines, "", *(f"{line}  " for line in foot(result))]).rstrip()


def terminal(result: Result, extra: Iterable[Table] = ()) -> str:
    """With rich, where it is installed and someone looks; else plain."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError:
        return plain(result, extra)
    if not sys.stdout.isatty():
        return plain(result, extra)
    console = Console(highlight=False)
    with console.capture() as captured:
        for line in head(result):
            console.print(Text(line))
        for table in [*tables(result), *extra]:
            drawn = RichTable(title=Text(table.title), title_justify="left")
            for i, name in enumerate(table.header):
                drawn.add_column(Text(name), justify="right" if i else "left")
            for row in table.rows:
                drawn.add_row(*map(Text, row), style="red" if table.header[-1] == "status" and row[-1] != "ok" else None)
            console.print(drawn)
            for note in table.notes:
                console.print(Text(note))
        for line in foot(result):
            console.print(Text(line, style="bold yellow" if line.startswith("warning") else ""))
    return captured.get().rstrip("\n")


# Where a column stands: in the run, in a model, in a backend's row. Every line says which run it is of: lines of many files can
# be joined.
CSV_COLUMNS = {
    "time": "run.time", "cpu": "run.machine.cpu", "system": "run.machine.system", "cores": "run.machine.cores",
    "threads": "run.machine.threads", "rounds": "run.settings.rounds", "drift": "run.reference_loop.drift",
    "python": "run.machine.python", "packages": "run.machine.packages", "model": "model.name", "backend": "row.name",
    "version": "row.facts.version", "build": "row.facts.build", "settings": "row.facts.settings", "status": "row.status",
    "reason": "row.reason", "load_seconds": "row.load_seconds", "first_token_seconds": "row.first_token_seconds",
    "user_tokens_per_second": "row.user.median", "peak_bytes": "row.peak_bytes", "file_bytes": "row.file_bytes",
    "cosine": "row.agreement.cosine", "same_first": "row.agreement.same_first", "perplexity": "row.agreement.perplexity",
}  # fmt: skip
CSV_FIGURES = ("median", "low", "high", "uncertainty", "joules_per_token")
CSV_TEST_FIGURES = ("mean", "deviation", *CSV_FIGURES)
CSV_LATENCIES = ("p50", "p95", "p99")


def comma_separated(result: Result) -> str:
    """A line for every backend of every model; the columns of tasks are those of the settings."""
    columns, latencies = dict(CSV_COLUMNS), {}
    jobs = [(task, n) for task in TASKS for n in result["settings"].get(task.setting, [])]
    for task, n in jobs:
        names = CSV_TEST_FIGURES if task.like_llama_bench else CSV_FIGURES
        columns |= {f"{task.name}_{n}_{name}": f"row.{task.name}.{n}.{name}" for name in names}
        times = CSV_LATENCIES if task.generates else ()
        latencies |= {f"{task.name}_{n}_{name}_ms": f"row.{task.name}.{n}.latency_ms.{name}" for name in times}
    columns |= latencies
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for model in result["models"]:
        for row in model["backends"]:
            writer.writerow(_value({"run": result, "model": model, "row": row}, place) for place in columns.values())
    return out.getvalue().rstrip("\n")


def _value(value: Any, place: str) -> Any:
    """What stands at a place; None where there is nothing."""
    for name in place.split("."):
        value = None if value is None else value.get(name)
    return "; ".join(f"{name} {text}" for name, text in value.items()) if isinstance(value, dict) else value
