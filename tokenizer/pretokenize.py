"""Pre-tokenizers of byte-level BPE: one table, name → regular expressions that cut a text into words.

In: a text. Out: its words; nothing is lost, what no expression matches is a word of its own. Knows no ids.
The names are those of `tokenizer.ggml.pre`; the same table maps the `pre_tokenizer` of a Hugging Face
`tokenizer.json`, whose expressions are compared as text and never run when they are not known here.
"""

from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any

from pocketlm.errors import FileError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Single digits first and then the GPT-2 expression on what is between them: there a text ends before each digit.
_DIGITS_GPT2 = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + _WORDS + r"\p{N}" + _REST
_WITH_MARKS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Words end before a capital: as the models' own files say it, also where llama.cpp takes only A-Z for capitals.
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_START, _AND_LINES = r"[^\r\n\p{L}\p{N}]?", r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = f"{_START}{_UPPER}*{_LOWER}+%s|{_START}{_UPPER}+{_LOWER}*%s|"
_NOT_PUNCTUATION = " ?[^(\\s|.,!?…。，、।۔،)]+"

# Names that share a row are other models' names for the same words.
_ROWS: dict[str, tuple[str, ...]] = {
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat mellum exaone4 a.x-4.0": (_GPT2,),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe glm4 chatglm-bpe": (_LLAMA3,),
    "qwen2 stablelm2 hunyuan deepseek-r1-qwen megrez kormo solar-open grok-2": (_QWEN2,),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": (_DIGITS_GPT2,),
    "qwen35": (_CONTRACTIONS + "|" + _WITH_MARKS,),
    "nanochat": (  # digits in twos; no other library knows it by a name
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "ufakzeka": (_QWEN2.removeprefix(_CONTRACTIONS + "|"),),  # Turkish: 'da and 'nin stay at their word
    "tekken": (_CASED % ("", "") + r"\p{N}" + _AND_LINES,),
    "gpt-4o llama4 kanana2 minimax-m2": (_CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?") + r"\p{N}{1,3}" + _AND_LINES,),
    "deepseek-v3 hunyuan-dense": (
        r"\p{N}{1,3}", "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    ),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "bloom poro-chat gpt3-finnish": (_NOT_PUNCTUATION,),
    "viking": (_NOT_PUNCTUATION, r"\p{N}"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
PRE_TOKENIZERS = {name: patterns for names, patterns in _ROWS.items() for name in names.split()}
# A word that is a token as a whole is taken as it is, whatever the merges say; and a text begins with the first marker
# unless the file says otherwise (llama.cpp).
WHOLE_WORDS_FIRST = frozenset(
    ["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"]
)

# Other ways to write the same expressions, as files from elsewhere do → name; the table's own are known as they are.
OTHER_WRITINGS = {
    # OpenAI's gpt2 and r50k_base
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""": "gpt-2",
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""": "gpt-2",
}


def name_of_patterns(*patterns: str) -> str | None:
    """The name of the pre-tokenizer that is exactly these expressions, one after the other; None where none is."""
    written = tuple(pattern.replace("\r", r"\r").replace("\n", r"\n") for pattern in patterns)
    own = (name for name, own in PRE_TOKENIZERS.items() if own == written)
    return next(own, OTHER_WRITINGS.get(patterns[0]) if len(patterns) == 1 else None)


def check_name(name: str, path: object) -> None:
    """FileError unless `name` is a pre-tokenizer of the table."""
    if name not in PRE_TOKENIZERS:
        raise FileError(path, f"its pre-tokenizer {name[:80]!r} is not known", "known are " + ", ".join(PRE_TOKENIZERS))


def matches_all(name: str) -> bool:
    """Whether a pre-tokenizer is one expression that leaves no character out."""
    return len(PRE_TOKENIZERS[name]) == 1 and PRE_TOKENIZERS[name][0].endswith(r"|\s+")


@cache
def splitter(name: str) -> Callable[[str], list[str]]:
    """The function text → words of a pre-tokenizer of the table."""
    import regex

    first, *others = (regex.compile(pattern) for pattern in PRE_TOKENIZERS[name])
    if matches_all(name):
        return first.findall

    def split(text: str) -> list[str]:
        words = [text]
        for pattern in (first, *others):
            words = list(chain.from_iterable(_isolate(pattern, word) for word in words))
        return words

    return split


def _isolate(pattern: Any, text: str) -> list[str]:
    """The matches of `pattern` and what is between them, in order."""
    pieces, end = [], 0
    for match in pattern.finditer(text):
        if match.start() > end:
            pieces.append(text[end : match.start()])
        pieces.append(match.group())
        end = match.end()
    if end < len(text):
        pieces.append(text[end:])
    return pieces
