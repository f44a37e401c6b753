"""Lines of an answer end between words, whatever its parts and its characters; the screen is pyte's."""

import random
import textwrap

import pyte
import pytest

from pocketlm.chat.slash_commands import COMMANDS
from pocketlm.chat.wrapping import Wrapper, wrapped

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


# ---- whole texts: notes, the help, errors


@pytest.mark.parametrize("seed", range(30))
def test_a_whole_text_stands_where_textwrap_puts_it(seed):
    dice = random.Random(seed)
    width, indent = dice.choice((8, 20, 41, 80, 120)), dice.choice((0, 0, 3))
    paragraphs = [" ".join(dice.choices(WORDS[:-1], k=dice.randrange(1, 60))) for _ in range(3)]
    options = {"break_on_hyphens": False, "break_long_words": True, "subsequent_indent": " " * min(indent, (width - 1) // 2)}
    wanted = [line for text in paragraphs for line in textwrap.wrap(text, width - 1, **options)]
    found = wrapped("\n".join(paragraphs), width, indent).split("\n")
    if all(len(word) + indent < width for text in paragraphs for word in text.split()):
        assert found == wanted
    assert max(map(len, found)) < width
    assert "".join("".join(found).split()) == "".join("".join(paragraphs).split())


def test_a_table_keeps_its_columns_where_there_is_room():
    row = "/temp [X]   temperature; 0 always takes the likeliest token"
    assert wrapped(row, 40, 12) == "/temp [X]   temperature; 0 always takes\n            the likeliest token"
    assert wrapped(row, 20, 12) == "/temp [X]\n  temperature; 0\n  always takes the\n  likeliest token"
    assert wrapped(row, 80, 12) == row


def test_wide_characters_count_twice():
    assert wrapped("今日は天気がいい", 9) == "今日は天\n気がいい"
    assert wrapped("née " * 3, 12) == "née née née"


@pytest.mark.parametrize("columns", [24, 40, 61])
def test_at_a_terminal_no_word_of_the_program_is_broken(columns, terminal):
    shown = terminal(size=(200, columns))
    shown.prompt(1)
    shown.type("/help\r")
    shown.prompt(2)
    shown.type("/tmep 1\r")
    shown.prompt(3)
    shown.type("fail\r")
    shown.prompt(4)
    words = {word for line in shown.text().splitlines() for word in line.split()}
    said = [command.help for command in COMMANDS.values()]
    said += ["/help lists the commands · Ctrl-C stops an answer", "1 M parameters · 2 MB · numpy · 2 threads · context 100"]
    said += ["is no command, did you mean /temp?; /help lists", "pocketlm: the prompt has 101 tokens but the context holds"]
    assert {word for text in said for word in text.split() if len(word) < columns - 1} <= words
    assert max(len(line) for line in shown.text().splitlines()) < columns
    shown.leave()
