"""The picture of a result: figures on the bars, legends in order, nothing over anything else, at the width of a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_results import llama_bench_result, measure, result

from pocketlm.bench import plot
from pocketlm.errors import FileError

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot_is_written(tmp_path: Path, suffix: str) -> None:
    plot.plot(result(native=100.0, numpy=20.0), tmp_path / f"out{suffix}")
    assert (tmp_path / f"out{suffix}").stat().st_size > 5000


def test_a_plot_in_a_format_that_nobody_writes_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="png"):
        plot.plot(result(native=100.0), tmp_path / "out.tale")


def test_a_plot_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def full(figure: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    out = tmp_path / "out.png"
    out.write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(FileError, match="No space left"):
        plot.plot(result(native=100.0), out)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_without_figures_there_is_no_plot(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no backend has figures"):
        plot.plot(result(), tmp_path / "out.png")


def test_a_picture_says_that_the_machine_was_busy() -> None:
    """It goes where the table with its warnings does not."""
    quiet, loaded = result(native=100.0), result(native=100.0)
    loaded["reference_loop"]["drift"] = 1.93
    captions = [plot.draw(found)._supxlabel.get_text() for found in (quiet, loaded)]
    assert "busy" not in captions[0]
    assert captions[1].endswith("busy: its reference loop up to 93% slower than its best")


def test_a_picture_in_a_folder_that_is_missing_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="its folder does not exist"):
        plot.require(tmp_path / "nowhere" / "out.png")


def drawn(found: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The figure, laid out, and its panels."""
    figure = plot.draw(found)
    figure.draw_without_rendering()
    return figure, figure.axes


def busy() -> dict[str, Any]:
    """A result with many backends, long names, three prompts and depths, wide spreads."""
    speeds = {f"backend number {i}": 500.0 / (i + 1) for i in range(7)}
    found = result(**speeds)
    found["models"][0]["name"] = "a-model-with-the-long-name-that-people-give-their-files.Q4_K_M"
    for row in found["models"][0]["backends"]:
        row["status"] = "disagrees"
        for task, first in (("prefill", "32"), ("decode", "0")):
            for factor, key in ((0.7, "512"), (0.99, "4096")):
                row[task][key] = {**row[task][first], **measure(factor * row[task][first]["median"], 0.3)}
    return found


def test_every_bar_has_its_figure() -> None:
    _, (prompt, decoding) = drawn(result(native=1234.0, numpy=20.5))
    assert [text.get_text() for text in prompt.texts] == ["12340", "205"]
    assert [text.get_text() for text in decoding.texts] == ["1234", "20.5"]


def test_legends_are_in_the_order_of_the_bars_and_name_the_bound() -> None:
    _, (prompt, decoding) = drawn(busy())
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in (prompt, decoding)]
    assert labels[0] == ["prompt of 32 tokens", "prompt of 512 tokens", "prompt of 4096 tokens"]
    assert labels[1] == ["after 0 tokens", "after 512 tokens", "after 4096 tokens", "bound set by the memory: 99"]
    tops = [text.get_window_extent().y1 for text in decoding.get_legend().get_texts()]
    assert tops == sorted(tops, reverse=True)


@pytest.mark.parametrize("make", [busy, lambda: result(native=100.0), lambda: llama_bench_result(native=1e5, numpy=0.01)])
def test_nothing_lies_over_anything_else_or_beyond_the_edge(make: Any) -> None:
    figure, axes = drawn(make())
    boxes = [("caption", figure._supxlabel.get_window_extent())]
    boxes += [("title", part._suptitle.get_window_extent()) for part in figure.subfigs]
    for panel in axes:
        texts = [*panel.texts, panel.title, *(panel.get_yticklabels() if panel is axes[0] else [])]
        boxes += [(text.get_text(), text.get_window_extent()) for text in texts]
        boxes += [("legend", panel.get_legend().get_window_extent())]
    for i, (name, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, name  # noqa: PT018
        for other, beside in boxes[i + 1 :]:
            assert not box.padded(-1).overlaps(beside.padded(-1)), (name, other)


def test_few_rounds_draw_no_spread() -> None:
    found = result(native=100.0)
    found["settings"]["rounds"] = 2
    found["models"][0]["backends"][0]["decode"]["0"]["uncertainty"] = None
    _, (prompt, decoding) = drawn(found)

    def spread(axes: Any) -> float:
        bars = next(container for container in axes.containers if hasattr(container, "errorbar"))
        lines = bars.errorbar.lines[2][0].get_segments()
        return float(lines[0][1][0] - lines[0][0][0])

    assert spread(prompt) > 0
    assert spread(decoding) == 0


def test_a_bound_far_away_does_not_squeeze_the_bars() -> None:
    found = result(native=1.0)
    _, (_, decoding) = drawn(found)
    assert decoding.get_xlim()[1] < 2
    assert decoding.get_legend().get_texts()[-1].get_text() == "bound set by the memory: 99, beyond the edge"
