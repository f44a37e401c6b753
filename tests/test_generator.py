"""Generation: no text is lost, shown too early or twice, and every way to end leaves the session ready for the next prompt."""

import codecs
import itertools
import math
import pickle
import random
import threading
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, asdict, replace

import pytest
from fake_executor import FakeExecutor, mixed

from pocketlm.errors import PocketlmError, UsageError
from pocketlm.runtime import engine as engine_module
from pocketlm.runtime.generator import Piece, StopStrings, generate
from pocketlm.runtime.sampling import make_sampler
from pocketlm.runtime.session import Session

END = 256


@pytest.fixture(autouse=True)
def one_token_at_a_time(monkeypatch):
    """These look at what is there after every pass; test_bursts.py has several in a row."""
    monkeypatch.setattr(engine_module, "BURST_SECONDS", 0)


class Bytes:
    """A stream decoder whose ids are bytes; incomplete UTF-8 is held back."""

    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        return self.decoder.decode(bytes([id])) if id < 256 else ""

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


def greedy(n_vocab: int = 300):
    return make_sampler(n_vocab=n_vocab, temperature=0, repeat_penalty=1)


def saying(text: str | bytes, n_prompt: int = 3, **options) -> Session:
    """A session whose model answers any prompt of `n_prompt` tokens with `text` and the end token, again and again."""
    answer = [*(text.encode() if isinstance(text, str) else text), END]
    return Session(FakeExecutor(choose=lambda ids: answer[(len(ids) - n_prompt) % len(answer)], **options))


def answer(session: Session, ids: Sequence[int] = (1, 2, 3), **options) -> tuple[str, list[Piece]]:
    options = {"end_ids": {END}, **options}
    pieces = list(generate(session, ids, greedy(), Bytes(), **options))
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].id == -1
    assert pieces[-1].generated_tokens == len(pieces) - 1
    assert session.ids == session.executor.cache.ids
    return "".join(p.text for p in pieces), pieces


def random_text(rng: random.Random, n: int, alphabet: str = "ab") -> str:
    return "".join(rng.choice(alphabet) for _ in range(n))


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """By trying every end: the text before the stop string that is completed first, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def test_stop_strings_are_found_whatever_the_split_and_only_their_beginnings_are_held_back():
    rng = random.Random(1)
    for _ in range(5000):
        stops = [random_text(rng, rng.randint(1, 6)) for _ in range(rng.randint(1, 4))]
        text = random_text(rng, rng.randint(0, 40), rng.choice(["ab", "abc"]))
        matcher, shown, seen, stopped, at = StopStrings(stops), "", 0, False, 0
        while at < len(text) and not stopped:
            seen = at + rng.randint(0, 4)
            part, stopped = matcher.push(text[at:seen])
            shown, at = shown + part, seen
            if not stopped:
                beginnings = {s[:n] for s in stops for n in range(1, len(s))}
                held = max((b for b in beginnings if text[:seen].endswith(b)), key=len, default="")
                assert matcher.held == held
                assert shown + held == text[:seen]
        assert (shown + matcher.held, stopped) == cut(text, stops)


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("aaab", ["aab"], "a"),
        ("one\nUser: two", ["\nUser:", "\nSystem:"], "one"),
        ("one\nUse", ["\nUser:"], "one\nUse"),
        ("abcd", ["abcd", "bc"], "a"),  # the one completed first
        ("xabc", ["bc", "abc"], "x"),  # the longest of those completed together
        ("Zażółć gęślą", ["ść", "gęś"], "Zażółć "),
        ("stop", ["stop"], ""),
        ("a🙂b🙂c", ["🙂c"], "a🙂b"),
        ("abc", [], "abc"),
        ("abc", "c", "ab"),
    ],
)
def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(text, stops, shown):
    out, pieces = answer(saying(text), stop=stops)
    assert out == shown
    assert pieces[-1].finish_reason == "stop"


def test_text_and_stop_strings_together_are_what_one_string_would_give():
    rng = random.Random(2)
    for _ in range(400):
        alphabet = "aż🙂"
        stops = [random_text(rng, rng.randint(1, 4), alphabet) for _ in range(rng.randint(0, 3))]
        text = random_text(rng, rng.randint(0, 30), alphabet)
        max_tokens = rng.choice([None, rng.randint(0, 60)])
        said = text.encode()[:max_tokens]
        # bytes of a character that never comes whole are shown as one replacement character, as Python does
        expected, stopped = cut(said.decode("utf-8", "replace"), stops)
        out, pieces = answer(saying(text), stop=stops, max_tokens=max_tokens)
        assert out == expected
        ended = stopped or max_tokens is None or len(text.encode()) < max_tokens
        assert pieces[-1].finish_reason == ("stop" if ended else "length")


def test_every_token_has_a_record_and_the_last_one_has_the_counts():
    session = saying("Zażółć")
    out, pieces = answer(session)
    assert out == "Zażółć"
    assert [p.id for p in pieces] == [*"Zażółć".encode(), -1]
    assert [p.text for p in pieces[:4]] == ["Z", "a", "", "ż"]
    assert all(p.logprob == pytest.approx(-math.log(1 + 299 * math.exp(-10)), abs=1e-5) for p in pieces[:-1])
    assert math.isnan(pieces[-1].logprob)
    last = pieces[-1]
    assert (last.finish_reason, last.prompt_tokens, last.cached_tokens, last.note) == ("stop", 3, 0, "")
    assert last.prompt_seconds > 0
    assert last.generation_seconds > 0


def test_a_record_is_as_one_made_by_its_class():
    _, (record, *_) = answer(saying("abcdef"), max_tokens=2)
    same = Piece(record.text, record.id, record.logprob)
    assert (repr(record), hash(record), asdict(record)) == (repr(same), hash(same), asdict(same))
    assert record == same == pickle.loads(pickle.dumps(record))
    assert replace(record, note="!") == replace(same, note="!")
    with pytest.raises(FrozenInstanceError):
        record.id = 3  # type: ignore[misc]


def test_the_next_turn_costs_only_its_new_tokens():
    session = saying("Hello")
    answer(session)
    executor = session.executor
    assert executor.fed == [3, 1, 1, 1, 1, 1]
    executor.fed.clear()
    _, pieces = answer(session, [1, 2, 3, *b"Hello", END, 7, 8], max_tokens=0)
    assert pieces[-1].cached_tokens == 8
    assert executor.fed == [3]
    _, pieces = answer(session, [1, 2, 3, *b"Hello", END, 7, 8], max_tokens=0, reuse_cache=False)
    assert pieces[-1].cached_tokens == 0


def test_max_tokens_is_exact_and_computes_nothing_more():
    for n in (0, 1, 4):
        session = saying("Hello")
        out, pieces = answer(session, max_tokens=n)
        assert out == "Hello"[:n]
        assert pieces[-1].finish_reason == "length"
        assert session.executor.fed == [3, *[1] * (n - 1)]


def test_ignore_eos_goes_on_past_the_end_token():
    out, pieces = answer(saying("Hi"), ignore_eos=True, max_tokens=8)
    assert out == "HiHiHi"
    assert [p.id for p in pieces[:3]] == [*b"Hi", END]
    assert pieces[-1].finish_reason == "length"


def test_the_sampler_sees_prompt_and_answer():
    seen = []

    def sampler(logits, ids):
        seen.append(list(ids))
        return int(logits.argmax()), 0.0

    list(generate(saying("abc"), [1, 2, 3], sampler, Bytes(), end_ids={END}))
    assert seen == [[1, 2, 3, *b"abc"[:n]] for n in range(4)]


# ---- cancelling ---------------------------------------------------------------------------------------------------------


def test_another_thread_can_cancel_and_what_was_held_back_is_shown():
    cancel, session = threading.Event(), saying("abcabc")

    def from_elsewhere(ids):
        if session.executor.cache.length == 7:
            thread = threading.Thread(target=cancel.set)
            thread.start()
            thread.join()

    session.executor.before = from_elsewhere
    out, pieces = answer(session, cancel=cancel, stop=["cd"], ignore_eos=True)
    assert pieces[-1].finish_reason == "cancelled"
    assert out == "abca"
    answer(session, max_tokens=0)


def test_a_prompt_can_be_cancelled():
    cancel, session = threading.Event(), saying("abc")
    session.executor.before = lambda ids: cancel.set()
    out, pieces = answer(session, [1] * 2000, cancel=cancel)
    assert (out, len(pieces), pieces[-1].finish_reason) == ("", 1, "cancelled")
    assert session.executor.fed == [512]


def test_closing_the_generator_leaves_the_session_usable():
    session = saying("Hello")
    pieces = generate(session, [1, 2, 3], greedy(), Bytes(), end_ids={END})
    assert [next(pieces).text for _ in range(3)] == ["H", "e", "l"]
    pieces.close()
    assert session.ids == session.executor.cache.ids == [1, 2, 3, *b"He"]
    assert answer(session)[0] == "Hello"


def test_an_interrupted_step_leaves_the_session_usable():
    session = saying("Hello")

    def interrupt(ids):
        if ids == [*b"l"]:
            raise KeyboardInterrupt

    session.executor.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        answer(session)
    session.executor.before = lambda ids: None
    out, pieces = answer(session)
    assert out == "Hello"
    assert pieces[-1].cached_tokens == 2


# ---- a full context -----------------------------------------------------------------------------------------------------


def test_without_make_room_a_full_context_ends_the_answer_with_a_note():
    for make_room in (None, lambda: None, lambda: [9] * 10, list):  # the last two are no shorter prompt
        out, pieces = answer(saying("x" * 50, n_prompt=10, n_ctx=16), [9] * 10, make_room=make_room)
        assert out == "x" * 7  # six have a place in the cache, the last needs none
        assert pieces[-1].finish_reason == "length"
        assert pieces[-1].note == "the context of 16 tokens is full; raise --ctx or begin a new conversation"


def test_learned_positions_that_are_all_in_use_bring_no_advice_to_raise_the_context():
    _, pieces = answer(saying("x" * 50, n_prompt=10, n_ctx=16, learned=True), [9] * 10)
    assert pieces[-1].note == "the context of 16 tokens is full; begin a new conversation"


@pytest.mark.parametrize("learned", [False, True])
def test_when_the_context_is_full_the_answer_goes_on_with_a_shorter_prompt(learned):
    rng, n_ctx = random.Random(3), 120
    system, *turns = ([rng.randrange(256) for _ in range(n)] for n in (5, 30, 30, 30))
    whole, *prompts = ([*system, *itertools.chain(*turns[i:])] for i in range(3))
    session = Session(FakeExecutor(n_ctx=n_ctx, learned=learned, choose=lambda ids: 65 + mixed(ids) % 26))
    calls = []

    def make_room():
        calls.append(len(session.ids))
        return prompts[len(calls) - 1] if len(calls) <= len(prompts) else None

    pieces = list(generate(session, whole, greedy(), Bytes(), end_ids={END}, make_room=make_room))
    assert calls == [120, 120, 120]
    last = pieces[-1]
    assert last.finish_reason == "length"
    assert last.generated_tokens == n_ctx - len(prompts[1]) + 1
    assert last.prompt_tokens == 95
    assert "context of 120 tokens is full" in last.note

    # the same by hand: what the model sees is always a whole prompt and all of the answer so far
    said: list[int] = []
    for prompt in (whole, *prompts):
        while len(prompt) + len(said) <= n_ctx:
            said.append(65 + mixed([*prompt, *said]) % 26)
    assert [p.id for p in pieces[:-1]] == said
    blocks = [n for n in session.executor.fed[1:] if n > 1]
    assert blocks == ([30 + 30 + 26, 30 + 56] if learned else [])


def test_the_note_says_what_was_dropped_and_what_was_computed_again():
    session = Session(FakeExecutor(n_ctx=100, learned=True))
    rng = random.Random(4)
    a, dropped, b = ([rng.randrange(256) for _ in range(n)] for n in (10, 30, 40))
    _, pieces = answer(session, [*a, *dropped, *b], make_room=lambda: [*a, *b], max_tokens=40, end_ids=set())
    assert pieces[-1].generated_tokens == 40
    assert "cut from 80 to 50 tokens" in pieces[-1].note
    assert "learned, so 61 tokens were computed again" in pieces[-1].note


def test_turns_are_dropped_until_prompt_and_answer_fit():
    session = saying("x" * 300, n_prompt=10, n_ctx=100)
    prompts = iter([[1] * 95, [1] * 91, [1] * 40])
    _, pieces = answer(session, [1] * 97, make_room=lambda: next(prompts, None), max_tokens=20, ignore_eos=True)
    assert pieces[-1].generated_tokens == 20
    assert "cut from 97 to 40" in pieces[-1].note


# ---- errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "options", "error", "words"),
    [
        ([], {}, UsageError, "prompt is empty"),
        ([5000], {}, UsageError, "token 5000"),
        ([1] * 65, {}, PocketlmError, "65 tokens but the context holds 64.*--ctx"),
        ([1], {"stop": ["a", ""]}, UsageError, "stop"),
        ([1], {"stop": ""}, UsageError, "stop"),
        ([1], {"stop": [3]}, UsageError, "stop"),
        ([1], {"max_tokens": -1}, UsageError, "max_tokens is -1"),
        ([1], {"max_tokens": 1.5}, UsageError, "max_tokens is 1.5"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_line(ids, options, error, words):
    session = saying("x", n_ctx=64)
    with pytest.raises(error, match=words):
        next(iter(generate(session, ids, greedy(), Bytes(), **options)))
    assert session.executor.fed == []
