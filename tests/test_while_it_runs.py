"""What a model does while it runs to fit the machine: fewer threads for single tokens, less memory, a lower priority."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny_models import write_model

import pocketlm
from pocketlm.doctor.health import Throttling
from pocketlm.runtime import memory
from pocketlm.runtime.native import decode_threads
from pocketlm.runtime.native.decode_threads import ROUNDS, WARM, DecodeThreads

others_told = pytest.mark.skipif(
    sys.platform not in ("linux", "win32"), reason="only Linux and Windows say what other programs take"
)


def tried(seconds, n_threads=4, known=None):
    """(the object after many passes, what was found, the numbers it tried); `seconds(n, pass)`: how long a pass takes."""
    found: list[int] = []
    asked: list[int] = []
    single = DecodeThreads(n_threads, known, found.append)
    for number in range(60):
        asked.append(single.next())
        single.took(seconds(asked[-1], number))
    return single, found, asked


@pytest.mark.parametrize(("fastest", "n_threads"), [(4, 4), (3, 4), (2, 4), (1, 2), (2, 2), (5, 5), (3, 5)])
def test_the_fastest_number_of_threads_is_found_and_remembered(fastest, n_threads):
    single, found, asked = tried(lambda n, _: 1.0 + 0.1 * abs(n - fastest), n_threads)
    assert (single.n_threads, found, single.is_trying) == (fastest, [fastest], False)
    assert set(asked[WARM + 3 * ROUNDS :]) == {fastest}
    assert set(asked[:WARM]) == {n_threads}


def test_what_was_found_while_others_ran_is_not_believed():
    taken = iter([0.0, 99.0])
    found: list[int] = []
    single = DecodeThreads(2, None, found.append, lambda: next(taken))
    for _ in range(WARM + 2 * ROUNDS):
        single.took(float(single.next()))
    assert (single.n_threads, found, single.is_trying) == (2, [], False)


@others_told
def test_the_time_of_other_programs_is_told():
    before, own = decode_threads.others(), time.process_time()
    program = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert time.process_time() - own < 0.2
    assert decode_threads.others() - before > 0.4


def test_a_gain_within_the_noise_leaves_all_threads():
    assert tried(lambda n, _: 0.99 if n < 4 else 1.0)[1] == [4]


def test_one_slow_pass_decides_nothing():
    assert tried(lambda n, number: 99.0 if number % 11 == 0 else 1.0 + 0.1 * abs(n - 2))[1] == [2]


def test_halves_that_disagree_are_not_remembered():
    single, found, _ = tried(lambda n, number: 1.0 + (0.5 if (n == 4) == (number < WARM + 12) else 0))
    assert (single.n_threads, found) == (4, [])


def test_what_is_remembered_is_not_measured_again():
    single, found, asked = tried(lambda n, _: 1.0, known=2)
    assert (single.n_threads, found, set(asked)) == (2, [], {2})
    assert tried(lambda n, _: 1.0 + n, known=9)[1] == []  # of another machine: not believed


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    return write_model(tmp_path / "m.gguf", n_ctx=256)


def answer(model):
    return [piece.id for piece in model.generate("abc", max_tokens=60, temperature=0, ignore_eos=True, draft=False)]


@others_told
def test_it_is_found_while_a_model_answers_and_the_answer_is_the_same(path, monkeypatch):
    with pocketlm.load(path, threads=3) as model:
        assert model.executor.single is None, "who asks for three threads gets three"
        expected = answer(model)
    monkeypatch.setattr("pocketlm.model.check_threads", lambda n: n or 3)
    monkeypatch.setattr(decode_threads, "others", lambda: 0.0)
    with pocketlm.load(path) as model:
        single = model.executor.single
        monkeypatch.setattr(decode_threads.DecodeThreads, "took", lambda self, _: took(self, 1.0 + self.next()))
        assert answer(model) == expected
        assert (single.n_threads, single.is_trying, model.n_threads) == (2, False, 3)
        model.set_threads(3)
        assert model.executor.single is None
    with pocketlm.load(path) as model:
        assert (model.executor.single.n_threads, model.executor.single.is_trying) == (2, False)
        logits = model.logits(list(range(5, 50)))  # a prompt has all threads
        assert np.isfinite(logits).all()
        assert model.executor._n_running.value == 3
        assert answer(model) == expected


took = DecodeThreads.took

@pytest.mark.parametrize(("is_sparing", "ctx", "n_ctx"), [(True, None, 1024), (True, 4096, 4096), (False, None, 4096)])
def test_a_context_is_smaller_where_memory_is_spared(tmp_path, monkeypatch, is_sparing, ctx, n_ctx):
    monkeypatch.setattr(memory, "is_sparing", lambda: is_sparing)
    with pocketlm.load(write_model(tmp_path / "m.gguf", n_ctx=8192), ctx=ctx) as model:
        assert model.n_ctx == n_ctx


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX has this number")
def test_nice_lets_others_go_first(path):
    code = "import os, pocketlm.cli; pocketlm.cli.main(); print(os.getpriority(os.PRIO_PROCESS, 0))"
    words = ["generate", str(path), "-p", "abc", "-n", "1", "--nice", "--low-memory"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) == min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19)


# ---- throttling --------------------------------------------------------------------------------------------------------


def machine(root, flags=None, counts=(), millidegrees=None):
    """A file system that says so of its processor."""
    firmware = root / "sys/devices/platform/soc/soc:firmware"
    firmware.mkdir(parents=True, exist_ok=True)
    if flags is not None:
        (firmware / "get_throttled").write_text(f"{flags:x}\n")
    for core, count in enumerate(counts):
        folder = root / f"sys/devices/system/cpu/cpu{core}/thermal_throttle"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "core_throttle_count").write_text(f"{count}\n")
    zone = root / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "type").write_text("cpu-thermal\n")
    (zone / "temp").write_text(f"{millidegrees or 0}\n")
    return root


def test_a_processor_that_is_slowed_down_is_noted_once(tmp_path):
    throttling = Throttling(machine(tmp_path, flags=0xE0000))  # what was before the chat is the doctor's to say
    assert throttling.note() == ""
    machine(tmp_path, flags=0xE0004, millidegrees=82_300)
    slowed = "the processor is slowed down: it is throttled (82 °C); pocketlm doctor says what helps"
    assert [throttling.note(), throttling.note()] == [slowed, ""]
    machine(tmp_path, flags=0xE0005, millidegrees=82_300)
    assert "power is too weak, it is throttled (82 °C)" in throttling.note()
    machine(tmp_path, flags=0xE0000)
    assert throttling.note() == ""
    machine(tmp_path, flags=0xE0004, millidegrees=82_300)
    assert throttling.note() == slowed


def test_machines_that_only_count_are_noted_where_the_count_grows(tmp_path):
    throttling = Throttling(machine(tmp_path, counts=(5, 7)))
    assert throttling.note() == ""
    machine(tmp_path, counts=(5, 9))
    assert throttling.note() == "the processor is slowed down: it was throttled meanwhile; pocketlm doctor says what helps"
    assert throttling.note() == ""


def test_a_chat_at_a_terminal_says_it_after_the_answer(terminal, tmp_path):
    shown = terminal("--hot")
    shown.prompt(1)
    shown.type("Hello\r", "context 10/100 (10%)\nthe processor is slowed down")
    assert shown.leave("\x04") == 0
