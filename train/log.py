"""A run's `log.jsonl`, the lines of progress, and a plot of them. Knows no PyTorch: a log can be plotted anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pocketlm.errors import FileError, PocketlmError
from pocketlm.runtime.atomic import replacing_file

LOG, PICTURE = "log.jsonl", "log.png"
SMOOTHING = 0.9  # share of the running mean that stays at every row


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a line that was cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def rewind(path: Path, step: int) -> None:
    """Take out what a killed run wrote after its last checkpoint."""
    with replacing_file(path) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in read_log(path) if row["step"] <= step), encoding="utf-8")


def write(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def progress(row: dict[str, Any], steps: int, seconds_left: float) -> str:
    minutes, seconds = divmod(round(seconds_left), 60)
    left = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
    return (
        f"step {row['step']}/{steps} {row['step'] / steps:4.0%}  loss {row['loss']:.4f}  {row['tokens_per_second']:,} tokens/s"
        f"  {left} left"
    )


def smoothed(values: list[float]) -> list[float]:
    """The exponential moving mean, corrected for its start."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        result.append(mean / weight)
    return result


def plot(run: Path) -> Path:
    """Draw losses, learning rate and speed over the steps to RUN/log.png. Raises PocketlmError without matplotlib."""
    rows = read_log(run / LOG)
    train, val = ([row for row in rows if name in row] for name in ("loss", "val_loss"))
    if not train:
        raise FileError(run / LOG, "holds no steps", "name the folder of a run that has begun")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PocketlmError("drawing needs matplotlib; get it with: pip install matplotlib") from None
    figure = Figure((8, 7), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    steps, losses = ([row[name] for row in train] for name in ("step", "loss"))
    panels[0].plot(steps, losses, color="#b8cbe0", linewidth=0.8, label="loss")
    panels[0].plot(steps, smoothed(losses), color="#1f5a99", label="smoothed")
    panels[0].plot(*([row[name] for row in val] for name in ("step", "val_loss")), "o-", color="#c0392b", label="validation")
    panels[0].legend()
    panels[1].plot(steps, [row["lr"] for row in train], color="#555555")
    panels[2].plot(steps, [row["tokens_per_second"] for row in train], color="#2e8b57", linewidth=0.8)
    for panel, label in zip(panels, ("nats a token", "learning rate", "tokens/s"), strict=True):
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[2].set_xlabel("step")
    with replacing_file(run / PICTURE) as part:
        figure.savefig(part, format="png", dpi=80)
    return run / PICTURE
