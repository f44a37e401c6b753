"""Regular expressions as masks, against Python's `re`; choices; numbers between bounds against `decimal`."""

import math
import random
import re
import sys
from decimal import Decimal
from itertools import product

import pytest
from constraining import END_ID, TOKENS, check_exactly, masks_of, reads, walk, write

from pocketlm.constrain import patterns
from pocketlm.constrain.automaton import build
from pocketlm.constrain.grammar import Choice, Grammar
from pocketlm.constrain.masks import Masks
from pocketlm.constrain.numbers import DIGITS, Bounds, above, fixed, integers, numbers
from pocketlm.constrain.states import WHOLE
from pocketlm.constrain.vocabulary import Vocabulary
from pocketlm.errors import UsageError

LETTERS = "ab1é日🙂 .\n"
CLASSES = (
    "[ab]",
    "[^a]",
    "[a-c1-3]",
    r"\d",
    r"\w",
    r"\s",
    r"\D",
    r"\W",
    r"\S",
    ".",
    "[é-ü]",
    "[🙂-🙏a]",
    r"[\d.]",
    r"[^\s]",
    r"\n",
    r"[\]\-a]",
)


def masks_for(node, of="regex"):
    return masks_of(Grammar(node, {}, of))


def masks_or_none(node):
    try:
        return masks_for(node)
    except UsageError:  # no text can be that
        return None


def random_pattern(rng, depth=3):
    kind = rng.randrange(8) if depth else 0
    if kind <= 1:
        return re.escape(rng.choice(LETTERS)) if rng.random() < 0.6 else rng.choice(CLASSES)
    if kind <= 4:
        return "".join(random_pattern(rng, depth - 1) for _ in range(rng.randrange(1, 4)))
    if kind == 5:
        return f"({'?:' * rng.randrange(2)}{'|'.join(random_pattern(rng, depth - 1) for _ in range(rng.randrange(1, 4)))})"
    low = rng.randrange(3)
    times = rng.choice(("*", "+", "?", "*?", f"{{{low}}}", f"{{{low},}}", f"{{{low},{low + rng.randrange(4)}}}", "{0,40}"))
    return f"(?:{random_pattern(rng, depth - 1)}){times}"


@pytest.mark.parametrize("seed", range(8))
def test_patterns_are_read_as_re_reads_them(seed):
    rng, refused = random.Random(seed), 0
    for _ in range(60):
        pattern = random_pattern(rng)
        masks = masks_or_none(patterns.whole(pattern))
        if masks is None:  # [^…] of everything
            continue
        judge = re.compile(pattern, re.ASCII)
        for _ in range(12):
            text = "".join(rng.choice(LETTERS) for _ in range(rng.randrange(9)))
            assert reads(masks, text) == bool(judge.fullmatch(text)), (pattern, text)
        for _ in range(3):
            try:
                text = walk(masks, rng, steps=12)
            except UsageError:  # it can be read in too many ways
                refused += 1
                break
            if text is not None:
                assert judge.fullmatch(text), (pattern, text)
                assert not write(masks, text, rng), pattern
    assert refused <= 2


@pytest.mark.parametrize(
    "pattern",
    [
        "[a-c]{2,40}x",
        "a{3}[ab]*",
        "(é|日|🙂){1,5}é?",
        "(ab|ba){2,3}a",
        "(a{2}b){1,4}c",
        ".{0,30}a.{30}",
        "(a+b?){2,4}",
        "(a*){2,3}b",
        "[^a]*a[^a]{0,2}",
        "[aé]{5}",
        "(|a)b",
        r"\w{1,3}(-\w{1,3})*",
        # what leaves the repeated part could go on in it, too
        "[ab]{2,9}a[ab1]{1,3}",
        "[ab]{3,7}[a1]{0,9}b",
        "[ab]{3,7}[b1]{0,9}a",
        "(a{2,5}[ab]{3,20}){2}1",
    ],
)
def test_a_mask_has_every_token_that_fits_and_no_other(pattern):
    """Where repetitions are counted, the mask comes from one walk for all counts."""
    masks, rng = masks_for(patterns.whole(pattern)), random.Random(1)
    for _ in range(6):
        check_exactly(masks, rng)


@pytest.mark.parametrize(
    "pattern",
    [
        "a*(ab|ba)*c",  # the same part, entered at two places
        "a*(ab|ba){0,5}c",
        "[ab]{2,9}a[abc]{1,3}",
        "(a{2,5}[ab]{3,20}){2}c",
        "(ab?){1,3}(c[ab]{2}){2,}",
    ],
)
def test_a_mask_has_every_short_text_that_fits(pattern):
    tokens = ["".join(letters).encode() for n in range(1, 6) for letters in product("abc", repeat=n)]
    masks = Masks(build(Grammar(patterns.whole(pattern), {}, "regex")), Vocabulary(tokens, [], len(tokens)), "regex")
    for text in (b"", b"a", b"b", b"ab", b"aa", b"aab", b"aba", b"abab", b"aabab", b"abcaa", b"abcab"):
        state = masks.advance(masks.start, text)
        if state and state != {WHOLE}:
            mask = masks.mask(state)
            found = set(mask.tolist() if mask.dtype != bool else (~mask).nonzero()[0].tolist())
            assert found == {id for id, data in enumerate(tokens) if masks.advance(state, data)}, text


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("^ab$", ["ab"], ["xab", "abx"]),
        ("ab", ["ab", "xxab", "aby", "é\nab\n"], ["a b", ""]),
        ("^a|b$", ["ax", "xb"], ["xa", "bx"]),
        ("^(?:a|b)+$", ["abab"], ["", "abc"]),
        ("b$", ["aab"], ["ba"]),
    ],
)
def test_a_pattern_of_a_schema_is_found_anywhere(pattern, yes, no):
    masks = masks_for(patterns.anywhere(pattern))
    assert [reads(masks, text) for text in yes] == [True] * len(yes)
    assert [reads(masks, text) for text in no] == [False] * len(no)


@pytest.mark.parametrize(
    ("pattern", "word"),
    [
        ("a(?=b)", "looking ahead"),
        ("(?<!a)b", "looking behind"),
        (r"(a)\1", r"\\1 is not"),
        (r"\bword", r"\\b is not"),
        ("(?i)a", "flags"),
        (r"\p{L}", r"\\p is not"),
        (r"\d\p{L}", r"'\\d\\p{L}', character 3"),
        ("a**", "two quantifiers"),
        ("*a", "nothing to repeat"),
        ("(a", "missing"),
        ("a)", "too many"),
        ("[a", "missing"),
        ("[b-a]", "backwards"),
        ("a{5,2}", "from 5 to 2"),
        ("a{999999999}", "100000 times"),
        ("(^a)", "outside of groups"),
        ("a^b", "beginning only"),
        ("a$b", "end only"),
        ("[]a]", "write"),
        ("a\\", "lone"),
        (r"\ud800", "Unicode"),
        ("a++", "possessive"),
        ("(" * 200 + ")" * 200, "groups in each other"),
        ("a" * 20_000, "10000 are possible"),
        ("[^\\s\\S]", "no text"),
        ("((a?b?){1000}c?){1000}", "too large"),
        (r"\xg1", "hexadecimal"),
        ("(?>a)", "atomic"),
        ("(?P=n)", "reference"),
        ("(?(1)a)", "condition"),
    ],
)
def test_what_is_not_supported_is_said_in_one_line(pattern, word):
    with pytest.raises(UsageError, match=word) as caught:
        masks_for(patterns.whole(pattern))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_what_would_take_too_long_is_refused():
    """A thousand places at once, each with a thousand counts."""
    masks = masks_for(patterns.whole("((a+b?){1,1000}c?){1,1000}d"))

    def write_many():
        state = masks.start
        for _ in range(400):
            masks.mask(state)
            state = masks.advance(state, b"a" * 12)

    with pytest.raises(UsageError, match="too many ways"):
        write_many()


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_mask_that_ended_with_an_error_leaves_nothing_half_made(monkeypatch, at):
    """The walk behind a counted part is kept for every count: of one that was broken off nothing may be."""
    tokens = [*TOKENS, b'a", "', b'b", "ab', b'ab","']
    grammar = Grammar(patterns.whole('"[a-z1é ]{0,40}", "[a-z ]{0,9}"'), {}, "regex")
    expected, masks = (Masks(build(grammar), Vocabulary(tokens, [END_ID], len(tokens)), "regex") for _ in range(2))
    texts = [b'"', b'"a', b'"ab', b'"ab", "', b'"ab", "a']
    walked, walks = Masks._walk, iter(range(1, 1000))

    def breaks_off(self, nodes, states):
        if next(walks) == at:
            raise UsageError("too many ways")
        return walked(self, nodes, states)

    def all_masks():
        for text in texts:
            masks.mask(masks.advance(masks.start, text))

    with monkeypatch.context() as patch:
        patch.setattr(Masks, "_walk", breaks_off)
        with pytest.raises(UsageError):
            all_masks()
    for text in texts:
        found, wanted = (each.mask(each.advance(each.start, text)) for each in (masks, expected))
        assert found.tolist() == wanted.tolist(), text


def test_choices():
    texts = ("yes", "no", "yes, but", "日本", "日本語", "a\nb")
    masks, rng = masks_for(Choice(texts)), random.Random(0)
    assert {walk(masks, rng) for _ in range(300)} == set(texts)
    assert all(not write(masks, text, rng) for text in texts for _ in range(20))
    assert not any(reads(masks, text) for text in ("ye", "yes,", "", "nono", "日"))
    many = masks_for(Choice(tuple("a" * n for n in range(1, 5000))))  # each is the beginning of the next
    assert reads(many, "a" * 4999)
    assert not reads(many, "a" * 5000)
    others = masks_for(Choice(texts, others=True))
    assert [reads(others, text) for text in (*texts, "ye", "", "yes, but not")] == [False] * len(texts) + [True] * 3


@pytest.mark.parametrize("pattern", [r"\S", r"[^\s]", r"[\S]", r"[^\sa]", r"[^\S]", r"\s", r"[\sa]"])
def test_white_space_is_no_other_character_for_anyone(pattern):
    """What is let through matches with `re.ASCII` and without; and all that is no white space is let through."""
    masks, plain, wide = masks_for(patterns.whole(pattern)), re.compile(pattern, re.ASCII), re.compile(pattern)
    for code in {*range(0x300), *range(0x1600, 0x3100), 0xFEFF, 0x1F642}:
        found, expected = reads(masks, chr(code)), [bool(one.fullmatch(chr(code))) for one in (plain, wide)]
        assert found == all(expected) or code == 0xFEFF, code
    assert not reads(masks, "\ufeff")  # for JavaScript


@pytest.mark.parametrize("pattern", [r"[\s\S]*", r"[\S\s]*", r"[a\s\Sb]*"])
def test_the_usual_word_for_any_text_is_any_text(pattern):
    masks = masks_for(patterns.whole(pattern))
    for text in ("a\u00a0b\n", "日\u3000本", "\x85\u2028 \t"):
        assert reads(masks, text)


@pytest.mark.parametrize("seed", range(6))
def test_numbers_between_bounds(seed):
    rng = random.Random(seed)

    def bound():
        if rng.random() < 0.25:
            return None
        return (
            Decimal(rng.randrange(-1200, 1200)).scaleb(-rng.randrange(4))
            if rng.random() < 0.8
            else Decimal(rng.randrange(-3, 3))
        )

    for _ in range(40):
        bounds = Bounds(bound(), bound())
        open_least, open_most = (b is not None and rng.random() < 0.5 for b in (bounds.least, bounds.most))
        for make in (integers, numbers):
            least, most = (None if b is None else int(b.scaleb(DIGITS)) for b in (bounds.least, bounds.most))
            least = above(least, make is integers) if open_least else least
            most = -above(-most, make is integers) if open_most else most
            masks = masks_or_none(make(Bounds(least, most)))
            tried = [Decimal(rng.randrange(-2500, 2500)).scaleb(-rng.randrange(5)) for _ in range(20)]
            tried += [
                b + d for b in (bounds.least, bounds.most) if b is not None for d in (0, Decimal("0.01"), Decimal("-0.01"))
            ]
            for number in tried:
                if make is integers and number % 1:
                    continue
                text = f"{int(number)}" if make is integers else f"{number:f}"
                if text.startswith("-0") and not number:
                    continue
                if bounds.least is None and bounds.most is None:
                    inside = True
                else:
                    low = bounds.least is None or number > bounds.least or (number == bounds.least and not open_least)
                    high = bounds.most is None or number < bounds.most or (number == bounds.most and not open_most)
                    inside = low and high
                assert (masks is not None and reads(masks, text)) == inside, (bounds, text)
            if masks is not None:
                text = walk(masks, rng, 6)
                assert text is not None
                assert len(text.partition(".")[0]) <= DIGITS + 1
                assert float(text) == float(Decimal(text))
                assert bounds.least is None or Decimal(text) >= bounds.least
                assert bounds.most is None or Decimal(text) <= bounds.most
                assert not open_least or float(text) > float(bounds.least)
                assert not open_most or float(text) < float(bounds.most)


def test_every_token_is_a_leaf_or_a_branch_of_the_tree():
    from constraining import VOCABULARY as tree

    for id, data in enumerate(TOKENS):
        node, spelled = int(tree.node_of[id]), b""
        while node:
            spelled = bytes([tree.byte[node]]) + spelled
            node = int(tree.parent[node])
        assert spelled == data
    assert not tree.node_of[len(TOKENS) :].any()
    assert sys.getsizeof(tree.byte) < 10_000


@pytest.mark.parametrize("bound", [0, 1, -1, 0.1, 0.3, -2.5, 1e-7, 3e-19, 123456789.125, 1e18, -(10**18)])
def test_what_is_read_as_an_open_bound_may_not_be_written(bound):
    """Whatever is near it, as floats are read; and all that is not read so may be."""
    low = masks_for(numbers(Bounds(above(fixed(bound), False), None)))
    high = masks_for(numbers(Bounds(None, -above(-fixed(bound), False))))
    for digits in range(DIGITS + 1):
        for step in (-1, 0, 1):
            number = Decimal(repr(bound)) + Decimal(step).scaleb(-digits)
            text = f"{number:f}"
            if len(text.partition(".")[2]) <= DIGITS and not (text.startswith("-") and not number):
                assert reads(low, text) == (float(text) > bound), text
                assert reads(high, text) == (float(text) < bound), text
    for masks, to in ((low, math.inf), (high, -math.inf)):
        text = f"{Decimal(repr(math.nextafter(bound, to))):f}"
        assert reads(masks, text) or len(text.partition(".")[2]) > DIGITS


@pytest.mark.parametrize("number", [0, -7, 0.1, -2.5, 1e-7, 3e-19, 123456789.125, 1e18, 10**18 + 1, -0.0])
def test_a_bound_is_exact(number):
    assert Decimal(fixed(number)).scaleb(-DIGITS) == Decimal(repr(number))


@pytest.mark.parametrize("number", [1.5e-19, 10**19, 1e20, -1e300, 5e-324])
def test_a_bound_of_too_many_digits_is_refused(number):
    with pytest.raises(UsageError, match="digits"):
        fixed(number)
