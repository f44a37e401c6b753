"""A result as a picture: bars with spread, a row of panels a model. Hatched, in colours that the colour-blind tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketlm.errors import FileError, PocketlmError

# Okabe and Ito's palette (jfly.uni-koeln.de/color), from dark to light with hatches that differ in black and white too
LOOKS = [("#0072B2", ""), ("#E69F00", "///"), ("#009E73", "..."), ("#CC79A7", "xxx"), ("#56B4E9", "\\\\\\")]
ENDINGS = (".png", ".svg", ".pdf")
PANELS = (("prefill", "prompt of {} tokens", "prompt, tokens/s"), ("decode", "after {} tokens", "decoding, tokens/s"))


def require(path: Path) -> None:
    """PocketlmError where matplotlib is missing or `path` cannot be a picture: asked before minutes of measuring."""
    if path.suffix.lower() not in ENDINGS or not path.absolute().parent.is_dir():
        raise FileError(path, "is no picture in a folder that exists", f"name a file that ends in {', '.join(ENDINGS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PocketlmError("--plot needs the package matplotlib; get it with: pip install matplotlib") from None


def plot(result: dict[str, Any], path: Path) -> None:
    """Write the picture; the ending of `path` chooses the format. Raises FileError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = result["models"]
    tallest = max(len(model["backends"]) for model in models)
    size = (11, len(models) * (1.2 + 0.55 * tallest))
    figure, grid = pyplot.subplots(len(models), len(PANELS), figsize=size, squeeze=False, layout="constrained")
    for model, panels in zip(models, grid, strict=True):
        for axes, (job, label, title) in zip(panels, PANELS, strict=True):
            _panel(axes, model, job, label)
            axes.set_title(f"{model['name']}: {title}", fontsize=10)
    facts = result["machine"]
    figure.supxlabel(
        f"{facts['cpu']}, {facts['threads']} threads; bars: medians, lines: quartiles of {result['settings']['rounds']} rounds",
        fontsize=8,
    )
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib does not write
        raise FileError(path, f"cannot be written ({error})", "name a .png, .svg or .pdf file") from None
    finally:
        pyplot.close(figure)


def _panel(axes: Any, model: dict[str, Any], job: str, label: str) -> None:
    rows = [row for row in model["backends"] if row.get(job)]
    keys = sorted({key for row in rows for key in row[job]}, key=int)
    height = 0.8 / max(len(keys), 1)
    for i, key in enumerate(keys):
        colour, hatch = LOOKS[i % len(LOOKS)]
        there = [(at, row[job][key]) for at, row in enumerate(rows) if key in row[job]]
        medians = [measure["median"] for _, measure in there]
        spread = [[measure["median"] - measure["low"] for _, measure in there], [m["high"] - m["median"] for _, m in there]]
        places = [at + (i - (len(keys) - 1) / 2) * height for at, _ in there]
        axes.barh(
            places, medians, height, xerr=spread, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6, capsize=2,
            error_kw={"elinewidth": 0.9}, label=label.format(key),
        )  # fmt: skip
    if job == "decode" and rows:
        axes.axvline(model["bound"], color="black", linestyle="--", linewidth=1, label="bound set by the memory")
    names = [row["name"] + (" (disagrees)" if row["status"] == "disagrees" else "") for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    if rows:
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)
