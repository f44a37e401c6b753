"""The model that comes with the package, and the recipe that made it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pocketlm
from pocketlm.models.small_talk.baselines import kneser_ney
from pocketlm.models.small_talk.conversations import UNWANTED, by_hand, sentence

MODEL = Path(pocketlm.__file__).parent / "models" / "small-talk.gguf"


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        ("im good haha how r u", "I'm good how are you."),
        ("what are you doing today", "What are you doing today?"),
        ("THAT IS SO COOL!!!", "That is so cool!"),
        ("so... i dont know :)", "So, I don't know."),
        ("“hi”  he said", '"hi" he said.'),
        ("привет", ""),
        (":D", ""),
    ],
)
def test_messages_become_written_english(typed: str, written: str) -> None:
    assert sentence(typed) == written


def test_conversations_by_hand_are_whole_sentences_and_always_the_same() -> None:
    conversations = list(by_hand(200, 1))
    assert conversations == list(by_hand(200, 1))
    for turns in conversations:
        assert len(turns) % 2 == 0
        assert all(answer[0].isupper() and answer[-1] in ".!?" for answer in turns[1::2])
    assert not UNWANTED.search("The weather is nice.")


def test_kneser_ney_gives_probabilities() -> None:
    random = np.random.default_rng(1)
    ids = random.zipf(1.5, 4000) % 30
    bits = kneser_ney(ids[:-1], ids[1:], 32)
    for before in (0, 1, 7, 31):  # 31 was never seen
        rows = [bits(np.array([before]), np.array([after])) for after in range(32)]
        assert sum(2.0 ** -single for single, _ in rows) == pytest.approx(1.0)
        assert sum(2.0 ** -both for _, both in rows) == pytest.approx(1.0)


def test_pocket_is_small_says_who_it_is_and_stops_by_itself() -> None:
    assert MODEL.stat().st_size <= 4_000_000
    with pocketlm.load(MODEL) as model:
        assert model.name == "Pocket"
        assert model.metadata["general.license"] == "mit"
        for question, part in (("Who are you?", "Pocket"), ("Hi", "!"), ("How are you?", "?")):
            pieces = list(model.chat([{"role": "user", "content": question}], temperature=0, max_tokens=60))
            answer = "".join(piece.text for piece in pieces)
            assert pieces[-1].finish_reason == "stop"
            assert part in answer
            assert answer[-1] in ".!?"
