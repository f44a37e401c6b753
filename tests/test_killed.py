"""Commands that are killed at random moments lose nothing and leave nothing half; kill_programs.py runs them by the hundred."""

import os
import signal
import threading
import time

import pytest
from kill_programs import kill_often

from pocketlm.runtime.atomic import STALE_SECONDS, replacing_file, replacing_folder


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL and fork are POSIX")
@pytest.mark.parametrize(("name", "n_kills"), [("chat", 10), ("export", 6), ("pack", 6)])
def test_a_killed_command_loses_nothing(name, n_kills):
    counts = kill_often(name, n_kills)
    assert counts["killed"] > 0
    assert {what: counts[what] for what in ("lost", "half", "rests")} == {"lost": 0, "half": 0, "rests": 0}


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_one_that_is_asked_to_end_takes_its_part_away(tmp_path):
    (target := tmp_path / "out").write_text("old")
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as end:
            _write_until_ended(target)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (end.value.code, [*tmp_path.iterdir()], target.read_text()) == (128 + signal.SIGTERM, [target], "old")


def _write_until_ended(target):
    with replacing_file(target) as part:
        part.write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


def test_the_parts_of_killed_ones_are_taken_away_later(tmp_path):
    old, new, other, folder = (tmp_path / name for name in (".out.1.part", ".out.2.part", ".out2.1.part", ".runs.1.part"))
    for path in (old, new, other):
        path.write_text("half")
    folder.mkdir()
    (folder / "weights.bin").write_text("half")
    for path in (old, other, folder / "weights.bin", folder):
        os.utime(path, (time.time() - STALE_SECONDS - 60,) * 2)
    with replacing_file(tmp_path / "out") as part:
        part.write_text("whole")
    with replacing_folder(tmp_path / "runs", ["weights.bin"]) as part:
        part.mkdir()
        (part / "weights.bin").write_text("whole")
    assert [path.exists() for path in (old, new, other, folder)] == [False, True, True, False]


def test_threads_that_write_the_same_file_leave_one_that_is_whole(tmp_path):
    target, half, whole = tmp_path / "file", threading.Event(), threading.Event()

    def first() -> None:
        with replacing_file(target) as part:
            part.write_bytes(b"a" * 1000)
            half.set()
            whole.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    half.wait(60)
    with replacing_file(target) as part:
        part.write_bytes(b"b" * 500)
        whole.set()
        thread.join()
        assert target.read_bytes() == b"a" * 1000
        part.write_bytes(b"b" * 1000)
    assert target.read_bytes() == b"b" * 1000
    assert list(tmp_path.iterdir()) == [target]
