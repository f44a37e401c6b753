"""`pocketlm eval` says how many bits a character takes: of the characters that were predicted, and no others."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from tiny_models import write_model

import pocketlm
from pocketlm.cli import main

TEXTS = {
    "plain": "then in the thing, nothing in this then. " * 3,
    "two bytes a letter": "Şu çığ gibi büyüyen öğün güzeldi. " * 3,
    "emoji": "😀👍 ok 🌍🌍 " * 4,
}


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("window", [7, 16, 1000])
def test_bits_are_divided_by_the_characters_that_were_predicted(tmp_path, capsys, text, adds_bos, window):
    path = write_model(tmp_path / "m.gguf", n_ctx=1024, metadata={"tokenizer.ggml.add_bos_token": adds_bos})
    (tmp_path / "text").write_text(text, encoding="utf-8")
    given = ["--text", str(tmp_path / "text"), "--ctx", str(window), "--backend", "numpy", "--json"]
    assert main(["eval", str(path), *given]) == 0
    said = json.loads(capsys.readouterr().out)
    with pocketlm.load(path, backend="numpy") as model:
        tokenizer, nats, n_characters, at = model.tokenizer, 0.0, 0, 0
        ids, lead = tokenizer.encode(text), [tokenizer.bos_id] * adds_bos
        data = text.encode()
        last_bytes = np.array([i + 1 == len(data) or data[i + 1] & 0xC0 != 0x80 for i in range(len(data))])  # of a character
        for start in range(0, len(ids), window - len(lead)):
            block = lead + ids[start : start + window - len(lead)]
            logits = model.logits(block).astype(np.float64)
            logits -= np.log(np.exp(logits).sum(1, keepdims=True))
            for i, token in enumerate(block):
                if i < len(lead):
                    continue
                n_bytes = len(tokenizer.token_bytes(token))
                if i:
                    nats -= logits[i - 1, token]
                    n_characters += int(last_bytes[at : at + n_bytes].sum())
                at += n_bytes
    assert at == len(data)
    assert said["bits_per_character"] == pytest.approx(nats / math.log(2) / n_characters, rel=1e-5)
    if adds_bos:
        assert n_characters == len(text)
