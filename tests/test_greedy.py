"""Temperature 0 is greedy: every token is the likeliest one of an exact forward pass, until a penalty is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_llama import POCKET, SMOLLM2, dequantised, exact_logits

import pocketlm
from pocketlm.cli import main
from pocketlm.model import find_model
from pocketlm.runtime.sampling import CHAT_PENALTY
from pocketlm.runtime.sampling_options import SamplingOptions

N = 64


@pytest.fixture(scope="module", params=["Pocket", "SmolLM2"])
def real(request: pytest.FixtureRequest) -> tuple[Path, Any, str]:
    if request.param == "Pocket":
        return find_model("small-talk"), POCKET, "I have a dog."
    return request.getfixturevalue("smollm2_path"), SMOLLM2, "The capital of France is"


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_greedy_tokens_are_the_likeliest_of_an_exact_forward(
    real: tuple[Path, Any, str], backend: str, capsys: pytest.CaptureFixture[str]
):
    path, shape, prompt = real
    words = ["generate", str(path), "-p", prompt, "-n", str(N), "--temp", "0", "--ignore-eos", "--json", "--backend", backend]
    assert main(words) == 0
    ids = json.loads(capsys.readouterr().out)["ids"]
    tok = pocketlm.tokenizer.load(path)
    start = tok.encode(prompt, bos=tok.adds_bos)
    logits = exact_logits(dequantised(path), np.array(start + ids[:-1]), shape)
    assert ids == logits[len(start) - 1 :].argmax(1).tolist()
    with pocketlm.load(path, backend=backend) as model:
        assert [piece.id for piece in model.generate(prompt, max_tokens=N, temperature=0, ignore_eos=True)][:-1] == ids


def test_penalties_are_off_unless_asked_for():
    options = SamplingOptions()
    assert (options.repeat_penalty, options.presence_penalty, options.frequency_penalty) == (1, 0, 0)


def test_a_chat_has_a_mild_penalty_of_its_own(capsys: pytest.CaptureFixture[str]):
    messages = [{"role": "user", "content": "Tell me a story about a dog and a cat."}]

    def ids(**options: Any) -> list[int]:
        return [piece.id for piece in model.chat(messages, max_tokens=40, temperature=0, ignore_eos=True, **options)]

    with pocketlm.load("small-talk", backend="numpy") as model:
        default, penalised, plain = ids(), ids(repeat_penalty=CHAT_PENALTY), ids(repeat_penalty=1.0)
    assert default == penalised != plain
