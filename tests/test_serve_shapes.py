"""What is said of single tokens, where several of them are one character."""

from types import SimpleNamespace

import pytest

from pocketlm.runtime.generator import Piece
from pocketlm.serve.shapes import Shape

PARTS = {1: b"a ", 2: b"\xf0\x9f", 3: b"\x98", 4: b"\x80", 5: b"!", 6: b"\x82"}  # 2, 3, 4: an emoji


def piece(id, logprob, *likeliest):
    return Piece("", id, logprob, top_logprobs=likeliest)


@pytest.mark.parametrize("in_parts", [False, True])
def test_log_probabilities_of_parts_of_characters(in_parts):
    ask = SimpleNamespace(is_chat=False, logprobs=True, n=1)
    shape = Shape(ask, "model", PARTS.__getitem__)
    pieces = [piece(1, -1.0, (1, -1.0)), piece(2, -0.25, (2, -0.25)), piece(3, -0.5, (3, -0.5), (4, -2.0), (6, -3.0)),
              piece(4, -0.125, (4, -0.125)), piece(5, -4.0, (1, -0.5), (5, -4.0))]  # fmt: skip
    groups = [pieces[:2], pieces[2:3], pieces[3:]] if in_parts else [pieces]
    told = [shape.delta(0, "", group)["choices"][0]["logprobs"] for group in groups]
    whole = {name: [entry for part in told for entry in part[name]] for name in told[0]}
    assert whole["tokens"] == ["a ", r"bytes:\xf0\x9f", r"bytes:\x98", r"bytes:\x80", "!"]
    assert whole["text_offset"] == [0, 2, 2, 2, 3], "where the character is that a token belongs to"
    assert whole["top_logprobs"][2] == {r"bytes:\x98": -0.5, r"bytes:\x80": -2.0, r"bytes:\x82": -3.0}
    for token, logprob, likeliest in zip(whole["tokens"], whole["token_logprobs"], whole["top_logprobs"], strict=True):
        assert likeliest[token] == logprob
