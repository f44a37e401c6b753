"""A batch over a Dask cluster writes the same bytes as one machine does, also where a worker dies on the way."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from serving import hello, tiny_chat

from pocketlm import cli

pytest.importorskip("distributed", reason="distributed spreads a batch over machines")

FORM = ["--regex", "[a-z ]{8,40}"]  # options reach the workers, whatever they are
DASK = [sys.executable, "-m"]
QUIET = {**os.environ, "DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "error"}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bytes]:
    """A model, prompts, and what one machine writes of them."""
    folder = tmp_path_factory.mktemp("dask")
    model, prompts, out = tiny_chat(folder, n_ctx=256), folder / "prompts.jsonl", folder / "whole.jsonl"
    lines = [{"id": i, **(hello("the inn " * (i % 9), max_tokens=24, temperature=1.0) if i % 7 else {})} for i in range(600)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["generate", str(model), "--input", str(prompts), "--output", str(out), "--threads", "1", *FORM]) == 0
    return model, prompts, out.read_bytes()


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    run = subprocess.Popen([*DASK, *command], env=QUIET, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield run
    finally:
        run.kill()
        run.wait()


@contextmanager
def started(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A scheduler's address, and its process."""
    told = folder / "where.json"
    options = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(told))
    with process("distributed.cli.dask_scheduler", *options) as run:
        until = time.monotonic() + 120
        while not (told.exists() and told.read_text().strip().endswith("}")):
            assert time.monotonic() < until, "the scheduler never came"
            time.sleep(0.05)
        yield json.loads(told.read_text())["address"], run


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with started(tmp_path_factory.mktemp("scheduler")) as (address, _):
        yield address


def worker(address: str):
    return process("distributed.cli.dask_worker", address, "--nthreads", "2", "--no-nanny", "--no-dashboard")


def wait_for(address: str, n: int) -> None:
    import distributed

    with distributed.Client(address, set_as_default=False) as client:
        until = time.monotonic() + 120
        while len(client.scheduler_info()["workers"]) != n:  # also until those of the test before are gone
            assert time.monotonic() < until, "the workers never came, or never went"
            time.sleep(0.05)


def batch(model: Path, prompts: Path, out: Path, address: str) -> list[str]:
    files = ["--input", str(prompts), "--output", str(out), *FORM]
    return ["generate", str(model), *files, "--threads", "1", "--slots", "4", "--dask", address]


def ended_by(victim: subprocess.Popen[bytes], command: list[str], out: Path) -> tuple[int, str]:
    """Exit status and stderr of a batch during which a process of the cluster is killed, once there is an answer."""
    run = subprocess.Popen([sys.executable, "-m", "pocketlm", *command], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (kept := [*out.parent.glob("*.part")]) or kept[0].stat().st_size == 0:
        assert time.monotonic() < until
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.002)
    victim.kill()
    assert run.poll() is None, "it was through before"
    said = run.communicate(timeout=300)[1]
    return run.returncode, said


def test_the_bytes_are_those_of_one_machine_though_a_worker_is_killed(given, scheduler, tmp_path):
    model, prompts, whole = given
    out = tmp_path / "out.jsonl"
    with worker(scheduler) as first, worker(scheduler):
        wait_for(scheduler, 2)
        status, said = ended_by(first, batch(model, prompts, out, scheduler), out)
    assert status == 0, said
    assert out.read_bytes() == whole
    assert [*tmp_path.iterdir()] == [out]


def test_a_scheduler_that_is_gone_is_one_line_and_its_answers_are_kept(given, tmp_path, tmp_path_factory, capsys):
    model, prompts, whole = given
    out = tmp_path / "out.jsonl"
    with started(tmp_path_factory.mktemp("gone")) as (address, run), worker(address):
        wait_for(address, 1)
        status, said = ended_by(run, command := batch(model, prompts, out, address), out)
    assert (status, said.count("\n")) == (1, 1), said
    assert f"pocketlm: --dask {address}: the cluster cannot go on" in said
    assert "the answers so far are kept" in said
    assert cli.main(command[: command.index("--dask")]) == 0, "one machine goes on with them"
    assert "lines are answered already" in capsys.readouterr().err
    assert out.read_bytes() == whole


def test_what_is_wrong_with_the_cluster_is_one_line(given, scheduler, tmp_path, capsys):
    model, prompts, _ = given
    out = tmp_path / "out.jsonl"
    wait_for(scheduler, 0)
    assert cli.main(batch(model, prompts, out, "tcp://127.0.0.1:9")) == 2
    assert "--dask tcp://127.0.0.1:9: no scheduler answers there" in capsys.readouterr().err
    assert cli.main(batch(model, prompts, out, scheduler)) == 2
    assert f"it has no workers; dask worker {scheduler} starts one" in capsys.readouterr().err
    with worker(scheduler):
        wait_for(scheduler, 1)
        assert cli.main(batch(tmp_path / "none.gguf", prompts, out, scheduler)) == 1
        assert "none.gguf: " in (said := capsys.readouterr().err)
        assert said.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


def test_a_worker_that_answers_other_lines_than_it_was_asked_loses_none(given, tmp_path, capsys, monkeypatch):
    import distributed

    from pocketlm.batch.local import Machine

    model, prompts, _ = given
    out, made = tmp_path / "out.jsonl", Machine.answers
    monkeypatch.setattr(Machine, "answers", lambda self, lines: [*made(self, lines)][:-1])
    with distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster:
        assert cli.main(batch(model, prompts, out, cluster.scheduler_address)) == 1
    assert "not the lines that it was asked for" in (said := capsys.readouterr().err)
    assert said.count("\n") == 1
    assert not out.exists()


def test_a_worker_with_another_pocketlm_is_refused(given):
    from pocketlm.batch import over_dask

    opening = json.dumps([str(given[0]), {"threads": 1}, 1, 0, {}])
    version, *facts = over_dask.describe(opening)
    assert "another version" in over_dask.answer(opening, (f"{version}.1", *facts), [])


def test_what_a_worker_raises_is_one_line_however_deep(given, tmp_path, capsys, monkeypatch):
    import distributed

    from pocketlm.batch.local import Machine

    def deep(self, lines):
        return deep(self, lines)

    model, prompts, _ = given
    monkeypatch.setattr(Machine, "answers", deep)
    log = logging.getLogger("distributed.client")
    before = log.level
    with distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as cluster:
        address = cluster.scheduler_address
        assert cli.main(batch(model, prompts, tmp_path / "out.jsonl", address)) == 1
    told = f"pocketlm: --dask {address}: a worker cannot go on (RecursionError: maximum recursion depth exceeded"
    assert told in capsys.readouterr().err  # beside the worker's own tracebacks
    assert log.level == before
