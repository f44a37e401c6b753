"""Lines of an answer end between words, whatever its parts and its characters; the screen is pyte's."""

import random
import textwrap

import pyte
import pytest

from pocketlm.chat.wrapping import Wrapper

WORDS = ["a", "to", "fox", "tale", "don't", "well-known", "é", "naïve", "Zażółć", "extraordinarily", "x" * 30, "x" * 75]


def screen(parts: list[str], width: int) -> list[str]:
    """What stands on a terminal of `width` columns after the parts, line by line."""
    shown = pyte.Screen(width, 400)
    shown.set_mode(pyte.modes.LNM)  # a newline goes to the first column, as behind a terminal driver
    stream, wrapper = pyte.Stream(shown), Wrapper(lambda: width)
    for part in parts:
        stream.feed(wrapper.push(part))
    return "\n".join(line.rstrip() for line in shown.display).rstrip("\n").split("\n")


def cut(text: str, dice: random.Random) -> list[str]:
    places = sorted(dice.sample(range(len(text) + 1), min(len(text), dice.randrange(1, 40))))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("seed", range(30))
def test_words_stand_where_textwrap_puts_them(seed):
    dice = random.Random(seed)
    width = dice.choice((8, 20, 41, 80, 120))
    paragraphs = [" ".join(dice.choices(WORDS, k=dice.randrange(1, 60))) for _ in range(3)]
    wrapped = [line for text in paragraphs for line in textwrap.wrap(text, width - 1, break_on_hyphens=False)]
    parts = cut("\n".join(paragraphs), dice)
    found = screen(parts, width)
    if all(len(word) < width for text in paragraphs for word in text.split()):
        assert found == wrapped
    else:  # textwrap fills a line up with the first part of a word that is longer than a line; here it begins a new one
        assert " ".join(found).split() != []
        assert "".join("".join(found).split()) == "".join("".join(paragraphs).split())
        assert max(map(len, found)) < width


def test_scripts_of_wide_characters_fill_their_lines():
    text = "今日は天気がいいから散歩しましょう" * 3
    assert [line.replace(" ", "") for line in screen(list(text), 21)] == textwrap.wrap(text, 10)


def test_a_wider_terminal_is_noticed():
    widths = [10]
    wrapper = Wrapper(lambda: widths[0])
    assert wrapper.push("one two three") == "one two t\x1b[1D\x1b[K\nthree"
    widths[0] = 40
    assert wrapper.push(" four five six") == " four five six"


def test_lines_of_the_answer_itself_stay():
    assert screen(["- one\n- ", "two\n\n\ttab"], 20) == ["- one", "- two", "", "        tab"]
