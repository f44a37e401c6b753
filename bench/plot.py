"""A result as a picture: bars with their figures, two panels a model. Made to be read at 800 pixels, the width of a page.

Hatched, in colours that the colour-blind tell apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketlm.bench import summary
from pocketlm.bench.measure import DRIFT
from pocketlm.bench.tasks import TASKS, keys
from pocketlm.errors import FileError, needed
from pocketlm.runtime.atomic import replacing_file
from pocketlm.terminal_text import count

# Okabe and Ito's palette (jfly.uni-koeln.de/color), from dark to light with hatches that differ in black and white too
LOOKS = [("#0072B2", ""), ("#E69F00", "///"), ("#009E73", "..."), ("#CC79A7", "xxx"), ("#56B4E9", "\\\\\\")]
ENDINGS = (".png", ".svg", ".pdf")
WIDTH, DPI = 8.0, 150  # inches, and pixels an inch: more than 800 for sharp screens
SMALL, NORMAL = 7.5, 9.0  # points
BAR, GAP = 0.16, 0.12  # inches: a bar, with room for its figure, and the gap to the next backend
FURTHEST = 2.2  # a bound further away than this many longest bars is named and not drawn


def require(path: Path) -> None:
    """PocketlmError where matplotlib is missing or `path` cannot be a picture: asked before minutes of measuring."""
    if path.suffix.lower() not in ENDINGS:
        raise FileError(path, "is no picture", f"name a file that ends in {', '.join(ENDINGS)}")
    if not path.absolute().parent.is_dir():
        raise FileError(path, "its folder does not exist", "make it, or name another file")
    with needed("--plot", "matplotlib"):
        import matplotlib  # noqa: F401


def plot(result: dict[str, Any], path: Path) -> None:
    """Write the picture; the ending of `path` chooses the format. Raises FileError."""
    figure = draw(result)
    if figure is None:
        raise FileError(path, "was not drawn: no backend has figures", "the table says why")
    try:
        with replacing_file(path) as part:
            figure.savefig(part, dpi=DPI, format=path.suffix[1:].lower())
    except ValueError as error:  # an ending that matplotlib does not write
        raise FileError(path, f"cannot be written ({error})", "name a .png, .svg or .pdf file") from None


def draw(result: dict[str, Any]) -> Any:
    """The matplotlib Figure; None where there is nothing to draw."""
    from matplotlib.figure import Figure

    models = [model for model in result["models"] if _panels(model)]
    if not models:
        return None
    heights = [_height(model) for model in models]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.25), layout="constrained")
    parts = figure.subfigures(len(models), 1, squeeze=False, height_ratios=heights)[:, 0]
    for model, part in zip(models, parts, strict=True):
        _model(part, model)
    facts = result["machine"]
    figure.supxlabel(f"{facts['cpu']}, {facts['threads']} threads. {_caption(result)}", fontsize=SMALL, wrap=True)
    return figure


def _panels(model: dict[str, Any]) -> list[list[tuple[Any, str]]]:
    """The series (task, number) of the prompts' panel and of the decoding panel, without those that are empty."""
    series = [(task, key) for task in TASKS for key in keys(model, task)]
    return [panel for kind in (False, True) if (panel := [(task, key) for task, key in series if task.generates == kind])]


def _rows(model: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in model["backends"] if any(row.get(task.name) for task in TASKS)]


def _height(model: dict[str, Any]) -> float:
    """Inches: backends, titles, the legend's lines."""
    return len(_rows(model)) * _backend(model) + 0.65 + 0.17 * (max(map(len, _panels(model))) + 1)


def _backend(model: dict[str, Any]) -> float:
    """Inches of a backend: as many bars as the fuller panel has, and a gap."""
    return max(map(len, _panels(model))) * BAR + GAP


def _caption(result: dict[str, Any]) -> str:
    rounds, drift = result["settings"]["rounds"], result["reference_loop"]["drift"]
    busy = f". The machine was busy: its reference loop up to {drift - 1:.0%} slower than its best" if drift > DRIFT else ""
    tests = any(keys(model, task) for model in result["models"] for task in TASKS if task.like_llama_bench)
    others = any(keys(model, task) for model in result["models"] for task in TASKS if not task.like_llama_bench)
    bars = " and ".join(["medians"] * others + ["means (pp, tg)"] * tests)
    if rounds < summary.FEWEST:
        return f"Bars: {bars} of {count(rounds, 'round')}{busy}"
    lines = " and ".join(["what another run's may be off by"] * others + ["standard deviations"] * tests)
    return f"Bars: {bars} of {rounds} rounds; lines: ± {lines}{busy}"


def _model(part: Any, model: dict[str, Any]) -> None:
    panels = _panels(model)
    name = model["name"] if len(model["name"]) <= 60 else f"{model['name'][:59]}…"
    part.suptitle(f"{name}, tokens/s", fontsize=NORMAL + 1, fontweight="bold")
    for axes, series in zip(part.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        _panel(axes, model, series)


def _panel(axes: Any, model: dict[str, Any], series: list[tuple[Any, str]]) -> None:
    rows = _rows(model)
    height = BAR / _backend(model)  # a backend is one unit high
    handles, ends = [], []
    for i, (task, key) in enumerate(series):
        colour, hatch = LOOKS[i % len(LOOKS)]
        there = [(at, *summary.shown(row[task.name][key])) for at, row in enumerate(rows) if key in row.get(task.name, {})]
        places = [at + (i - (len(series) - 1) / 2) * height for at, *_ in there]
        bars = axes.barh(
            places, [value for _, value, _ in there], height, xerr=[spread or 0.0 for *_, spread in there], color=colour,
            hatch=hatch, edgecolor="black", linewidth=0.6, error_kw={"elinewidth": 0.9}, label=task.legend.format(key),
            capsize=2 if any(spread for *_, spread in there) else 0,
        )  # fmt: skip
        handles.append(bars)
        ends += [(value + (spread or 0.0), place, value) for place, (_, value, spread) in zip(places, there, strict=True)]
    longest = max(end for end, *_ in ends) or 1.0
    for end, place, value in ends:
        axes.annotate(
            f"{value:.0f}" if value >= 100 else f"{value:.1f}", (end, place), (3, 0), textcoords="offset points", va="center",
            fontsize=SMALL, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    edge = 1.14 * longest  # room for the figure of the longest bar
    if series[0][0].generates:
        bound, near = model["bound"], model["bound"] < FURTHEST * longest
        label = f"bound set by the memory: {bound:.0f}" + ("" if near else ", beyond the edge")
        handles.append(axes.axvline(bound if near else -1, color="black", linestyle="--", linewidth=1, label=label, zorder=0.5))
        edge = max(edge, 1.03 * bound) if near else edge
    axes.set_title("decoding" if series[0][0].generates else "prompt", fontsize=NORMAL)
    axes.set_xlim(0, edge)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first on top
    axes.set_xticks([])  # the bars have their figures
    names = [row["name"] + ("\n(disagrees)" if row["status"] == "disagrees" else "") for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=NORMAL)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.legend(handles=handles, fontsize=SMALL, frameon=False, loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=0.3)
