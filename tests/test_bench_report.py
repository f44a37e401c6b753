"""What `pocketlm bench` shows of a result: tables, CSV, one line for all that is not installed."""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from bench_results import llama_bench_result, result

from pocketlm.bench import command, report, schema
from pocketlm.errors import FileError


def test_csv_has_a_line_a_backend_with_all_figures() -> None:
    rows = list(csv.DictReader(io.StringIO(report.comma_separated(result(native=100.0, numpy=20.0)))))
    assert [row["backend"] for row in rows] == ["native", "numpy"]
    assert float(rows[1]["decode_0_median"]) == 20
    assert float(rows[0]["decode_0_p99_ms"]) == 3


def test_markdown_tables_have_as_many_cells_in_every_row() -> None:
    lines = [line for line in report.markdown(result(native=100.0)).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines[:3]}) == 1
    assert "| native | 1000 ±1% | 100 ±1% | ok |" in lines


def test_several_models_make_a_ladder() -> None:
    two = result(native=100.0)
    two["models"].append({**copy.deepcopy(two["models"][0]), "name": "n"})
    ladder = report.tables(two)[-1]
    assert [row[0] for row in ladder.rows] == ["m", "n"]
    assert ladder.rows[0][-1] == "100 ±1%"


def test_lines_of_csv_say_which_machine_versions_and_day_they_are_of() -> None:
    row = next(csv.DictReader(io.StringIO(report.comma_separated(result(native=100.0)))))
    assert {name: row[name] for name in ("time", "cpu", "threads", "python", "packages", "version", "settings")} == {
        "time": "2026-01-01T00:00:00Z", "cpu": "a|b", "threads": "2", "python": "3.12",
        "packages": "pocketlm 0.1.0; numpy 2.0", "version": "native 7", "settings": "s",
    }  # fmt: skip
    assert float(row["drift"]) == 1


def with_missing(found: dict[str, Any]) -> dict[str, Any]:
    missing = [("onnxruntime", "pip install onnxruntime onnx"), ("onnxruntime int8", "pip install onnxruntime onnx"),
               ("torch", "pip install torch")]  # fmt: skip
    rows = [{"name": name, "status": "missing", "reason": command} for name, command in missing]
    found["models"][0]["backends"] += rows
    found["models"].append({**copy.deepcopy(found["models"][0]), "name": "n"})
    return found


@pytest.mark.parametrize("form", [report.plain, report.markdown, report.terminal])
@pytest.mark.parametrize("make", [result, llama_bench_result])
def test_backends_that_are_not_installed_are_one_line(form: Any, make: Any) -> None:
    text = form(with_missing(make(native=100.0)))
    lines = [line.strip() for line in text.splitlines() if "onnxruntime" in line or "torch" in line]
    assert lines == ["not installed: onnxruntime, onnxruntime int8 (pip install onnxruntime onnx); torch (pip install torch)"]


def test_a_result_of_nothing_but_missing_backends_is_that_line() -> None:
    found = with_missing(result())
    assert "not installed: onnxruntime" in report.plain(found)
    assert "tokens/s " not in report.plain(found)


def test_two_rounds_give_no_uncertainty() -> None:
    found = result(native=100.0)
    found["settings"]["rounds"] = 2
    for task in ("prefill", "decode"):
        for figures in found["models"][0]["backends"][0][task].values():
            figures |= {"rounds": [1.0, 2.0], "uncertainty": None}
    assert schema.problem(found) is None
    speed = report.tables(found)[0]
    assert speed.rows == [["native", "1000", "100", "ok"]]
    assert "too few for a ±" in speed.notes[0]


def test_tests_stand_as_in_llama_benchs_own_table() -> None:
    found = llama_bench_result(native=100.0, numpy=20.0)
    found["models"][0] |= {"parameters": 134_515_008, "tensor_bytes": 96_573_696}
    assert schema.problem(found) is None
    table = report.tables(found)[0]
    assert table.header == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert table.rows[0] == ["m", "92.10 MiB", "134.52 M", "native", "2", "pp512", "1020.00 ± 109.54"]
    assert [row[3:6] for row in table.rows] == [
        ["native", "2", "pp512"], ["numpy", "2", "pp512"], ["native", "2", "tg128"], ["numpy", "2", "tg128"],
    ]  # fmt: skip
    assert all(re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", row[-1]) for row in table.rows)
    row = next(csv.DictReader(io.StringIO(report.comma_separated(found))))
    assert float(row["pp_512_mean"]) == 1020
    assert float(row["tg_128_p50_ms"]) == 1


def test_a_row_that_disagrees_is_named_beside_llama_benchs_table_too() -> None:
    found = llama_bench_result(native=100.0)
    found["models"][0]["backends"][0] |= {"status": "disagrees", "reason": "cosine 0.5"}
    assert "native: disagrees: cosine 0.5" in report.tables(found)[0].notes


def test_a_result_that_cannot_be_saved_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, target = tmp_path / "old.json", tmp_path / "target.json"
    old.write_text(json.dumps(result(native=100.0)))
    target.write_text("precious")

    def full(path: Path, text: str, encoding: str) -> int:
        path.write_bytes(text.encode()[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    parser = argparse.ArgumentParser()
    command.arguments(parser)
    with pytest.raises(FileError, match="No space left"):
        command.run(parser.parse_args(["--from", str(old), "--save", str(target)]))
    assert target.read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 2


def saved(folder: Path, change: dict[str, Any], name: str = "old.json") -> list[str]:
    """Arguments that show a result whose first model has been changed by a stranger."""
    found = result(native=100.0)
    found["models"][0] |= change
    (folder / name).write_text(json.dumps(found))
    return ["--from", str(folder / name)]


@pytest.mark.parametrize("form", [[], ["--markdown"], ["--csv"], ["--json"], ["--compare"]])
def test_a_strangers_result_does_not_reach_a_terminal_as_an_escape_sequence(
    form: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    command.arguments(parser)
    words = saved(tmp_path, {"name": "m\x1b]0;taken\x07\x9b31m"})
    command.run(parser.parse_args([*words, *form, *([words[1]] if form == ["--compare"] else [])]))
    out = capsys.readouterr().out
    assert "m]0;taken31m" in out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out)


def test_numbers_beyond_all_measure_are_refused(tmp_path: Path) -> None:
    for change in ({"file_bytes": 10**400}, {"bound": -(10**400)}):
        with pytest.raises(FileError, match="is not what it should be"):
            schema.read(Path(saved(tmp_path, change)[1]))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(FileError, match="is not JSON"):
        schema.read(tmp_path / "deep.json")


def test_a_name_that_is_no_unicode_can_be_drawn(tmp_path: Path) -> None:
    """Linux's names of files are bytes. The picture failed after minutes of measuring."""
    assert schema.read(Path(saved(tmp_path, {"name": "m\udcff"})[1]))["models"][0]["name"] == "m?"
