"""lm-evaluation-harness gets from pocketlm what it gets from its own model class, with the same weights in transformers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")  # its own models want it
import lm_eval
import torch
from lm_eval.api.instance import Instance

from pocketlm import cli
from pocketlm.bench.harness import PocketLM

TASKS = {
    "choices": ("multiple_choice", ["doc_to_text: '{{question}}'", "doc_to_choice: '{{choices}}'", "doc_to_target: answer"]),
    "rolling": ("loglikelihood_rolling", ["doc_to_text: ''", "doc_to_target: '{{text}}'",
                                          "metric_list: [{metric: bits_per_byte}]"]),
    "complete": ("generate_until", ["doc_to_text: '{{question}}'", "doc_to_target: '{{text}}'",
                                    "generation_kwargs: {until: ['q', ' z'], max_gen_toks: 24}",
                                    "metric_list: [{metric: exact_match}]"]),
}  # fmt: skip
TEMPLATE = """{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}\
{% if add_generation_prompt %}assistant: {% endif %}"""
N = 12
WORDS = ["the", "then", "he", "inn", "in", "on", "hello", "low", "new", "newer", "wide", "ça", "Ёлка", "12", ",", "."]


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in both formats, and tasks on texts of our own."""
    folder, draw = tmp_path_factory.mktemp("harness"), random.Random(4)
    write_model(folder / "tiny.gguf", n_ctx=64)
    command = ["export", str(folder / "tiny.gguf"), "--to", "huggingface", "--quant", "f32", "-o", str(folder / "tiny")]
    assert cli.main(command) == 0

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    rows = []
    for _ in range(N):
        choices = [" " + text(1, 4) for _ in range(3)]
        rows.append({"question": text(1, 20), "choices": choices, "answer": draw.randrange(3), "text": text(5, 90)})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, (kind, lines) in TASKS.items():
        own = [f"task: {name}", "dataset_path: json", f"dataset_kwargs: {{data_files: {{test: {folder / 'data.jsonl'}}}}}",
               "test_split: test", f"output_type: {kind}", *lines]  # fmt: skip
        (folder / f"{name}.yaml").write_text("\n".join(own) + "\n")
    return folder


def evaluated(folder: Path, model: str, batch_size: int, **arguments: Any) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[*TASKS], task_manager=tasks, batch_size=batch_size, bootstrap_iters=0,
        log_samples=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Iterator[dict[str, Any]]:
    n = torch.get_num_threads()
    torch.set_num_threads(1)  # those of a tiny model wait for each other more than they compute
    yield evaluated(folder, "hf", 1, pretrained=str(folder / "tiny"), dtype="float32", device="cpu", max_length=64)
    torch.set_num_threads(n)


@pytest.mark.parametrize(("backend", "rel"), [("numpy", 0.0), ("native", 3e-4)])  # it rounds activations
def test_likelihoods_and_completions_are_those_of_its_own_model(folder, theirs, backend, rel):
    ours = evaluated(folder, "pocketlm", 4, pretrained=str(folder / "tiny.gguf"), backend=backend)
    n_compared = 0
    for task in TASKS:
        for own, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert own["doc_id"] == other["doc_id"]
            for a, b in zip(own["filtered_resps"], other["filtered_resps"], strict=True):
                n_compared += 1
                if task == "choices":
                    assert (float(a[0]), a[1]) == (pytest.approx(float(b[0]), abs=1e-3, rel=rel), b[1])
                elif task == "rolling":
                    assert a == pytest.approx(b, abs=1e-3, rel=rel)
                elif rel == 0:  # a rounding decides between two tokens that are as likely as each other
                    assert a == b
        for name, value in ours["results"][task].items():
            if isinstance(value, float):
                same = task != "complete" or rel == 0
                assert not same or value == pytest.approx(theirs["results"][task][name], rel=1e-3), (task, name)
    assert n_compared == N * 5
    assert len({own["filtered_resps"][0] for own in ours["samples"]["complete"]}) > 5, "they say nothing"


def instances(*arguments: Any) -> list[Instance]:
    return [Instance("loglikelihood", {}, each, i) for i, each in enumerate(arguments)]


@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_a_likelihood_is_the_sum_over_the_logits_of_the_whole_text(folder, backend):
    import numpy as np

    model = PocketLM(str(folder / "tiny.gguf"), batch_size=3, backend=backend)
    pairs = [("the inn", " then he"), ("", "hello"), ("the inn", " on"), ("hello " * 60, "the " * 10), ("a ", "b")]
    found = model.loglikelihood(instances(*pairs), disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        before = model.tok_encode(context.rstrip()) or [model.prefix_token_id]
        spaces = context[len(context.rstrip()) :]
        whole = model.tok_encode(context + continuation) if context else before + model.tok_encode(continuation)
        n = len(whole) - len(before)
        assert spaces in ("", " ")
        ids = whole[-65:]
        logits = model.model.logits(ids[:-1]).astype(np.float64)[-n:]
        logits -= logits.max(1, keepdims=True)
        each = logits[range(n), ids[-n:]] - np.log(np.exp(logits).sum(1))
        assert logprob == pytest.approx(each.sum(), abs=1e-3)
        assert greedy == (logits.argmax(1) == ids[-n:]).all()
    turned = model.loglikelihood(instances(*pairs[::-1]), disable_tqdm=True)
    assert [logprob for logprob, _ in turned] == pytest.approx([logprob for logprob, _ in found[::-1]], abs=1e-3)


def test_an_answer_that_a_task_begins_is_gone_on_with_as_by_its_own_model(tmp_path):
    """`gen_prefix` of a task: the harness hands it over as a last message of the assistant's that has not ended."""
    from lm_eval.models.huggingface import HFLM

    write_model(tmp_path / "tiny.gguf", metadata={"tokenizer.chat_template": TEMPLATE})
    command = ["export", str(tmp_path / "tiny.gguf"), "--to", "huggingface", "-o", str(tmp_path / "tiny")]
    assert cli.main(command) == 0
    models = PocketLM(str(tmp_path / "tiny.gguf")), HFLM(str(tmp_path / "tiny"), device="cpu")
    asked = [{"role": "user", "content": "hello"}]
    begun = [*asked, {"role": "assistant", "content": "the inn"}]
    for messages, prompt in ((asked, True), (begun, False)):
        ours, theirs = (model.apply_chat_template(messages, prompt) for model in models)
        assert ours == theirs
    assert ours.endswith("the inn")


def test_choices_share_the_computation_of_their_question(folder, monkeypatch):
    model = PocketLM(str(folder / "tiny.gguf"), batch_size=2)
    run, seen = model.model.executor.step, []
    monkeypatch.setattr(model.model.executor, "step", lambda *w: (seen.append(sum(len(ids) for _, ids, _ in w[0])), run(*w))[1])
    question = "the inn " * 8
    n = len(model.tok_encode(question.rstrip()))
    model.loglikelihood(instances(*((question.rstrip(), f" {c}") for c in "abcdefgh")), disable_tqdm=True)
    assert sum(seen) < n + 8 * 4


def test_the_documented_command_runs_it(folder):
    command = [sys.executable, "-m", "pocketlm.bench.harness", "--model", "pocketlm", "--model_args",
               f"pretrained={folder / 'tiny.gguf'}", "--tasks", "choices", "--include_path", str(folder)]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "|choices|" in run.stdout.replace(" ", "")
