"""The arithmetic behind `pocketlm bench`: summaries, agreement, the form of a result, conversions, energy."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_results import result
from tiny_models import write_model

from pocketlm.bench import agreement, convert, machine, protocol, schema, shapes, summary
from pocketlm.errors import FileError, PocketlmError, UsageError
from pocketlm.runtime.native import code_cache

ROOT = Path(__file__).resolve().parents[1]


# ── summaries ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_summary_is_the_median_the_quartiles_and_the_rounds() -> None:
    found = summary.summarize([5, 1, 2, 4, 3])
    assert (found["low"], found["median"], found["high"]) == (2, 3, 4)
    assert found["rounds"] == [5, 1, 2, 4, 3]


@pytest.mark.parametrize("rounds", [[7.0], [7.0, 9.0]])
def test_fewer_than_three_rounds_give_no_uncertainty(rounds: list[float]) -> None:
    assert summary.summarize(rounds)["uncertainty"] is None
    assert summary.spread(rounds)["deviation"] is None
    assert summary.summarize([*rounds, 8.0, 8.0])["uncertainty"] is not None


def test_mean_and_deviation_are_llama_benchs() -> None:
    rounds = [103.5, 99.25, 101.0, 97.125, 100.0]
    found, n = summary.spread(rounds), len(rounds)
    mean = sum(rounds) / n
    squares = sum(x * x for x in rounds)  # its own way to compute it
    assert found == pytest.approx({"mean": mean, "deviation": math.sqrt(squares / (n - 1) - mean * mean * n / (n - 1))})


def test_one_wild_round_moves_the_median_little() -> None:
    assert summary.summarize([100, 101, 99, 100, 3])["median"] == 100


def test_the_uncertainty_holds_the_next_runs_median_most_of_the_time() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        one, other = (summary.summarize(100 + random.standard_normal(15)) for _ in range(2))
        inside += abs(one["median"] - other["median"]) <= 100 * (one["uncertainty"] + other["uncertainty"])
    assert inside / 400 > 0.93


def test_latencies_are_percentiles_in_milliseconds() -> None:
    found = summary.latency([x / 1000 for x in range(1, 102)])
    assert found == pytest.approx({"p50": 51, "p95": 96, "p99": 100})


def test_reference_loops_that_move_are_noticed() -> None:
    steady = machine.Steady()
    steady.times = {"compute": [1.0] * 20, "memory": [1.0] * 20}
    assert steady.drift == 1.0
    steady.times["memory"][5:10] = [1.5] * 5
    assert steady.drift == pytest.approx(1.5)


def test_threads_that_are_slower_than_one_of_them_are_drift_even_if_they_always_are() -> None:
    steady = machine.Steady(2)
    steady.check()
    assert {name: len(times) for name, times in steady.times.items()} == {"compute": 1, "memory": 1, "threads": 1}
    assert 0 < steady.alone < 60
    steady.times, steady.alone = {"compute": [1.0] * 9, "memory": [1.0] * 9, "threads": [3.0] * 9}, 1.5
    assert steady.drift == 2.0  # of a machine that was busy all the time
    steady.times["threads"] = [0.8] * 9
    assert steady.drift == 1.0


def test_the_drift_is_never_more_than_was_seen() -> None:
    steady = machine.Steady()
    steady.times = {"compute": [1.0, 1.2], "memory": [1.0]}
    assert 1.0 < steady.drift <= 1.2


# ── agreement ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_agreement_is_that_of_an_independent_computation() -> None:
    from agreement import compare as independent
    from agreement import perplexity

    random = np.random.default_rng(0)
    exact = random.standard_normal((20, 50)).astype(np.float32)
    other = exact + 0.01 * random.standard_normal(exact.shape).astype(np.float32)
    ids = random.integers(0, 50, 20).tolist()
    found, expected = agreement.compare(exact, other, ids), independent(exact, other)
    assert found["agrees"]
    assert found["same_first"] == expected.same_first
    assert found["worst_cosine"] == pytest.approx(expected.worst_cosine)
    assert found["perplexity"] == pytest.approx(perplexity(other, np.array(ids)))


@pytest.mark.parametrize(
    "wrong", [lambda x: x[::-1], lambda x: np.zeros_like(x), lambda x: x[:-1], lambda x: x * np.inf, lambda x: 10 * x]
)
def test_logits_that_are_wrong_do_not_agree(wrong: Any) -> None:
    random = np.random.default_rng(0)
    exact = random.standard_normal((20, 50)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        found = agreement.compare(exact, wrong(exact), random.integers(0, 50, 20).tolist())
    assert found["agrees"] is False
    assert found["reason"]


# ── the form of a result ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_result_has_the_form_and_the_readme_names_all_of_it() -> None:
    assert schema.problem(result(native=100.0)) is None
    page = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")

    def names(form: Any) -> set[str]:
        if isinstance(form, dict):
            return {name.removesuffix("?") for name in form} | {n for part in form.values() for n in names(part)}
        return names(form[0]) if isinstance(form, list) else names(form.form) if isinstance(form, schema.Each) else set()

    assert {name for name in names(schema.RESULT) if f"`{name}`" not in page} == set()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: r.pop("machine"), "machine is missing"),
        (lambda r: r.update(warnings="none"), "warnings is not what it should be"),
        (lambda r: r["models"][0]["backends"][0].update(status=1), "models[0].backends[0].status is not"),
        (lambda r: r["models"][0]["backends"][0]["decode"]["0"].pop("median"), "decode.0.median is missing"),
        (lambda r: r["models"][0].update(parameters=True), "parameters is not"),
    ],
)
def test_what_is_wrong_with_a_result_is_named(change: Any, problem: str) -> None:
    bad = result(native=100.0)
    change(bad)
    assert problem in str(schema.problem(bad))


@pytest.mark.parametrize(
    ("text", "problem"),
    [("", "not JSON"), ("GGUF\x03\0\0\0\xe9", "not JSON"), ("[" * 100_000, "not JSON"),
     ("[]", "not a result"), ('{"schema": "pocketlm-bench", "version": 9}', "version 9"),
     ('{"schema": "pocketlm-bench", "version": 1}', "is missing")],
)  # fmt: skip
def test_a_file_that_is_no_result_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(FileError, match=problem):
        schema.read(path)


# ── backends, conversions, shapes, energy ────────────────────────────────────────────────────────────────────────────


def test_backends_are_chosen_in_the_tables_order() -> None:
    assert [backend.name for backend in protocol.choose(" numpy,native")] == ["native", "numpy"]
    with pytest.raises(UsageError, match="'warp' is unknown"):
        protocol.choose("native,warp")


def test_a_conversion_is_kept_by_the_files_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    one, same, other = (tmp_path / name / "m.gguf" for name in "abc")
    for path, content in ((one, b"x"), (same, b"x"), (other, b"y")):
        path.parent.mkdir()
        path.write_bytes(content)
    assert convert.target(one, "torch") == convert.target(same, "torch")
    assert len({convert.target(one, "torch"), convert.target(other, "torch"), convert.target(one, "onnx-f32")}) == 3


def test_what_a_conversion_that_was_ended_has_left_is_swept_away(tmp_path: Path) -> None:
    out = tmp_path / "model [1].onnx"
    for name in (f"part-{out.name}", f".part-{out.name}.7.part", "part-another.onnx", out.name):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / f".part-{out.name}.8.part.x.part").mkdir()
    convert.sweep(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out.name, "part-another.onnx"])


def test_a_converted_graph_computes_only_the_logits_that_are_wanted(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    path = write_model(tmp_path / "m.gguf", n_ctx=32)
    for kind in ("onnx-f32", "onnx-int8"):
        out = tmp_path / kind
        convert.KINDS[kind].write(path, out)
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        past = {e.name: np.zeros((1, e.shape[1], 0, e.shape[3]), np.float32) for e in session.get_inputs() if "past" in e.name}
        feed = {"input_ids": np.arange(9)[None], "attention_mask": np.ones((1, 9), np.int64), **past}
        every, last = (session.run(["logits"], {**feed, convert.FIRST_ROW: np.array([row])})[0] for row in (0, 8))
        assert (every.shape[1], last.shape[1]) == (9, 1)
        a, b = last[0, 0], every[0, 8]  # in int8 one scale serves all rows that are computed together
        assert a @ b / np.sqrt((a @ a) * (b @ b)) > (0.99 if "int8" in kind else 0.999999)


def test_a_shape_is_written_once_and_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketlm.runtime.model_file import open_model

    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes.Shape(1, 32, 2, 64))
    monkeypatch.setattr(shapes, "N_VOCAB", 400)
    path = shapes.find("tiny-Q4_0", tmp_path)
    written = path.stat().st_mtime_ns
    with open_model(path) as opened:
        assert math.prod(opened.tensors["token_embd.weight"].shape) == 400 * 32
    assert shapes.find("tiny-Q4_0", tmp_path).stat().st_mtime_ns == written


def test_energy_is_the_sum_of_the_processor_packages(tmp_path: Path) -> None:
    for name, energy in (("intel-rapl:0", 2_000_000), ("intel-rapl:1", 500_000), ("intel-rapl:0:0", 7)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{energy}\n")
    assert machine.joules(tmp_path) == 2.5
    assert machine.joules(tmp_path / "nowhere") is None
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert machine.joules(tmp_path) is None


def test_a_machine_can_be_described() -> None:
    facts = machine.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["python"] in machine.line(facts)


def test_without_a_cache_folder_conversions_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_cache, "cache_folder", lambda: None)
    with pytest.raises(PocketlmError, match="POCKETLM_CACHE"):
        convert.folder()


def test_without_lm_eval_its_command_is_one_line() -> None:
    code = "import sys, runpy; sys.modules['lm_eval'] = None; runpy.run_module('pocketlm.bench.harness', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "the package lm_eval is not installed" in done.stderr
