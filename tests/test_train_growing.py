"""Runs that grow: more steps, more texts, another order or mix of them; what is kept of a run, where it ends, what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the trainer is PyTorch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from pocketlm import cli  # noqa: E402
from pocketlm.errors import PocketlmError, UsageError  # noqa: E402
from pocketlm.train import checkpoints, devices, log, loop  # noqa: E402
from pocketlm.train.batches import Feed, read_mix  # noqa: E402
from pocketlm.train.data import Corpus  # noqa: E402
from pocketlm.train.presets import PRESETS, Settings  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SMALL = "--set n_layer=1 --set n_embd=16 --set n_head=2 --set n_ff=24 --set n_ctx=16 --tokenizer characters"
RUN = f"{SMALL} --batch 4 --micro-batch 2 --dropout 0.1 --warmup 4 --eval-every 10 --threads 1 --log-every 1"


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, n in (("a", 900), ("b", 300), ("c", 150)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{i}: the quick brown fox {i * 7919 % 1000} jumps.\n" for i in range(n)))
    (tmp_path / "val.txt").write_text("12: the quick brown fox 77 jumps.\n" * 40)
    return tmp_path


def train(run: str, words: str, options: str = RUN) -> int:
    return cli.main(["train", "-o", run, "--val", "val.txt", *options.split(), *words.split()])


def killed_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    right, left = loop.take_step, [*steps]

    def take_step(*arguments: Any) -> float:
        if arguments[6] in left:
            left.remove(arguments[6])
            raise Killed
        return right(*arguments)

    monkeypatch.setattr(loop, "take_step", take_step)


def content(run: str) -> dict[str, Any]:
    return checkpoints.read(Path(run) / "last.pt")


def same(a: str, b: str) -> bool:
    mine, theirs = content(a), content(b)
    weights = ((weight, theirs["model"][name]) for name, weight in mine["model"].items())
    return mine["position"] == theirs["position"] and all(torch.equal(*pair) for pair in weights)


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    return "".join(line for line in capsys.readouterr().err.splitlines(keepends=True) if line.startswith("pocketlm: "))


# ── growing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

STAGES = ("a.txt b.txt --steps 20", "c.txt b.txt a.txt --steps 40 --mix a.txt=50..10 b.txt=30 c.txt=20 @30 c.txt=3 [ab].txt=1")


def test_a_run_that_grew_and_was_killed_ends_with_the_weights_of_one_that_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in STAGES:
        assert train("whole", words) == 0
    killed_at(monkeypatch, 7, 19, 22, 33)
    for words, kills in zip(STAGES, (2, 2), strict=True):
        for _ in range(kills):
            with pytest.raises(Killed):
                train("killed", f"{words} --save-seconds 0")
        assert train("killed", f"{words} --save-seconds 0") == 0
    assert same("whole", "killed")
    assert [row["loss"] for row in log.read_log(Path("whole/log.jsonl")) if "loss" in row] == [
        row["loss"] for row in log.read_log(Path("killed/log.jsonl")) if "loss" in row
    ]


def test_going_on_keeps_the_optimiser_and_where_each_text_was(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train("run", STAGES[0]) == 0
    before = content("run")
    seen: dict[str, Any] = {}

    def take_step(model: Any, compiled: Any, feed: Feed, optimizer: Any, *_: Any) -> float:
        seen.update(position=feed.position, state=optimizer.state_dict()["state"])
        raise Killed

    monkeypatch.setattr(loop, "take_step", take_step)
    with pytest.raises(Killed):
        train("run", STAGES[1])
    assert {name: seen["position"][name] for name in before["position"]} == before["position"]
    assert seen["position"]["c.txt"] == [0, 0.0]
    for i, state in before["optimizer"]["state"].items():
        assert all(torch.equal(state[name], seen["state"][i][name]) for name in state)


def test_texts_in_another_order_are_not_encoded_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run", "a.txt b.txt --steps 2") == 0
    capsys.readouterr()
    assert train("run", "b.txt c.txt a.txt --steps 4") == 0
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("encoding")] == ["encoding c.txt"]
    assert content("run")["position"].keys() == {"a.txt", "b.txt", "c.txt"}


def test_what_cannot_change_is_said_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    start = "x" * 70
    identity = {"from": f"{start}/one.pt", "lr": 0.1, "n_layer": 2}
    model = loop.Decoder(PRESETS["tiny"].shape)
    Path("run").mkdir()
    checkpoints.save(
        Path("run/last.pt"), model, identity=identity, measured=[], position={}, **loop.asdict(loop.Progress())
    )
    new = {"from": f"{start}/two.pt", "lr": 0.2, "n_layer": 2}
    with pytest.raises(UsageError) as error:
        loop._resume(Path("run"), new, [], model, None, None, None)  # type: ignore[arg-type]
    said = f"run holds a run with from = {start}/one.pt, not {start}/two.pt; lr = 0.1, not 0.2: give that to go on with it"
    assert str(error.value).startswith(said)
    assert train("other", "a.txt --steps 2") == 0
    assert train("other", "a.txt --steps 4 --lr 0.5 --dropout 0.4") == 2
    assert "dropout = 0.1, not 0.4; lr = 0.003, not 0.5" in errors(capsys)


# ── mixes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def feed(mix: str = "", size: int = 10, steps: int = 100, **lengths: int) -> Feed:
    lengths = lengths or {"a": 4000, "b": 1000, "c": 500}
    ids = [np.full(n, i, np.uint16) for i, n in enumerate(lengths.values())]
    corpus = Corpus(ids, [np.ones(len(part), np.uint8) for part in ids], 8, [f"d/{name}.txt" for name in lengths])
    return Feed(corpus, size, 1, read_mix(mix.split()), steps)


def counts(given: Feed, *steps: int) -> list[int]:
    drawn = [int(ids[0]) for step in steps for ids, _, _ in given.batch(step)]
    return [drawn.count(i) for i in range(len(given.parts))]


def test_shares_are_kept_within_one_sequence() -> None:
    assert counts(feed("a.txt=50 b.txt=30 c.txt=20"), *range(10)) == [50, 30, 20]
    given = feed("a.txt=1 b.txt=1 c.txt=1", size=1)
    for n in range(1, 50):
        counts(given, n)
        assert max(abs(given.given - n / 3)) <= 1


def test_without_a_mix_every_text_is_seen_as_often_as_the_others() -> None:
    given = feed()
    counts(given, *range(300))
    assert np.ptp(given.given / given.n_blocks) < 0.05


def test_stages_follow_each_other_and_shares_move_within_them() -> None:
    given = feed("a.txt=100..0 b.txt=0..100 @50 c.txt=1")
    assert given.shares(0).tolist() == [1, 0, 0]
    assert given.shares(49).tolist() == [0, 1, 0]
    assert given.shares(10).tolist() == pytest.approx([39 / 49, 10 / 49, 0])
    assert given.shares(50).tolist() == given.shares(99).tolist() == [0, 0, 1]
    assert counts(given, 50, 51) == [0, 0, 20]


def test_a_pattern_is_a_group_that_shares_by_length() -> None:
    given = feed("d/p*=50 q.txt=50", p1=3000, p2=1000, q=100)
    assert given.shares(0).tolist() == pytest.approx([0.375, 0.125, 0.5], abs=0.002)


def test_texts_too_short_for_a_sequence_can_be_mixed() -> None:
    given = feed("a.txt=1 tiny*=1", a=400, tiny1=6, tiny2=7, tiny3=9)
    assert counts(given, 0, 1)[0] == 10


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ("a.txt", "expected FILE=SHARE"), ("a.txt=-1", "expected FILE=SHARE"), ("a.txt=1..x", "expected FILE=SHARE"),
        ("a.txt=0", "shares above 0"), ("a.txt=1 @5 b.txt=1 @5 c.txt=1", "a later @STEP"), ("@5", "shares above 0"),
        ("z*=1 a.txt=1", "is none of the texts"), ("tiny.txt=1", "leaves nothing to learn"),
    ],
)  # fmt: skip
def test_mixes_that_cannot_be_are_usage_errors(mix: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        feed(mix, a=400, b=400, c=400, tiny=3).batch(0)


def test_files_that_only_the_mix_names_are_learnt_and_missing_ones_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run", "--mix a.txt=50 b.txt=50 --steps 5") == 0
    assert [given for given, _ in content("run")["position"].values()] == [10, 10]
    assert train("none", "a.txt --mix a.txt=50 nosuch.txt=50 --steps 5") == 1
    assert "nosuch.txt: cannot be read" in errors(capsys)
    assert train("run", "a.txt nosuch.txt --steps 10") == 1  # a run whose vocabulary is there already
    assert errors(capsys).startswith("pocketlm: nosuch.txt: cannot be read (No such file or directory); the other parts")


# ── what is kept, where it ends ──────────────────────────────────────────────────────────────────────────────────────


def numbered(run: str) -> list[str]:
    return sorted(path.name for path in Path(run).glob("step_*.pt"))


def test_the_last_checkpoints_are_kept_and_some_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at(monkeypatch, 45)
    with pytest.raises(Killed):
        train("run", "a.txt --steps 60 --keep 2 --keep-every 20")
    assert numbered("run") == ["step_000010.pt", "step_000020.pt", "step_000030.pt", "step_000040.pt"]
    assert train("run", "a.txt --steps 60 --keep 2 --keep-every 20") == 0
    assert numbered("run") == ["step_000020.pt", "step_000030.pt", "step_000040.pt", "step_000050.pt", "step_000060.pt"]
    assert checkpoints.read(Path("run/step_000030.pt"))["step"] == 30
    assert not list(Path("run").glob(".*"))


def test_an_earlier_checkpoint_can_be_gone_back_to() -> None:
    assert train("run", "a.txt --steps 20 --keep-every 10") == 0
    before = content("run")
    (Path("run/step_000010.pt")).replace("run/last.pt")
    assert train("run", "a.txt --steps 20 --keep-every 10") == 0
    assert all(torch.equal(before["model"][name], weight) for name, weight in content("run")["model"].items())


def test_a_checkpoint_cannot_name_what_is_deleted() -> None:
    assert train("run", "a.txt --steps 10 --keep 1") == 0
    Path("victim.pt").write_text("mine")
    (Path("run") / "step_").mkdir()
    loaded = torch.load("run/last.pt", weights_only=True)
    torch.save({**loaded, "rolling": ["/../../victim", "/../victim", 10]}, "run/last.pt")
    assert train("run", "a.txt --steps 20 --keep 1") == 0
    assert numbered("run") == ["step_000020.pt"]
    assert Path("victim.pt").exists()


def test_a_plateau_ends_a_run_and_more_patience_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = iter([3.0, 2.0, 2.5, 2.1, 2.2, 2.3, 2.4])
    monkeypatch.setattr(loop, "evaluate", lambda *_: next(found))
    assert train("run", "a.txt --steps 1000 --patience 2") == 0
    assert capsys.readouterr().out == "run/last.pt: validation loss 2.1000 after 40 steps\n"
    assert checkpoints.read(Path("run/best.pt"))["step"] == 20
    assert train("run", "a.txt --steps 1000 --patience 2") == 0  # it stays where it is
    assert train("run", "a.txt --steps 1000 --patience 4") == 0
    assert "after 60 steps" in capsys.readouterr().out


def test_losses_on_other_validation_texts_are_not_compared() -> None:
    assert train("run", "a.txt --steps 60 --lr 1e-2") == 0
    best = content("run")["best"]
    Path("val.txt").write_text("spmuj 77 xof nworb kciuq eht\n" * 40)  # harder: no loss on it is below the best so far
    assert train("run", "a.txt --steps 70 --lr 1e-2") == 0
    assert content("run")["best"] > best
    assert checkpoints.read(Path("run/best.pt"))["step"] == 70


# ── what it says ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_start_says_what_the_run_is_made_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("run", "a.txt b.txt --steps 10") == 0
    lines = capsys.readouterr().err.splitlines()
    model = content("run")["model"]
    total = sum(weight.numel() for weight in model.values())
    attention = sum(weight.numel() for name, weight in model.items() if ".attn." in name)
    assert any(f"attention {attention:,} ({attention / total:.1%})" in line for line in lines)
    n_tokens = {name: len(np.memmap(f"run/data/part-0000{i}.train", np.uint16)) for i, name in enumerate(("a.txt", "b.txt"))}
    share = n_tokens["b.txt"] / sum(n_tokens.values())
    assert f"b.txt: {n_tokens['b.txt']:,} tokens ({share:.1%}), 1.00 characters a token" in lines
    assert f"10 steps of 64 tokens: {640 / sum(n_tokens.values()):.2f} epochs" in lines


def test_samples_are_text_two_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("Пора чинить лодку,\nсказал он внуку. " * 400, encoding="utf-8")
    Path("val.txt").write_text("Пора чинить лодку,\n" * 40, encoding="utf-8")
    assert train("run", "a.txt --steps 10 --sample Пора --sample дку --sample-tokens 30") == 0
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("  · Пора")]) == 2
    assert "\\n" not in "".join(lines)
    (row,) = (row for row in log.read_log(Path("run/log.jsonl")) if "samples" in row)
    assert [(sample["prompt"], len(sample["texts"])) for sample in row["samples"]] == [("Пора", 2), ("дку", 2)]
    assert row["perplexity"] == pytest.approx(np.exp(row["val_loss"]))
    assert "Пора" in Path("run/log.jsonl").read_text(encoding="utf-8")


def test_samples_are_of_the_likeliest_tokens_and_greedy_at_0() -> None:
    from pocketlm import tokenizer

    assert train("run", "a.txt --steps 10") == 0
    tok = tokenizer.load("run")
    model, _ = loop_model("run/last.pt")
    cold = loop.sampler(tok, ["the"], 2, 20, 0.0)(model)[0]["texts"]
    top = loop.sampler(tok, ["the"], 1, 20, 5.0, 1)(model)[0]["texts"]
    assert cold[0] == cold[1] == top[0]
    hot = loop.sampler(tok, ["the"], 2, 20, 5.0, 0)(model)[0]["texts"]
    assert hot[0] != hot[1]


def loop_model(path: str) -> Any:
    from pocketlm.train.starting_weights import read_start

    return read_start(Path(path), Settings())


def test_the_curve_is_drawn_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="draws")
    killed_at(monkeypatch, 15)
    with pytest.raises(Killed):
        train("run", "a.txt --steps 20 --plot")
    assert Path("run/log.png").read_bytes().startswith(b"\x89PNG")


# ── devices ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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
