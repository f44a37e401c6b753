"""A draft is tried where it brings all who share the pass more than the longer pass costs them."""

import random
from array import array

import numpy as np
import pytest
from fake_executor import FakeExecutor

from pocketlm.runtime import engine as engine_module
from pocketlm.runtime.drafts import LONGEST, SHORTEST, Drafts, Odds
from pocketlm.runtime.engine import Engine
from pocketlm.runtime.generator import NoText, generate
from pocketlm.runtime.pass_times import TILE, WORTH, Company, PassTimes
from pocketlm.runtime.sampling import make_sampler
from pocketlm.runtime.session import Session


class Fed(PassTimes):
    """Passes take what they are said to take, whatever is measured."""

    def __init__(self, seconds):
        super().__init__()
        self._of = seconds


def in_tiles(n):
    """A processor that computes more slowly than it reads weights, as kernels in tiles of 8 make it."""
    return [0, 1.0, 1.1, 1.5, 1.5, 2.6, 2.6, 2.6][n % TILE] + n // TILE * 2.6


SURE = [0.97**n for n in range(1, LONGEST + 1)]


@pytest.mark.parametrize(("others", "length"), [(0, 7), (1, 6), (7, 0), (15, 0)])
def test_who_shares_a_pass_shares_its_cost(others, length):
    assert Company(Fed(in_tiles), others).best_length(SURE) == length


def test_a_tile_that_is_not_full_is_filled_up_however_many_share_it():
    assert Company(Fed(lambda n: 1.0 if n <= 4 else 9.0), 2).best_length(SURE) == 1
    assert Company(Fed(lambda n: -(-n // 8)), 5).best_length(SURE) == 2


def test_where_weights_are_all_that_counts_everybody_drafts():
    assert Company(Fed(lambda n: 1.0 + n / 1000), 7).best_length(SURE) == LONGEST


def test_the_choice_makes_all_together_fastest():
    """Beside the tokens a second of all texts, reckoned from single passes."""
    rng = random.Random(1)
    for _ in range(300):
        tile = sorted(rng.uniform(1, 4) for _ in range(4))
        seconds = {n: n // 8 * tile[3] + (tile[(n % 8 - 1).bit_length()] if n % 8 else 0) for n in range(1, 33)}
        fed, right = Fed(seconds.__getitem__), rng.random()
        others = rng.randrange(16)
        chances = [right**n for n in range(1, LONGEST + 1)]

        def rate(n, others=others, seconds=seconds, right=right):
            brings = 1 + sum(right**i for i in range(1, n + 1))
            return (others + brings) / seconds[1 + others + n]

        chosen = Company(fed, others).best_length(chances)
        assert rate(chosen) >= (rate(0) if chosen else max(map(rate, range(LONGEST + 1))) / (1 + WORTH / (1 + others))) - 1e-9
        assert chosen == 0 or rate(chosen) > max(map(rate, range(LONGEST + 1))) - 1e-9


def test_what_was_not_measured_again_is_forgotten():
    found = PassTimes()
    for tokens in (1, 2, 4, 8):
        found.measured(tokens, 1.0 if tokens == 1 else 50.0)
    for _ in range(20):
        found.measured(1, 1.0)
        assert Company(found).best_length(SURE) == 0
    for _ in range(1000):
        found.measured(1, 1.0)
    assert Company(found).best_length(SURE) == LONGEST


def test_it_becomes_what_is_measured():
    found = PassTimes()
    for _ in range(200):
        for tokens in (1, 3, 8, 16, 17):
            found.measured(tokens, 0.5 + tokens / 4)
    for tokens, more in ((1, 3), (1, 8), (8, 16), (8, 17), (3, 17)):
        assert abs(found.ratio(tokens, more) / ((0.5 + more / 4) / (0.5 + tokens / 4)) - 1) < 0.2
    assert found.ratio(3, 4) == 1, "both fill the same kernel"
    assert 2 > found.ratio(17, 25) > 1.2, "what is not known is reckoned from what is near"


def test_nothing_measured_is_what_is_usual():
    assert Company(PassTimes()).best_length(SURE) == LONGEST
    assert Company(PassTimes()).best_length([0.1] * LONGEST) == 0
    cold = PassTimes()
    cold.measured(1, 1.0)
    cold.measured(1, 1000.0)  # a machine that stood still
    assert Company(cold).best_length(SURE) == LONGEST


def queued(engine, cache, ids, rows):
    """Somebody's tokens, which the next pass takes along."""
    engine._queue.append(engine_module._Request(cache, np.array(ids, np.int32), rows, lambda logits: None))


def test_the_engine_knows_who_shared_the_last_pass_and_measures_passes_with_logits_of_every_token():
    executor = FakeExecutor()
    engine, seen = Engine(executor), []
    engine.times.measured = lambda tokens, seconds: seen.append(tokens)
    a, b, c = (Session(executor, engine, executor.new_cache()) for _ in range(3))
    a.advance([1, 2, 3])
    assert a.company()[1:] == (0,)
    assert b.company()[1:] == (3,)
    assert seen == []
    a.append(4)
    queued(engine, b.cache, [1, 2, 3], 3)
    queued(engine, c.cache, [1], 1)
    a.append(5, [6, 7])
    assert executor.passes[-1] == [3, 1, 3]
    assert seen == [1, 7]
    assert a.company() == Company(engine.times, 4)
    queued(engine, b.cache, [1, 2, 3], 1)  # a prompt
    a.append(5)
    assert seen == [1, 7]


@pytest.mark.parametrize("others", [0, 7])
def test_an_answer_drafts_alone_and_not_in_company_that_it_would_slow_down(others):
    executor = FakeExecutor(n_vocab=130, choose=lambda ids: 60 + len(ids) % 4)
    executor.same_bits = True
    session, fed = Session(executor), Fed(in_tiles)
    session.engine.company = lambda cache: Company(fed, others)
    sampler = make_sampler(n_vocab=130, temperature=0)
    *pieces, last = generate(session, [60, 61, 62, 63] * 3, sampler, NoText(), max_tokens=100)
    assert [piece.id for piece in pieces] == [60 + i % 4 for i in range(100)]
    assert (last.drafted_tokens > 50) == (not others)
    assert others == 0 or set(map(sum, executor.passes[1:])) == {1}


def test_a_draft_is_as_long_as_there_is_room():
    odds, asked = Odds(), []
    for _ in range(99):
        for match in range(SHORTEST, 30):
            odds.note(match, True)

    def company():
        asked.append(1)
        return Company(Fed(in_tiles))

    drafts, text = Drafts(odds), array("i", [4, 5, 6, 7, 8, 9, 10, 11, 12, 4, 5, 6])
    assert drafts.after(text, 100, company) == [7, 8, 9, 10, 11, 12, 4]
    assert drafts.after(text, 5, company) == [7, 8, 9, 10, 11]
    assert drafts.after(text, 0, company) == []
    assert drafts.after(array("i", [1, 2, 3, 4]), 100, company) == []
    assert len(asked) == 2, "it is asked only where there is something to draft"


@pytest.mark.parametrize(("right", "after"), [(0.4, 20), (0.6, 2)])
def test_passes_in_a_row_end_only_for_a_draft_that_is_likely(right, after):
    odds, text = Odds(), array("i", [4, 5, 6, 7, 4, 5])
    odds._right = [right] * 3 + [0.9] * 4  # a match of two gets to four, where a draft pays, once in six times, or in three
    drafts = Drafts(odds)
    assert drafts.after(text, 20, lambda: Company(Fed(lambda n: 0.5 + n / 2))) == []
    assert drafts.may_pay_after(lambda: Company(Fed(lambda n: 0.5 + n / 2)), 20) == after
