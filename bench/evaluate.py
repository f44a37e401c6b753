"""`pocketlm eval`: how well models predict texts, side by side. Model files and checkpoints are alike: each is run.

In: names of models and texts. Out: a table, JSON or Markdown. Bits per character are fair across tokenizers, perplexities
are not: they are of a token, whatever that is.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pocketlm.bench.report import columns, markdown_rows
from pocketlm.cli_options import open_model, read_text, running_arguments
from pocketlm.errors import PocketlmError, UsageError
from pocketlm.model import find_model
from pocketlm.runtime.evaluation import perplexity
from pocketlm.terminal_text import count, print

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "model": lambda row: row["model"],
    "text": lambda row: row["text"],
    "bits per character": lambda row: f"{row['bits_per_character']:.4f}",
    "perplexity": lambda row: f"{row['perplexity']:.4f}",
    "tokens": lambda row: f"{row['tokens']:,}",
    "tokens per character": lambda row: f"{row['tokens_per_character']:.4f}",
    "window": lambda row: str(row["window"]),
    "parameters": lambda row: f"{row['parameters']:,}",
    "MB": lambda row: f"{row['bytes'] / 1e6:.1f}",
}
NAMES = ("model", "text")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `pocketlm eval`."""
    kinds = "GGUFs, checkpoints, runs of `pocketlm train`, folders, or short names of installed models"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=kinds)
    running_arguments(parser)
    texts = "UTF-8 texts to predict; - reads standard input"
    parser.add_argument("--text", nargs="+", action="extend", required=True, metavar="FILE", help=texts)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object, or a list of them where there are several")
    form.add_argument("--markdown", action="store_true", help="a table for a README")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print; the exit status. Several pairs of a model and a text are all tried; one alone that fails is a
    PocketlmError.
    """
    if not arguments.models:  # eval --text FILE MODEL …
        arguments.models, arguments.text = arguments.text[1:], arguments.text[:1]
    if not arguments.models:
        raise UsageError("eval: give the models first, as in: pocketlm eval a.gguf run --text story.txt")
    texts = {name: read_text(name) for name in arguments.text}
    rows, failures = [], []
    for name in arguments.models:
        try:
            with (
                _file(find_model(name)) as path,
                open_model(argparse.Namespace(**{**vars(arguments), "model": str(path)})) as model,
            ):
                rows += _rows(name, model, texts, failures)
        except PocketlmError as error:
            failures.append(error)
    if failures and len(arguments.models) * len(texts) == 1:
        raise failures[0]
    if arguments.json:
        print(json.dumps(rows[0] if len(arguments.models) * len(texts) == 1 else rows, ensure_ascii=False))
    elif len(rows) == 1 and not arguments.markdown and not failures:
        row, counts = rows[0], f"{count(rows[0]['tokens'], 'token')} in windows of {rows[0]['window']}"
        print(f"perplexity {row['perplexity']:.4f}, {row['bits_per_character']:.4f} bits per character, {counts}")
        print(f"[{row['tokens'] / row['seconds']:.0f} tokens/s, {row['backend']}]", file=sys.stderr)
    elif rows:
        cells = [[*COLUMNS], *([show(row) for show in COLUMNS.values()] for row in rows)]
        print(*(markdown_rows if arguments.markdown else columns)(cells, len(NAMES)), sep="\n")
    for error in failures:
        print(f"pocketlm: {error}", file=sys.stderr)
    return 1 if failures else 0


@contextmanager
def _file(path: Path) -> Iterator[Path]:
    """The model file to run: the file itself, or what a checkpoint becomes in float32 for as long as the block runs."""
    from pocketlm.export.dialects import read_canonical
    from pocketlm.export.export import export
    from pocketlm.export.from_model_file import is_model_file

    if is_model_file(path) or not path.exists():
        yield path
        return
    model = read_canonical(path)
    with TemporaryDirectory(prefix="pocketlm-") as folder:
        out = Path(folder) / f"{path.stem}.gguf"
        export(model, path, out, quant="f32")
        yield out


def _rows(name: str, model: Any, texts: dict[str, str], failures: list[PocketlmError]) -> Iterator[dict[str, Any]]:
    tokenizer, decoder = model.tokenizer, model.tokenizer.stream_decoder()
    for file, text in texts.items():
        try:
            ids = tokenizer.encode(text)
            started = time.perf_counter()
            result = perplexity(model.executor, ids, tokenizer.bos_id if tokenizer.adds_bos else None)
        except PocketlmError as error:
            failures.append(error)
            continue
        seconds = time.perf_counter() - started
        lengths = [len(decoder.push(id)) for id in ids]  # characters that each token completes
        predicted = len(text) - sum(lengths[i] for i in result.unpredicted)
        yield {
            "model": name, "text": file, "perplexity": result.perplexity,
            "bits_per_character": result.nats / math.log(2) / max(predicted, 1), "tokens": result.n_tokens,
            "tokens_per_character": len(ids) / max(len(text), 1), "window": result.window, "seconds": seconds,
            "parameters": model.n_parameters, "bytes": model.file_bytes, "backend": model.backend,
        }  # fmt: skip
