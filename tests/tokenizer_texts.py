"""Texts for the tokenizer tests: random mixtures of what people, programs and hostile files write."""

import io
import random
import unicodedata
from collections.abc import Sequence
from typing import Any

import pytest

PROSE = """\
Once upon a time there was a little girl named Lily, who loved to play outside. One day she saw a big, red ball!
She didn't know whose ball it was, so she'd ask: "Is this yours?" It's 3.14 or 1,234,567 or 2024-05-17, they've said.
Bir varmış bir yokmuş, küçük bir kız varmış; İstanbul'da güneşli bir gün, ağaçların altında ığdır çayı içmiş. ŞÜKÜR!
Dawno, dawno temu żyła sobie mała dziewczynka. Zażółć gęślą jaźń, pchnąć w tę łódź jeża lub ośm skrzyń fig.
Жила-была маленькая девочка, и звали её Лиля. Съешь же ещё этих мягких французских булок, да выпей чаю; объём №5.
从前有一个小女孩，她的名字叫莉莉。我想在苹果公司工作！今天天气很好，我们去公园玩吧。二〇二四年五月十七日。
ウィキペディアは百科事典です。 안녕하세요, 오늘 날씨가 좋네요. Ελληνικά: καλημέρα κόσμε. עברית שלום، العربية مرحبا
def add(a: int, b: int) -> int:\n    return a + b  # sum\n\nfor (let i = 0; i < n; ++i) {\n\tconsole.log(`${i}\\n`);\n}
<html><body class="x">&nbsp;</body></html> SELECT * FROM t WHERE id >= 10; x^2 + y_1 == ~z | w && !v; C:\\dir\\file.txt
"""
EMOJI = [
    "😀", "🚀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "✅", "🇹🇷", "🇵🇱", "❤️", "🦙.cpp",
    "😶‍🌫️", "①", "ﬁ", "Å", "e\u0301", "½", "ｆｕｌｌ　ｗｉｄｔｈ", "İ", "ß",
]  # fmt: skip
SPACES = [
    " ", "  ", "   ", " " * 7, " " * 40, "\n", "\n\n", "\r\n", "\t", "\t\t ", " \n ",
    "\u00a0", "\u3000", "\u2003", "\u200b", "\ufeff", "▁", "▁▁",
]  # fmt: skip
CONTROLS = [chr(i) for i in (*range(0x20), *range(0x7F, 0xA0))]
CONTRACTIONS = ["'s", "'t", "'RE", "'Ve", "'m", "'LL", "'d", "'", "''", "I'm ", "'ſ"]


def settled(code: int) -> bool:
    """Whether every Unicode version since 3.2 says the same of a character, so that the libraries' tables agree."""
    return unicodedata.category(chr(code)) == unicodedata.ucd_3_2_0.category(chr(code)) != "Cn"


def _of_every_plane() -> list[str]:
    chosen = random.Random(1)
    codes = [code for plane in (0, 1, 2, 14) for code in range(plane << 16, (plane + 1) << 16) if settled(code)]
    codes = [code for code in codes if not 0xD800 <= code <= 0xDFFF]
    others = [(plane << 16) + low for plane in range(4, 17) for low in (0, 0x1234, 0xFFFD)]
    return [chr(code) for code in chosen.sample(codes, 3000) + others + [0x30000, 0x30ABC, 0xFFFD, 0x10FFFD]]


PLANES = _of_every_plane()
WORDS = [word for line in PROSE.split("\n") for word in line.split(" ")]


def texts(n: int, seed: int, markers: Sequence[str] = ()) -> list[str]:
    """`n` different random texts of up to some hundred characters; `markers` are strewn in."""
    chance = random.Random(seed)
    lines = PROSE.split("\n")

    def piece() -> str:
        kind = chance.random()
        if kind < 0.30:
            return chance.choice((" ", "")) + chance.choice(WORDS)
        if kind < 0.36:
            line = chance.choice(lines)
            start = chance.randrange(len(line) + 1)
            return line[start : start + chance.randrange(60)]
        if kind < 0.46:
            return chance.choice(SPACES)
        if kind < 0.54:
            return chance.choice(EMOJI)
        if kind < 0.62:
            return "".join(chance.choices(PLANES, k=chance.randrange(1, 5)))
        if kind < 0.66:
            return chance.choice(CONTROLS)
        if kind < 0.72:
            return str(chance.randrange(10 ** chance.randrange(1, 9)))
        if kind < 0.77:
            return chance.choice(CONTRACTIONS)
        if kind < 0.82:
            return chance.choice((*PLANES, *WORDS, *"aA 0.!="))[:1] * chance.randrange(1, 30)
        if kind < 0.88 and markers:
            marker = chance.choice(markers)
            return marker[: chance.randrange(len(marker))] if chance.random() < 0.3 else marker
        return "".join(chance.choices("abcdefghijklmnopqrstuvwxyz .,ABC123\n", k=chance.randrange(1, 15)))

    made: dict[str, None] = {"": None, " ": None}
    while len(made) < n:
        made["".join(piece() for _ in range(chance.randrange(1, 12)))] = None
    return list(made)


def train_sentencepiece(lines: Sequence[str], vocab_size: int, **options: Any) -> bytes:
    """A `.model` that sentencepiece learns from the lines; skips the test where it is not installed."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is what is compared with")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, minloglevel=2,
        num_threads=1, hard_vocab_limit=False, **{"model_type": "bpe", **options},
    )  # fmt: skip
    return model.getvalue()
