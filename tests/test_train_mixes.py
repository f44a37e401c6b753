"""Mixes of texts: shares, stages and patterns, and the mixes that cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from small_runs import content, errors, folder, train  # noqa: F401

from pocketlm.errors import UsageError
from pocketlm.train.batches import Feed, read_mix
from pocketlm.train.data import Corpus

pytestmark = pytest.mark.usefixtures("one_torch_thread")


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
