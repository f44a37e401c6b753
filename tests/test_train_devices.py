"""Where a run trains: memory, precision and compilers of devices, the 8-bit optimiser, processes; presets as published."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import RUN, Killed, content, errors, folder, killed_at, same, torch, train  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from pocketlm.errors import PocketlmError
from pocketlm.train import devices, log, loop
from pocketlm.train.presets import PRESETS, Settings

pytestmark = pytest.mark.usefixtures("one_torch_thread")


class NoFloat64(TorchDispatchMode):
    """As Apple's GPUs are."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            assert not (isinstance(value, torch.Tensor) and value.dtype == torch.float64), function
        return result


def test_the_loop_needs_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    right = loop.train

    def train_without(*arguments: Any, **keywords: Any) -> Any:
        with NoFloat64():
            return right(*arguments, **keywords)

    monkeypatch.setattr(loop, "train", train_without)
    assert train("run", "a.txt --steps 10") == 0


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 2 GiB", "MPS backend out of memory"])
def test_out_of_memory_says_what_would_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str
) -> None:
    def full(*_: Any) -> float:
        raise RuntimeError(f"{said}\nand many more lines")

    monkeypatch.setattr(loop, "losses", full)
    assert train("run", "a.txt --steps 2 --batch 12 --micro-batch 6") == 1
    assert errors(capsys) == "pocketlm: out of memory on cpu with 6 sequences of 16 tokens at once: try --micro-batch 4\n"
    assert train("run", "a.txt --steps 2 --batch 12 --micro-batch 1") == 1
    assert "try --checkpointing or --optimizer adamw8bit" in errors(capsys)
    assert train("run", "a.txt --steps 2 --batch 12 --micro-batch 1 --checkpointing") == 1
    assert "try --optimizer adamw8bit" in errors(capsys)


def test_a_real_allocation_that_is_too_large_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PocketlmError, match=r"out of memory on cpu .* try --micro-batch 4"), devices.memory_errors(
        Settings(batch=8, micro_batch=8), devices.Ranks(0, 1, torch.device("cpu"))
    ):
        torch.empty(1 << 55)


def test_checkpointing_changes_nothing_but_memory() -> None:
    for flag in ("", "--checkpointing"):
        assert train(f"run{flag}", f"a.txt --steps 3 --set n_layer=3 {flag}") == 0
    assert same("run", "run--checkpointing")


def test_checkpointing_keeps_the_inputs_of_layers_alone() -> None:
    from torch.autograd.graph import saved_tensors_hooks

    held = {}
    for checkpointing in (False, True):
        model, kept = loop.Decoder(PRESETS["tiny"].shape, 0.1, checkpointing).train(), []
        with saved_tensors_hooks(lambda tensor, kept=kept: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
            model(torch.zeros(2, 64, dtype=torch.int64))
        held[checkpointing] = sum(kept)
    assert held[True] < held[False] / 3


def test_an_8_bit_optimiser_learns_and_goes_on_to_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="the 8-bit optimiser is bitsandbytes")
    wide = RUN.replace("n_embd=16", "n_embd=64").replace("n_ff=24", "n_ff=96")  # smaller matrices keep 32 bits
    words = "a.txt --steps 30 --optimizer adamw8bit --save-seconds 0"
    assert train("whole", words, wide) == 0
    killed_at(monkeypatch, 13)
    with pytest.raises(Killed):
        train("killed", words, wide)
    assert train("killed", words, wide) == 0
    assert same("whole", "killed")
    states = content("whole")["optimizer"]["state"].values()
    assert torch.uint8 in {t.dtype for state in states for t in _tensors(state)}
    rows = [row["loss"] for row in log.read_log(Path("whole/log.jsonl")) if "loss" in row]
    assert rows[-1] < rows[0] - 0.5


def _tensors(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for each in value.values() for t in _tensors(each)] if isinstance(value, dict) else []


def test_without_its_package_the_8_bit_optimiser_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim.adamw", None)
    assert train("run", "a.txt --steps 2 --optimizer adamw8bit") == 1
    assert "pip install bitsandbytes" in errors(capsys)


def test_a_model_that_cannot_be_compiled_is_one_line_and_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a small function would be: the first line of what the compiler says, of a hundred."""

    def fails(model: Any) -> Any:
        def forward(*_: Any) -> Any:
            raise RuntimeError("\nFound GeForce GTX 1050 which is too old\n" + "  stack\n" * 100)

        return forward

    monkeypatch.setattr(torch, "compile", fails)
    options = RUN
    monkeypatch.setitem(PRESETS, "tiny", loop_preset())
    assert train("run", "a.txt --steps 2", options) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "compile" in line] == [
        "training without torch.compile, which is slower: Found GeForce GTX 1050 which is too old"
    ]
    assert not any("stack" in line for line in lines)
    assert train("run", "a.txt --steps 2 --compile", options) == 1
    assert train("run", "a.txt --steps 2 --no-compile", options) == 0


def loop_preset() -> Any:
    from dataclasses import replace

    tiny = PRESETS["tiny"]
    return replace(tiny, settings=replace(tiny.settings, compile=True))


def test_a_presets_precision_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert devices.dtype_here("bf16", cpu) == devices.dtype_here("fp16", torch.device("mps")) == "fp32"
    for has, got in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert devices.dtype_here("bf16", cuda) == got
    assert devices.dtype_here("fp16", cuda) == "fp16"


PROGRAM = """
import sys
from pathlib import Path
from pocketlm import cli
assert cli.main(sys.argv[1:]) == 0
left = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
sys.exit("left behind: " + ", ".join(left) if any("gloo" in name for name in left) else 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads in /proc")
def test_processes_that_trained_together_leave_no_thread_behind() -> None:
    """One that is alive while the interpreter ends may end the program with "terminate called"."""
    Path("program.py").write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "program.py"]
    words = f"train a.txt -o run --val val.txt {RUN} --steps 2".split()
    done = subprocess.run([sys.executable, *launcher, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ── presets ──────────────────────────────────────────────────────────────────────────────────────────────────────────

PUBLISHED = {  # steps, tokens a step, context, learning rate, warm-up, beta2, dropout
    "chekhov-10m": (5000, 64 * 256, 256, 1e-3, 100, 0.99, 0.2),
    "classics-46m": (30000, 33792, 512, None, None, None, 0.1),
    "mini-tron-48m": (16000, 64 * 1024, 1024, 3e-4, 200, 0.95, 0.1),
    "turkish-25m": (50000, 128 * 512, 512, 3e-4, 500, 0.95, 0.0),
    "turkish-68m": (None, 32 * 2048, 2048, 3e-4, 500, 0.95, 0.02),
    "gpt2-124m": (15000, 6 * 21 * 1024, 1024, 1e-4, 1750, 0.95, 0.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_what_their_authors_published(name: str) -> None:
    preset = PRESETS[name]
    s, n_ctx = preset.settings, preset.shape.n_ctx
    ours = (s.steps, s.batch * n_ctx, n_ctx, s.lr, s.warmup, s.beta2, s.dropout)
    assert [mine for mine, theirs in zip(ours, PUBLISHED[name], strict=True) if theirs is not None] == [
        theirs for theirs in PUBLISHED[name] if theirs is not None
    ]
    assert loop.learning_rate(s.steps, s) == pytest.approx(s.lr / 10)


def test_beta2_and_the_lowest_learning_rate_can_be_given() -> None:
    assert train("run", "a.txt --steps 20 --beta2 0.9 --min-lr 1e-4 --lr 1e-3") == 0
    assert content("run")["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.9)
    rates = [row["lr"] for row in map(json.loads, Path("run/log.jsonl").read_text().splitlines()) if "lr" in row]
    assert rates[-1] == pytest.approx(1e-4, rel=0.1)
