"""A run's `log.jsonl`, the lines of progress, and a plot of them. Knows no PyTorch: a log can be plotted anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pocketlm.errors import FileError, refused
from pocketlm.runtime.atomic import replacing_file, write_file
from pocketlm.terminal_text import clock, count

LOG, PICTURE = "log.jsonl", "log.png"
CURVES = {  # of a row, below the loss: label, colour
    "lr": ("learning rate", "#555555"), "tokens_per_second": ("tokens/s", "#2e8b57"), "gigabytes": ("GPU, GB", "#8e5ea2"),
}  # fmt: skip
MOST, DECODED = 12, 1 << 14  # how many files are named; of how many tokens of each the characters are counted
SMOOTHING = 0.9  # share of the running mean that stays at every row


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a line that was cut short, or is none of ours, is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            row = json.loads(line)
            rows += [row] * (row["step"] >= 0)
    return rows


def rewind(path: Path, step: int) -> None:
    """Take out what a killed run wrote after its last checkpoint."""
    write_file(path, "".join(_line(row) for row in read_log(path) if row["step"] <= step))


def write(path: Path, row: dict[str, Any]) -> None:
    with refused(path, "make room; the same command goes on", "cannot be written"), open(path, "a", encoding="utf-8") as file:
        file.write(_line(row))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def progress(row: dict[str, Any], steps: int, seconds_left: float) -> str:
    return (
        f"step {row['step']}/{steps} {row['step'] / steps:4.0%}  loss {row['loss']:.4f}  {row['tokens_per_second']:,} tokens/s"
        f"  {clock(seconds_left)} left"
    )


def validation(row: dict[str, Any], best: float) -> Iterator[str]:
    """The lines of a validation: how good, and what the model says, as it says it."""
    measured = f"(best {best:.4f}), perplexity {row['perplexity']:.2f}, epoch {row['epoch']:.2f}"
    yield f"validation loss {row['val_loss']:.4f} {measured}"
    for sample in row["samples"]:
        for text in sample["texts"]:
            first, *rest = f"{sample['prompt']}{text}".splitlines() or [""]
            yield f"  · {first}"
            yield from (f"    {line}" for line in rest)


def facts(sizes: dict[str, int], tok: Any, train: Any, settings: Any) -> Iterator[str]:
    """What a run is made of, at its start. `sizes`: parameters of every tensor; `train`: the corpus."""
    total = sum(sizes.values())
    yield f"{total:,} parameters, {train.n_tokens:,} tokens to learn from, a vocabulary of {tok.n_vocab:,}"
    kinds = {"attention": ".attn.", "feed-forward": ".ffn."}
    parts = {kind: sum(n for name, n in sizes.items() if sign in name) for kind, sign in kinds.items()}
    parts = {"embedding": sum(n for name, n in sizes.items() if "emb." in name or name.startswith("head.")), **parts}
    yield "parameters: " + ", ".join(f"{kind} {n:,} ({n / total:.1%})" for kind, n in parts.items())
    rows = sorted(zip(train.files, train.ids, strict=True), key=lambda row: -len(row[1]))
    for file, ids in rows[:MOST]:
        some = ids[:DECODED].tolist()
        length = len(tok.decode(some)) / len(some)
        yield f"{file}: {count(len(ids), 'token')} ({len(ids) / train.n_tokens:.1%}), {length:.2f} characters a token"
    if rest := rows[MOST:]:
        yield f"{count(len(rest), 'more file')}: {count(sum(len(ids) for _, ids in rest), 'token')}"
    seen = settings.steps * settings.batch * settings.context
    steps, tokens = count(settings.steps, "step"), count(settings.batch * settings.context, "token")
    yield f"{steps} of {tokens}: {seen / train.n_tokens:.2f} epochs"


def smoothed(values: list[float]) -> list[float]:
    """The exponential moving mean, corrected for its start."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        result.append(mean / weight)
    return result


def plot(run: Path) -> Path:
    """Draw losses, learning rate, speed and memory over the steps to RUN/log.png. Raises FileError where there are none."""
    rows = read_log(run / LOG)
    train, val = ([row for row in rows if name in row] for name in ("loss", "val_loss"))
    if not train:
        raise FileError(run / LOG, "holds no steps", "name the folder of a run that has begun")
    from matplotlib.figure import Figure

    drawn = {name: look for name, look in CURVES.items() if all(name in row for row in train)}
    figure = Figure((8, 5 + len(drawn)), layout="constrained")
    panels = figure.subplots(1 + len(drawn), 1, sharex=True, height_ratios=(3, *[1] * len(drawn)))
    steps, losses = ([row[name] for row in train] for name in ("step", "loss"))
    panels[0].plot(steps, losses, color="#b8cbe0", linewidth=0.8, label="loss")
    panels[0].plot(steps, smoothed(losses), color="#1f5a99", label="smoothed")
    panels[0].plot(*([row[name] for row in val] for name in ("step", "val_loss")), "o-", color="#c0392b", label="validation")
    panels[0].legend()
    for panel, (name, (_, color)) in zip(panels[1:], drawn.items(), strict=True):
        panel.plot(steps, [row[name] for row in train], color=color, linewidth=0.8)
    for panel, label in zip(panels, ("nats a token", *(label for label, _ in drawn.values())), strict=True):
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    with replacing_file(run / PICTURE) as part:
        figure.savefig(part, format="png", dpi=80)
    return run / PICTURE
