"""What every error promises of the names it quotes: one printable line, whatever a stranger's file calls its parts."""

import pickle
from pathlib import Path

import pytest
from gguf_bytes import file_fields, join, key

from pocketlm.errors import FileError, UsageError, quoted
from pocketlm.runtime.gguf_reader import parse
from pocketlm.tokenizer import NoTokenizer


@pytest.mark.parametrize(
    "name",
    ["", "a", "x" * 100, "x" * 101, "\0" * 25, "\0" * 26, "é" * 80, "😀" * 100, "a" * 96 + "😀b", "it's so\n" * 40],
    ids=lambda name: f"{name[:1]!a}-{len(name)}",
)
def test_a_quoted_name_has_at_most_100_printable_characters_and_no_half_escape(name):
    line = quoted(name)
    assert len(line) <= 100
    assert line.isascii()
    assert line.isprintable()
    start = line.removesuffix("...").encode().decode("unicode_escape")
    assert name.startswith(start)
    assert start == name or line.endswith("...")


def test_names_that_are_not_text_are_quoted_too():
    assert quoted(5) == "5"
    assert quoted(["a", None]) == "['a', None]"


@pytest.mark.parametrize("character", ["\0", "\x7f", "😀"])
def test_an_error_about_a_key_with_an_unprintable_name_stays_short(character):
    name = character * (120 // len(character.encode()))
    data = join(file_fields([key(name, "u32", 1), key(name, "u32", 1)], []))
    with pytest.raises(FileError) as error:
        parse(data, "model.gguf")
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("error", [UsageError("a"), FileError("a.gguf", "is torn", "mend it"), NoTokenizer(Path("b.gguf"))])
def test_an_error_says_the_same_in_another_process(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.__dict__) == (type(error), str(error), error.__dict__)


def test_an_error_is_one_printable_line_whatever_it_tells_of_a_file():
    error = FileError("a\nb", "gives 'x' the id \n\x1b[31m", "look at \x07")
    assert str(error) == r"a\nb: gives 'x' the id \n\x1b[31m; look at \x07"
