"""A run of `pocketlm bench` on a tiny model: whatever one backend does, its row says so and the others go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_results
import pytest
from tiny_models import write_model

from pocketlm.bench import compare, measure, plot, report, schema
from pocketlm.bench.protocol import BACKENDS, Backend
from pocketlm.errors import UsageError

SETTINGS = measure.Settings(
    rounds=2, tokens=4, prompts=(8, 16), depths=(0, 32), time_limit=60.0, pass_seconds=0.0, user_rounds=1, user_tokens=4
)
Result = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", n_ctx=128)


@pytest.fixture(autouse=True)
def findable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Children import the fakes, and keep nothing in the user's cache."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))


def fake(name: str, **more: Any) -> Backend:
    return Backend(name.lower(), f"bench_fakes:{name}", **more)


def measured(path: Path, *backends: Backend, settings: measure.Settings = SETTINGS) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.machine, "bandwidth", lambda n_threads: 1e9)  # takes a second, and is not tested here
        return measure.bench([path], backends, settings, lambda line: None)


def rows_of(result: Result) -> dict[str, Result]:
    return {row["name"]: row for row in result["models"][0]["backends"]}


@pytest.fixture(scope="module")
def mixed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One run with an honest backend and every kind of bad one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        missing = Backend("missing", "nowhere:Nothing", ("no_such_package",), "pip install no-such-package")
        too_large = fake("Honest", bytes_per_weight=1e12)
        bad = [fake(name) for name in ("Crashing", "Lying", "Nan", "Greedy", "Raising", "Chatty")]
        huge = Backend("huge", too_large.adapter, bytes_per_weight=1e12)
        return measured(model, BACKENDS["numpy"], *bad, missing, huge, fake("Honest"))


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("numpy", "ok", ""),
        ("crashing", "crashed", "0xC0000005 in prefill" if os.name == "nt" else "SIGSEGV in prefill"),
        ("lying", "disagrees", "cosine"),
        ("nan", "disagrees", "NaN"),
        ("greedy", "no memory", "the memory ran out"),
        ("raising", "failed", "ValueError: a long story"),
        ("missing", "missing", "pip install no-such-package"),
        ("huge", "no memory", "MB for weights"),
        ("chatty", "ok", ""),
        ("honest", "ok", ""),
    ],
)
def test_a_row_says_what_became_of_its_backend(mixed: Result, name: str, status: str, reason: str) -> None:
    row = rows_of(mixed)[name]
    assert row["status"] == status
    assert reason in row["reason"]
    assert "\n" not in row["reason"]
    assert (set(row.get("decode", {})) == {"0", "32"}) == (status in ("ok", "disagrees"))


def test_a_backend_that_hangs_is_ended_at_the_time_limit(model: Path) -> None:
    settings = measure.Settings(**{**vars(SETTINGS), "time_limit": 8.0})
    rows = rows_of(measured(model, fake("Hanging"), fake("Honest"), settings=settings))
    assert rows["hanging"]["status"] == "hung"
    assert "no answer to decode within 8 s" in rows["hanging"]["reason"]
    assert rows["honest"]["status"] == "ok"  # and its agreement was checked without a numpy row
    assert rows["honest"]["agreement"]["cosine"] == pytest.approx(1.0)


def test_figures_are_tokens_over_the_seconds_of_the_forward_pass(model: Path) -> None:
    slow = fake("Honest", options={"seconds": 0.02})
    row = rows_of(measured(model, slow))["honest"]
    assert row["decode"]["0"]["median"] <= 50  # 20 ms and a little more a token
    assert row["prefill"]["16"]["median"] < 16 / 0.02
    assert row["decode"]["32"]["latency_ms"]["p50"] >= 20
    assert row["first_token_seconds"] >= row["load_seconds"] + 0.02


def test_a_round_goes_through_all_backends_before_the_next_begins(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    ask = measure.Row.ask

    def recording(row: measure.Row, job: str, **arguments: Any) -> Result | None:
        asked.append((job, row.backend.name))
        return ask(row, job, **arguments)

    monkeypatch.setattr(measure.Row, "ask", recording)
    measured(model, Backend("a", "bench_fakes:Honest"), Backend("b", "bench_fakes:Honest"))
    decoded = [name for job, name in asked if job == "decode"]
    assert decoded == ["a", "b"] * 2 * (SETTINGS.rounds + 1)  # two depths; the first pass of each is the warm-up


@pytest.mark.parametrize(("n_ctx", "tokens"), [(128, 4), (18, 2), (16, None)])  # the text has 16
def test_a_user_sees_as_many_tokens_of_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_ctx, tokens) -> None:
    asked: list[Any] = []
    ask = measure.Row.ask

    def recording(row: measure.Row, job: str, **arguments: Any) -> Result | None:
        asked.append(arguments.get("n_tokens"))
        return ask(row, job, **arguments)

    monkeypatch.setattr(measure.Row, "ask", recording)
    path = write_model(tmp_path / "short.gguf", n_ctx=n_ctx)
    row = measured(path, fake("Honest"), settings=replace(SETTINGS, prompts=(8,), depths=(0,)))["models"][0]["backends"][0]
    assert ({*asked} - {None}, row["status"]) == ({tokens} - {None}, "ok")


def test_files_of_one_name_are_told_apart_by_their_paths(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.machine, "bandwidth", lambda n_threads: 1e9)
    paths = [model, tmp_path / "other.gguf", tmp_path / model.name]
    for path in paths[1:]:
        path.write_bytes(model.read_bytes())
    result = measure.bench(paths, [], SETTINGS, lambda line: None)
    assert [one["name"] for one in result["models"]] == [str(model), "other", str(paths[2])]


def test_llama_benchs_tests_are_its_passes_from_an_empty_cache(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    settings = measure.Settings(**{**vars(SETTINGS), "rounds": 3, "prompts": (), "depths": (), "pp": (24,), "tg": (5,)})
    found = measured(model, fake("Recording", options={"log": str(log)}), settings=settings)
    row = rows_of(found)["recording"]
    assert schema.problem(found) is None
    assert [list(row[name]) for name in ("pp", "tg")] == [["24"], ["5"]]
    assert len(row["pp"]["24"]["rounds"]) == len(row["tg"]["5"]["rounds"]) == 3
    assert "prefill" not in row
    calls = log.read_text().splitlines()
    prompt, token = ["truncate 0", "forward 24"], ["truncate 0", *["forward 1"] * 5]
    at = calls.index("forward 24") - 1
    assert calls[at : at + 8] == prompt * 4  # the first is the warm-up; a round is one pass, however fast
    passes = "|".join(calls[at + 8 :]).split("|".join(token))
    assert len(passes) - 1 == 3


def test_what_does_not_fit_into_the_context_is_said_to_be_left_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.machine, "bandwidth", lambda n_threads: 1e9)
    lines: list[str] = []
    settings = measure.Settings(**{**vars(SETTINGS), "prompts": (8, 500), "depths": (), "tg": (4, 999), "user_rounds": 0})
    found = measure.bench([model], [fake("Honest")], settings, lines.append)
    assert [line for line in lines if "left out" in line] == [
        "tiny: left out prompt 500: its context is 128 tokens", "tiny: left out tg999: its context is 128 tokens",
    ]  # fmt: skip
    assert list(rows_of(found)["honest"]["tg"]) == ["4"]
    assert "user" not in rows_of(found)["honest"]


def test_the_result_has_the_documented_form_and_survives_json(mixed: Result, tmp_path: Path) -> None:
    saved = tmp_path / "result.json"
    saved.write_text(json.dumps(mixed))
    assert schema.problem(mixed) is None
    assert schema.read(saved) == json.loads(json.dumps(mixed))


def test_a_bad_run_can_be_drawn(mixed: Result, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot.plot(mixed, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 5000


def test_every_form_of_the_report_shows_every_backend(mixed: Result) -> None:
    for text in (report.plain(mixed), report.markdown(mixed), report.terminal(mixed), report.comma_separated(mixed)):
        for name in rows_of(mixed):
            assert name in text
        assert "pip install no-such-package" in text


def test_a_run_beside_itself_has_not_changed(mixed: Result) -> None:
    assert compare.compare(mixed, mixed).rows == []


def test_a_model_too_short_for_every_depth_is_wrong_usage(model: Path) -> None:
    with pytest.raises(UsageError, match="context of 128"):
        measured(model, settings=measure.Settings(prompts=(512,), depths=(2000,)))
    with pytest.raises(UsageError, match="give shorter --tg"):
        measured(model, settings=measure.Settings(prompts=(), depths=(), tg=(129,)))


def test_a_model_without_room_is_a_row_that_says_so(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.machine, "bandwidth", lambda n_threads: 1e9)
    short = write_model(tmp_path / "short.gguf", n_ctx=2)
    found = measure.bench([short, model], [fake("Honest")], SETTINGS, lambda line: None)
    first, second = (one["backends"][0] for one in found["models"])
    assert (first["status"], second["status"]) == ("skipped", "ok")
    assert first["reason"] == "its context of 2 tokens has no room for what is measured"
    assert schema.problem(found) is None
    for text in (report.plain(found), report.markdown(found), report.comma_separated(found)):
        assert first["reason"] in text


def test_what_has_room_is_measured_whatever_else_has_none(tmp_path: Path) -> None:
    short = write_model(tmp_path / "short.gguf", n_ctx=16)
    row = rows_of(measured(short, fake("Honest"), settings=replace(SETTINGS, prompts=(32,))))["honest"]
    assert (row["status"], set(row["decode"]), "prefill" in row) == ("ok", {"0"}, False)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pocketlm", "bench", *arguments], capture_output=True, text=True, check=False)


def test_an_unknown_backend_is_wrong_usage(model: Path) -> None:
    done = command(str(model), "--backends", "native,warp")
    assert done.returncode == 2
    assert "'warp' is unknown" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--prompts", "a"],
        ["--rounds", "0"],
        ["--depths", "-1"],
        ["--threads", "0"],
        ["--pp", "0"],
        ["--tg", "4,x"],
        ["--from", "x", "y"],
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(model: Path, arguments: list[str]) -> None:
    done = command(*([str(model)] if arguments and arguments[0] != "--from" else []), *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_a_run_without_a_figure_has_status_1(tmp_path: Path) -> None:
    failed = bench_results.result(a=1.0, b=1.0)
    for row in failed["models"][0]["backends"]:
        (tmp_path / "run.json").write_text(json.dumps(failed))
        assert command("--from", str(tmp_path / "run.json")).returncode == 0
        del row["prefill"], row["decode"]
    (tmp_path / "run.json").write_text(json.dumps(failed))
    assert command("--from", str(tmp_path / "run.json")).returncode == 1


def test_a_folder_to_save_in_is_said_before_anything_is_measured(model: Path, tmp_path: Path) -> None:
    done = command(str(model), "--quick", "--backends", "numpy", "--save", str(tmp_path))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)


def test_the_command_measures_saves_shows_again_and_compares(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    options = ["--quick", "--rounds", "1", "--backends", "numpy", "--threads", "1"]
    done = command(str(model), *options, "--json", "--save", str(saved))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(saved.read_text())
    shown = command("--from", str(saved), "--markdown", "--compare", str(saved))
    assert shown.returncode == 0, shown.stderr
    assert "| numpy |" in shown.stdout
    assert "figures compared" in shown.stdout


def test_the_command_measures_llama_benchs_tests_alone(model: Path) -> None:
    done = command(str(model), "--pp", "16,32", "--tg", "4", "--backends", "numpy", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: found["settings"][name] for name in ("rounds", "prompts", "depths", "pp", "tg")} == {
        "rounds": 5, "prompts": [], "depths": [], "pp": [16, 32], "tg": [4],
    }  # fmt: skip
    row = rows_of(found)["numpy"]
    assert [list(row[name]) for name in ("pp", "tg")] == [["16", "32"], ["4"]]
    assert "user" not in row


@pytest.mark.parametrize("rounds", [0, 1, 3])  # of the first task's two, before Ctrl-C
def test_ctrl_c_leaves_the_figures_that_there_are(model: Path, monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    left = iter(range(rounds))

    def check(self: measure.machine.Steady) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(measure.machine.Steady, "check", check)
    if not rounds:
        with pytest.raises(KeyboardInterrupt):
            measured(model, fake("Honest"))
        return
    result = measured(model, fake("Honest"), fake("Raising"))
    assert schema.problem(result) is None
    assert result["warnings"][0].startswith(schema.STOPPED)
    row = rows_of(result)["honest"]
    assert {n: len(figures["rounds"]) for n, figures in row["prefill"].items()} == {1: {"16": 1}, 3: {"8": 1, "16": 2}}[rounds]
    assert ("decode" in row, "agreement" in row) == (False, False)
    for form in (report.terminal, report.markdown):
        assert schema.STOPPED in form(result, [])
    assert compare.compare(result, result)


def test_a_backend_that_was_not_measured_before_ctrl_c_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, asked = measure.Row.ask, iter(["to warm up", "Ctrl-C"])

    def stopping(row: measure.Row, job: str, **arguments: Any) -> Result | None:
        if row.backend.name == "second" and next(asked) == "Ctrl-C":
            raise KeyboardInterrupt
        return ask(row, job, **arguments)

    monkeypatch.setattr(measure.Row, "ask", stopping)
    rows = rows_of(measured(model, fake("Honest"), replace(fake("Honest"), name="second")))
    assert (rows["honest"]["status"], rows["second"]["status"]) == ("ok", "skipped")
    assert schema.STOPPED in rows["second"]["reason"]


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to whole consoles")
def test_ctrl_c_prints_a_table_and_leaves_a_saved_result_alone(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    saved.write_text("a whole one")
    arguments = [sys.executable, "-m", "pocketlm", "bench", str(model), "--backends", "numpy", "--rounds", "5"]
    with subprocess.Popen(
        [*arguments, "--save", str(saved)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        for _ in range(2):  # with the second task the first one's figures are there
            next(line for line in lines if line.startswith(("tiny: prompt", "tiny: decoding")))
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "numpy" in out
    assert schema.STOPPED in out
    assert (str(saved) in errors, saved.read_text()) == (True, "a whole one")
