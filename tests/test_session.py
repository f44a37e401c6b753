"""A session: the cache always holds what was asked for, and no more is computed than that takes."""

import random

import numpy as np
import pytest
from fake_executor import FakeExecutor

from pocketlm.errors import PocketlmError, UsageError
from pocketlm.runtime.session import MIN_SHIFT, Session, _longest_match


def numbers(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(300) for _ in range(n)]


def holds(session: Session, ids: list[int]) -> bool:
    return session.ids == ids == session.executor.cache.ids


def common(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def test_any_walk_through_prompts_computes_only_what_is_new():
    rng, executor = random.Random(1), FakeExecutor()
    session, ids = Session(executor), []
    for _ in range(500):
        if ids and rng.random() < 0.5:
            id = rng.randrange(300)
            ids = [*ids, id]
            (logits,) = session.append(id)
        else:
            old, ids = ids, ids[: rng.randint(0, len(ids))] + numbers(rng, rng.randint(0, 20))
            ids = ids or [5]
            executor.fed.clear()
            logits, n_cached = session.advance(ids)
            assert n_cached == min(common(old, ids), len(ids) - 1)
            assert executor.fed == [len(ids) - n_cached]
        assert holds(session, ids)
        np.testing.assert_array_equal(logits, executor.logits(ids))


def test_a_prompt_that_is_in_the_cache_costs_its_last_token():
    executor = FakeExecutor()
    session = Session(executor)
    first, _ = session.advance([1, 2, 3])
    again, n_cached = session.advance([1, 2, 3])
    assert n_cached == 2
    assert executor.fed == [3, 1]
    np.testing.assert_array_equal(first, again)
    _, n_cached = session.advance([1, 2])
    assert n_cached == 1


def test_without_reuse_everything_is_computed_again():
    executor = FakeExecutor()
    session = Session(executor)
    session.advance(list(range(100)))
    executor.fed.clear()
    assert session.advance(list(range(100)), reuse_cache=False)[1] == 0
    assert executor.fed == [100]
    session.clear()
    assert holds(session, [])


def test_text_dropped_from_the_middle_leaves_the_cache_by_moving_what_follows():
    rng = random.Random(2)
    for _ in range(200):
        executor = FakeExecutor()
        session = Session(executor)
        a, dropped, b, new = (numbers(rng, n) for n in (rng.randint(0, 30), rng.randint(1, 80), rng.randint(MIN_SHIFT, 90), 9))
        header = numbers(rng, 3)  # turns begin alike
        session.advance([*a, *header, *dropped, *header, *b])
        executor.fed.clear()
        ids = [*a, *header, *b, *new]
        logits, n_cached = session.advance(ids, shift=True)
        assert n_cached == len(ids) - len(new)
        assert executor.fed == [len(new)]
        assert holds(session, ids)
        assert session.note == ""
        np.testing.assert_array_equal(logits, executor.logits(ids))


def test_what_follows_is_moved_up_to_where_it_stops_being_the_same():
    executor, rng = FakeExecutor(), random.Random(3)
    session = Session(executor)
    a, dropped, b, old_end, new_end = (numbers(rng, n) for n in (10, 20, 60, 8, 5))
    session.advance([*a, *dropped, *b, *old_end])
    assert session.advance([*a, *b, *new_end], shift=True)[1] == 70
    assert holds(session, [*a, *b, *new_end])


def test_a_prompt_that_only_happens_to_look_alike_is_computed_exactly():
    rng = random.Random(4)
    a, dropped, b = (numbers(rng, n) for n in (10, 20, 60))
    session = Session(FakeExecutor())
    session.advance([*a, *dropped, *b])
    assert session.advance([*a, *b])[1] == 10  # the caller did not say that text was dropped
    session.advance([*a, *dropped, *b[: MIN_SHIFT - 1]])
    assert session.advance([*a, *b[: MIN_SHIFT - 1], 1, 2], shift=True)[1] == 10  # too little to be worth it


def test_learned_positions_are_computed_again_with_a_note():
    rng = random.Random(5)
    a, dropped, b = (numbers(rng, n) for n in (10, 20, 60))
    executor = FakeExecutor(learned=True)
    session = Session(executor)
    session.advance([*a, *dropped, *b])
    logits, n_cached = session.advance([*a, *b], shift=True)
    assert n_cached == 10
    assert "positions are learned, so 60 tokens were computed again" in session.note
    assert holds(session, [*a, *b])
    np.testing.assert_array_equal(logits, executor.logits([*a, *b]))
    session.advance([*a, *b, 1])
    assert session.note == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, PocketlmError("NaN"), MemoryError])
def test_after_an_interrupt_anywhere_the_session_goes_on_as_if_it_had_not_happened(error):
    rng, executor = random.Random(6), FakeExecutor(n_vocab=4)  # few ids: much is in common by chance
    session = Session(executor)

    def fail(ids):
        executor.before = lambda ids: None
        del executor.cache.ids[rng.randint(0, executor.cache.length) :]  # what the executor has filled so far
        if len(executor.cache.ids) < len(session.ids):  # it never takes away what was there
            executor.cache.ids[:] = session.ids
        raise error

    for _ in range(300):
        ids = [rng.randrange(4) for _ in range(rng.randint(1, 12))]
        if rng.random() < 0.5:
            executor.before = fail
            with pytest.raises(type(error) if isinstance(error, Exception) else error):
                session.advance(ids) if rng.random() < 0.5 else session.append(ids[0])
        else:
            logits, _ = session.advance(ids)
            assert holds(session, ids)
            np.testing.assert_array_equal(logits, executor.logits(ids))
        assert executor.cache.ids[: len(session.ids)] == session.ids


def test_an_interrupt_in_the_middle_of_a_move_gives_up_what_was_moved():
    executor, rng = FakeExecutor(), random.Random(7)
    session, cache = Session(executor), executor.cache
    a, dropped, b = (numbers(rng, n) for n in (10, 20, 60))
    session.advance([*a, *dropped, *b])
    remove = cache.remove

    def interrupted(start, stop):
        cache.ids[start:stop] = [299] * (stop - start)  # half moved
        raise KeyboardInterrupt

    cache.remove = interrupted
    with pytest.raises(KeyboardInterrupt):
        session.advance([*a, *b], shift=True)
    cache.remove = remove
    assert session.advance([*a, *b], shift=True)[1] == len(a)
    assert holds(session, [*a, *b])


def test_a_long_prompt_can_be_cancelled_between_blocks_and_goes_on_from_there():
    executor, ids = FakeExecutor(), list(range(100)) * 15
    session = Session(executor)
    BLOCK, answers = executor.block, iter([False, False, True])
    assert session.advance(ids, cancelled=lambda: next(answers)) == (None, 0)
    assert holds(session, ids[: 2 * BLOCK])
    logits, n_cached = session.advance(ids)
    assert n_cached == 2 * BLOCK
    assert executor.fed == [BLOCK, BLOCK, len(ids) - 2 * BLOCK]
    np.testing.assert_array_equal(logits, executor.logits(ids))


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ([], UsageError, "empty"),
        ([1, 300], UsageError, "token 300"),
        ([1, -1], UsageError, "token -1"),
        ([1] * 51, PocketlmError, "51 tokens.* 50;.*--ctx"),
    ],
)
def test_a_prompt_that_cannot_be_computed_is_one_line_and_changes_nothing(ids, error, words):
    session = Session(FakeExecutor(n_ctx=50))
    session.advance([1, 2, 3])
    with pytest.raises(error, match=words):
        session.advance(ids)
    assert holds(session, [1, 2, 3])
    session.advance([1] * 50)


def test_longest_match_is_what_trying_every_place_gives():
    rng = random.Random(8)
    for _ in range(3000):
        alphabet = rng.randint(1, 3)
        pattern, text = ([rng.randrange(alphabet) for _ in range(rng.randint(0, 12))] for _ in range(2))
        best = max((common(pattern, text[i:]) for i in range(len(text))), default=0)
        start, n = _longest_match(pattern, text)
        assert n == best
        assert text[start : start + n] == pattern[:n]
