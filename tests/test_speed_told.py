"""The speed of an answer is counted in one way wherever it is told: the tokens after the first, over the time they took."""

import json
from math import nan

import pytest

from pocketlm import cli
from pocketlm.runtime.generator import Piece
from pocketlm.serve.shapes import timings


def last(tokens, seconds):
    return Piece("", -1, nan, "length", 3, 0, tokens, 0.25, seconds)


@pytest.mark.parametrize(
    ("tokens", "seconds", "speed"), [(5, 2.0, 2.0), (2, 0.5, 2.0), (1, 2.0, 0.0), (0, 0.0, 0.0), (3, 0.0, 0.0)]
)
def test_every_place_tells_the_speed_of_the_tokens_after_the_first(tokens, seconds, speed, monkeypatch, capsys, tiny):
    piece = last(tokens, seconds)
    assert piece.tokens_per_second == speed
    assert timings(piece)["predicted_per_second"] == speed
    monkeypatch.setattr("pocketlm.model.Model.generate", lambda *_, **__: iter([piece]))
    assert cli.main(["generate", tiny, "-p", "Once", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_second"] == speed
    assert cli.main(["generate", tiny, "-p", "Once"]) == 0
    assert f" {speed:.1f} tokens/s" in capsys.readouterr().err
