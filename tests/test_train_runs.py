"""Runs of `pocketlm train` as a user starts them: killed, stopped, shared by processes, gone on with, exported, wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the trainer is PyTorch")

from small_runs import Killed, killed_at  # noqa: E402

from pocketlm import cli, load  # noqa: E402
from pocketlm.errors import PocketlmError  # noqa: E402
from pocketlm.train import checkpoints, log  # noqa: E402
from pocketlm.train.presets import Settings, Shape  # noqa: E402
from pocketlm.train.starting_weights import read_start  # noqa: E402

TEXT = "".join(f"Line {i}: the quick brown fox jumps over the lazy dog number {i * 7919 % 1000}.\n" for i in range(900))
SMALL = "--set n_layer=2 --set n_embd=32 --set n_head=4 --set n_kv_head=2 --set n_ff=48 --set n_ctx=32 --tokenizer characters"
RUN = f"{SMALL} --steps 40 --batch 4 --micro-batch 2 --dropout 0.1 --warmup 4 --eval-every 20 --threads 1 --log-every 1"


pytestmark = pytest.mark.usefixtures("one_torch_thread")  # sums of several may be added in another order


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def pocketlm(*arguments: object, options: str = RUN) -> int:
    return cli.main(["train", *map(str, arguments), *options.split()])


def weights(run: Path) -> dict[str, Any]:
    return checkpoints.read(run / "last.pt")["model"]


def same_weights(a: Path, b: Path) -> bool:
    mine, theirs = weights(a), weights(b)
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in log.read_log(run / log.LOG) if "loss" in row]


def start(*arguments: object, options: str = RUN, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, "-m", "pocketlm", "train", *map(str, arguments), *options.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_run_killed_between_any_two_writes_ends_with_the_same_weights(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pocketlm(text, "-o", tmp_path / "whole") == 0
    moments = (3, 11, 12, 29)
    killed_at(monkeypatch, *moments)
    options = f"{RUN} --save-seconds 0.01"
    for _ in moments:
        with pytest.raises(Killed):
            pocketlm(text, "-o", tmp_path / "killed", options=options)
    assert pocketlm(text, "-o", tmp_path / "killed", options=options) == 0
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def test_a_run_killed_with_sigkill_ends_with_the_same_weights(tmp_path: Path, text: Path) -> None:
    options = f"{RUN} --steps 120 --eval-every 60"
    assert pocketlm(text, "-o", tmp_path / "whole", options=options) == 0
    options, killed = f"{options} --save-seconds 0.1", 0
    for _ in range(2):
        process = start(text, "-o", tmp_path / "killed", options=options)
        at = len(losses(tmp_path / "killed"))
        while process.poll() is None and len(losses(tmp_path / "killed")) < at + 15:
            time.sleep(0.01)
        process.kill()
        killed += process.wait() == (1 if os.name == "nt" else -signal.SIGKILL)
        process.communicate()
    assert killed
    assert pocketlm(text, "-o", tmp_path / "killed", options=options) == 0
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert not [path for path in (tmp_path / "whole").iterdir() if path.name.startswith(".")]


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pocketlm(text, "-o", tmp_path / "run") == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()

    def full_disk(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    model, _ = read_start(tmp_path / "run" / "last.pt", Settings())
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(PocketlmError, match="No space left on device"):
        checkpoints.save(tmp_path / "run" / "last.pt", model)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no Ctrl-C to send to another process alone")
@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_a_disk_that_is_full_is_one_line(tmp_path: Path, text: Path) -> None:
    """In PyTorch's own writing, which tells of the file's position instead, and in the log."""
    limited = (
        "import resource, signal, sys; from pocketlm import cli; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from pocketlm.train import {place}; right = {place}.{name}\n"
        "def full(*given, **more):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY)); return right(*given, **more)\n"
        "{place}.{name} = full; sys.exit(cli.main(sys.argv[1:]))"
    )
    for place, name in (("loop", "save"), ("log", "write")):
        run = tmp_path / name
        words = ["train", str(text), "-o", str(run), *RUN.replace("--steps 40", "--steps 2").split()]
        program = [sys.executable, "-c", limited.format(place=place, name=name), *words]
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "cannot be written (File too large)" in done.stderr.splitlines()[-1]
        assert not [*run.glob(".*")]


def test_ctrl_c_saves_the_step_and_the_same_command_goes_on(tmp_path: Path, text: Path) -> None:
    process = start(text, "-o", tmp_path / "run", options=f"{RUN} --steps 100000")
    while process.poll() is None and not losses(tmp_path / "run"):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    step = checkpoints.read(tmp_path / "run" / "last.pt")["step"]
    assert step == len(losses(tmp_path / "run"))
    assert f"stopped at step {step}, which is saved" in errors


def test_two_processes_do_what_one_does(tmp_path: Path, text: Path) -> None:
    options = f"{RUN} --steps 12 --batch 8"
    assert pocketlm(text, "-o", tmp_path / "one", options=options) == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = start(text, "-o", tmp_path / "two", options=options, launcher=launcher)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


def test_micro_batches_do_not_change_the_result(tmp_path: Path, text: Path) -> None:
    for size in (1, 4):
        options = f"{RUN} --steps 8 --dropout 0 --micro-batch {size}"
        assert pocketlm(text, "-o", tmp_path / str(size), options=options) == 0
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), rel=1e-5)


TALK = "".join(
    json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n"
    for q, a in [("Hello.", "Good day!"), ("Who are you?", "A fox."), ("Bye.", "Farewell!")] * 20
)


def test_from_nothing_to_a_chat_and_from_texts_to_a_fine_tuned_longer_one(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers", reason="trains the vocabulary")
    (tmp_path / "talk.jsonl").write_text(TALK)
    shape = RUN.replace("characters", "bytes") + " --set n_vocab=300 --lr 1e-2"
    assert pocketlm(text, "-o", tmp_path / "base", options=shape) == 0
    tuned = (tmp_path / "talk.jsonl", "-o", tmp_path / "talk", "--from", tmp_path / "base" / "best.pt", "--context", 64)
    options = RUN.removeprefix(SMALL)
    assert pocketlm(*tuned, "--rope-theta", 20000, "--sample", "Line", options=f"{options} --lr 1e-2 --steps 150") == 0
    content = checkpoints.read(tmp_path / "talk" / "best.pt")
    assert (content["shape"].n_ctx, content["shape"].rope_theta) == (64, 20000)
    samples = [row["samples"] for row in log.read_log(tmp_path / "talk" / log.LOG) if "samples" in row]
    assert all(len(texts) == 1 for texts in samples)
    out = tmp_path / "talk.gguf"
    assert cli.main(["export", str(tmp_path / "talk" / "last.pt"), "-o", str(out), "--quant", "q8_0"]) == 0
    capsys.readouterr()
    with load(out, backend="numpy") as model:
        answer = "".join(piece.text for piece in model.chat([{"role": "user", "content": "Who are you?"}], temperature=0))
        assert answer == "A fox."
        assert model.n_ctx == 64


def test_weights_in_half_precision_are_trained_in_full(tmp_path: Path, text: Path) -> None:
    assert pocketlm(text, "-o", tmp_path / "run", options=f"{RUN} --dtype bf16 --steps 20 --lr 1e-2") == 0
    assert {weight.dtype for weight in weights(tmp_path / "run").values()} == {torch.float32}
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.5


def test_a_log_can_be_drawn(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    assert pocketlm(text, "-o", tmp_path / "run") == 0
    assert cli.main(["train", "--plot", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "log.png").read_bytes().startswith(b"\x89PNG")
    assert log.smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert log.progress({"step": 5, "loss": 2.0, "tokens_per_second": 1000}, 10, 3700).endswith("1,000 tokens/s  1:01:40 left")


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pocketlm: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ("", 2, "give the texts to learn and the run's folder"),
        ("{text} -o {run} --preset huge", 2, "--preset huge: expected one of tiny, small-talk"),
        ("{text} -o {run} --set n_layer", 2, "expected a name and a value"),
        ("{text} -o {run} --batch 3 --micro-batch 2", 2, "a batch of 3 is no whole number of micro batches of 2"),
        ("{text} -o {run} --batch 0", 2, "expected steps, batch and micro batch of 1 or more"),
        ("{text} -o {run} --lr -1", 2, "expected 0 < lr"),
        ("{text} -o {run} --dtype int4", 2, "dtype int4: expected one of fp32, bf16, fp16"),
        ("{text} -o {run} --chat alpaca", 2, "--chat alpaca"),
        ("{text} -o {run} --tokenizer sentencepeice", 2, "or a tokenizer's file or folder, did you mean sentencepiece?"),
        ("{text} -o {run} --device tpu9", 2, "--device tpu9"),
        ("{run}/none.txt -o {run}", 1, "none.txt: cannot be read"),
        ("{text} -o {text}", 1, "cannot be made"),
        ("{text} -o {run} --from {text}", 1, "text.txt: is no checkpoint that pocketlm reads"),
        ("{text} -o {run} --from {run}.pt", 1, "run.pt: there is no such file"),
        ("{text} -o {run} --context 100000", 1, "too few for a sequence of 100000"),
        ("--plot {run}", 1, "holds no steps"),
        ("--recipe soup", 2, "--recipe soup: expected one of small-talk"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], options: str, status: int, said: str
) -> None:
    given = options.format(text=text, run=tmp_path / "run").split()
    assert pocketlm(*given, options=SMALL if "-o" in given and not {"--from", "--tokenizer"} & {*given} else "") == status
    assert said in one_line(capsys)


def test_a_run_of_other_settings_is_not_gone_on_with(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pocketlm(text, "-o", tmp_path / "run", options=f"{RUN} --steps 2") == 0
    assert pocketlm(text, "-o", tmp_path / "run", options=f"{RUN} --steps 2 --lr 0.5") == 2
    assert "holds a run with lr = 0.003, not 0.5" in one_line(capsys)


def test_a_batch_that_the_presets_micro_batch_does_not_divide_is_computed_in_smaller_ones(tmp_path: Path, text: Path) -> None:
    options = RUN.replace("--batch 4 --micro-batch 2", "--batch 6")  # the preset has 8
    assert "micro" not in options
    assert pocketlm(text, "-o", tmp_path / "run", options=f"{options} --steps 2") == 0


def test_learned_positions_go_no_further(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = f"{RUN} --steps 2"
    assert pocketlm(text, "-o", tmp_path / "run", "--set", "position=learned", options=options) == 0
    longer = (text, "-o", tmp_path / "longer", "--from", tmp_path / "run" / "last.pt", "--context", 64)
    assert pocketlm(*longer, options="") == 2
    assert "learned positions, for 32 tokens" in one_line(capsys)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": os.system, "model_config": {}}, tmp_path / "bad.pt")
    with pytest.raises(PocketlmError, match="is no checkpoint of this trainer"):
        checkpoints.read(tmp_path / "bad.pt")
    torch.save({"model": {}, "model_config": {"n_layer": 1}}, tmp_path / "short.pt")
    with pytest.raises(PocketlmError, match="is no checkpoint of this trainer"):
        checkpoints.read(tmp_path / "short.pt")
    assert Shape(1, 1, 2, 3, 4).n_ff == 8


@pytest.mark.parametrize(
    ("entry", "value"),
    [("optimizer", "text"), ("identity", -1), ("position", "text"), ("step", "text"), ("step", -5), ("best", "text"),
     ("seconds", None), ("model", {})],
)  # fmt: skip
def test_a_last_checkpoint_that_no_run_saved_is_one_line(
    entry: str, value: Any, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = RUN.replace("--steps 40", "--steps 2")
    assert pocketlm(text, "-o", tmp_path / "run", options=options) == 0
    content = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    torch.save({**content, entry: value}, tmp_path / "run" / "last.pt")
    capsys.readouterr()
    assert pocketlm(text, "-o", tmp_path / "run") == 1
    assert "is no checkpoint that a run can go on from; choose another folder" in one_line(capsys)


def test_a_run_without_its_tokenizer_does_not_go_on_with_another(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = RUN.replace("--steps 40", "--steps 2")
    assert pocketlm(text, "-o", tmp_path / "run", options=options) == 0
    (tmp_path / "run" / "vocab.json").unlink()
    assert pocketlm(text, "-o", tmp_path / "run", options=options) == 0  # the same texts make the same
    (tmp_path / "run" / "vocab.json").unlink()
    text.write_text(TEXT.replace("quick", "ÄÖÜ"))
    capsys.readouterr()
    assert pocketlm(text, "-o", tmp_path / "run") == 1
    assert "has lost the tokenizer that its weights were trained with" in one_line(capsys)


def test_rows_of_a_log_that_are_none_of_ours_are_left_out(tmp_path: Path) -> None:
    (tmp_path / log.LOG).write_bytes(b'{"step": 1}\n[]\n{"step": "x"}\n{}\n\xff\n{"step": 2')
    assert log.read_log(tmp_path / log.LOG) == [{"step": 1}]


def test_nothing_else_imports_pytorch() -> None:
    code = (
        "import sys; from pocketlm import cli; import pocketlm.model, pocketlm.train.command, pocketlm.train.log\n"
        "try: cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
