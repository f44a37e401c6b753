"""A result as tables: for a terminal (rich, or plain text without it), Markdown and CSV. Knows the result, not how it came."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from pocketlm.bench import machine

MB = 1e6
Result = dict[str, Any]


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def tables(result: Result) -> list[Table]:
    """Two tables a model, speed and what it costs, and with several models the ladder of their sizes."""
    found = [table for model in result["models"] for table in (_speed(model), _cost(model))]
    return found + ([_ladder(result["models"])] if len(result["models"]) > 1 else [])


def head(result: Result) -> list[str]:
    """The machine and the settings, a line each."""
    facts, settings = result["machine"], result["settings"]
    return [
        machine.line(facts),
        f"{facts['threads']} threads, {facts['bandwidth'] / 1e9:.1f} GB/s from memory; medians of {settings['rounds']} rounds "
        f"of {settings['tokens']} tokens, ± what another run's may be off by",
    ]


def _speed(model: Result) -> Table:
    prompts, depths = (_keys(model, job) for job in ("prefill", "decode"))
    header = ["tokens/s", *(f"prompt {n}" for n in prompts), *(f"after {depth}" for depth in depths), "user sees"]
    rows = [
        [
            row["name"],
            *(_figure(row.get("prefill", {}).get(n)) for n in prompts),
            *(_figure(row.get("decode", {}).get(depth)) for depth in depths),
            _figure(row.get("user")),
            row["status"],
        ]
        for row in model["backends"]
    ]
    notes = [f"{row['name']}: {row['status']}: {row['reason']}" for row in model["backends"] if row["status"] != "ok"]
    bound = (
        f"bound: {model['bound']:.0f} tokens/s, the memory's bandwidth over the {model['bytes_per_token'] / MB:.1f} MB of this "
        "file that a token reads; a file that fits into the processor's cache may pass it"
    )
    title = f"{model['name']}: {model['parameters'] / 1e6:.0f} M parameters, {model['file_bytes'] / MB:.1f} MB"
    return Table(title, [*header, "status"], rows, [bound, *notes])


def _cost(model: Result) -> Table:
    depths = _keys(model, "decode")
    header = ["", "load s", "first token s", "ms a token", "95 %", "99 %", "peak MB", "file MB", "J a token", "cosine",
              "same first", "perplexity"]  # fmt: skip
    rows = []
    for row in model["backends"]:
        decode = row.get("decode", {}).get(depths[0]) if depths else None
        latency = (decode or {}).get("latency_ms") or {}
        agreement = row.get("agreement", {})
        rows.append([
            row["name"], _number(row.get("load_seconds"), ".2f"), _number(row.get("first_token_seconds"), ".2f"),
            *(_number(latency.get(key), ".2f") for key in ("p50", "p95", "p99")),
            _number(row.get("peak_bytes"), ".0f", MB), _number(row.get("file_bytes"), ".1f", MB),
            _number((decode or {}).get("joules_per_token"), ".3f"), _number(agreement.get("cosine"), ".6f"),
            _number(agreement.get("same_first"), ".1%"), _number(agreement.get("perplexity"), ".5g"),
        ])  # fmt: skip
    notes = [f"milliseconds and joules are of decoding after {depths[0]} tokens"] if depths else []
    made = [row["converted"]["kind"] for row in model["backends"] if "converted" in row]
    notes += [f"converted from the GGUF, dequantised: {', '.join(dict.fromkeys(made))}"] if made else []
    return Table(f"{model['name']}: what it costs, and is it the same model?", header, rows, notes)


def _ladder(models: list[Result]) -> Table:
    names = list(dict.fromkeys(row["name"] for model in models for row in model["backends"]))
    rows = []
    for model in models:
        by_name = {row["name"]: row for row in model["backends"]}
        exact = next((row["agreement"].get("perplexity") for row in (by_name.get(n, {}) for n in ("numpy", "native"))
                      if "agreement" in row), None)  # fmt: skip
        first = {name: next(iter(row.get("decode", {}).values()), None) for name, row in by_name.items()}
        bits = 8 * model["file_bytes"] / model["parameters"]
        rows.append([model["name"], _number(model["file_bytes"], ".1f", MB), f"{bits:.2f}", _number(exact, ".5g"),
                     *(_figure(first.get(name)) for name in names)])  # fmt: skip
    header = ["", "MB", "bits a weight", "perplexity", *names]
    return Table("Decoding, model beside model (tokens/s)", header, rows)


def _keys(model: Result, job: str) -> list[str]:
    return sorted({key for row in model["backends"] for key in row.get(job, {})}, key=int)


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "–" if value is None else format(value / unit, form)


def _figure(measure: Result | None) -> str:
    if measure is None:
        return "–"
    digits = ".0f" if measure["median"] >= 100 else ".1f"
    return f"{measure['median']:{digits}} ±{measure['uncertainty']:.0%}"


# ── the forms ────────────────────────────────────────────────────────────────────────────────────────────────────────


def plain(result: Result, extra: Iterable[Table] = ()) -> str:
    """Columns in spaces, for where rich is not installed or the output is not a terminal."""
    lines = head(result)
    for table in [*tables(result), *extra]:
        cells = [table.header, *table.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(table.header))]
        lines += ["", table.title]
        lines += ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]
        lines += table.notes
    return "\n".join([*lines, *_warnings(result)])


def markdown(result: Result, extra: Iterable[Table] = ()) -> str:
    """The same for a README."""
    lines = [f"{line}.  " for line in head(result)]
    for table in [*tables(result), *extra]:
        lines += ["", f"**{table.title}**", ""]
        lines += [_markdown_row(row) for row in [table.header, ["---", *["--:"] * (len(table.header) - 1)], *table.rows]]
        lines += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join([*lines, *_warnings(result)])


def _markdown_row(row: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


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
        for line in _warnings(result):
            console.print(Text(line, style="bold yellow"))
    return captured.get().rstrip("\n")


def _warnings(result: Result) -> list[str]:
    return ["", *(f"warning: {text}" for text in result["warnings"])] if result["warnings"] else []


CSV_COLUMNS: dict[str, Callable[[Result, Result], Any]] = {
    "model": lambda model, row: model["name"],
    "backend": lambda model, row: row["name"],
    "status": lambda model, row: row["status"],
    "reason": lambda model, row: row["reason"],
    "load_seconds": lambda model, row: row.get("load_seconds"),
    "first_token_seconds": lambda model, row: row.get("first_token_seconds"),
    "user_tokens_per_second": lambda model, row: row.get("user", {}).get("median"),
    "peak_bytes": lambda model, row: row.get("peak_bytes"),
    "file_bytes": lambda model, row: row.get("file_bytes"),
    "cosine": lambda model, row: row.get("agreement", {}).get("cosine"),
    "same_first": lambda model, row: row.get("agreement", {}).get("same_first"),
    "perplexity": lambda model, row: row.get("agreement", {}).get("perplexity"),
}
CSV_FIGURES = ("median", "low", "high", "uncertainty", "joules_per_token")


def comma_separated(result: Result) -> str:
    """A line for every backend of every model; the columns of prompts and depths are those of the settings."""
    jobs = [(job, str(n)) for job, name in (("prefill", "prompts"), ("decode", "depths")) for n in result["settings"][name]]
    columns = [f"{job}_{n}_{figure}" for job, n in jobs for figure in CSV_FIGURES]
    latencies = [(str(n), key) for n in result["settings"]["depths"] for key in ("p50", "p95", "p99")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*CSV_COLUMNS, *columns, *(f"decode_{n}_{key}_ms" for n, key in latencies)])
    for model in result["models"]:
        for row in model["backends"]:
            measures = [row.get(job, {}).get(n, {}) for job, n in jobs]
            times = [row.get("decode", {}).get(n, {}).get("latency_ms", {}).get(key) for n, key in latencies]
            writer.writerow([
                *(column(model, row) for column in CSV_COLUMNS.values()),
                *(measure.get(figure) for measure in measures for figure in CSV_FIGURES), *times,
            ])  # fmt: skip
    return out.getvalue().rstrip("\n")
