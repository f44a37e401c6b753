"""Compares vocabularies with their reference libraries on random texts, as many as there is time for.

    python tests/compare_tokenizers.py FOLDER [--count 1000000] [--only NAME …]   # the twelve
    python tests/compare_tokenizers.py FOLDER --names --count 20000               # every `tokenizer.ggml.pre`

Three vocabularies of sentencepiece, three of Hugging Face's tokenizers and one of tiktoken are trained into FOLDER; the four
of llama.cpp's own tests and SmolLM2's are used where they are. `--names` takes every name of a pre-tokenizer: a vocabulary
trained by tokenizers with the name's expressions, read as a GGUF's keys, and a small one that llama.cpp cuts by that name.
The vocabularies take turns, a batch each, and FOLDER keeps how far each came and its differences, cut down to the shortest
text that shows them: a run that was stopped goes on. Exit status 1 if there are differences.
"""

import argparse
import json
import os
import random
import sys
import time
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peer_tokenizers as peers
from make_vectors import add_markers
from peer_tokenizers import Reference
from tokenizer_texts import PROSE, WORDS, settled, texts, train_sentencepiece

from pocketlm import tokenizer
from pocketlm.errors import PocketlmError
from pocketlm.export.gguf_writer import copy_gguf
from pocketlm.model import find_model
from pocketlm.runtime.gguf_reader import open_gguf
from pocketlm.tokenizer.pretokenize import PRE_TOKENIZERS, WHOLE_WORDS_FIRST

BATCH = 2000
MINIMISED = 30  # differences of one vocabulary that are cut down and kept; the others are only counted
MARKERS = ["<|im_start|>", "<|im_end|>\n", "<|endoftext|>", "<s>", "</s>", "<unk>", "<sep>", "<|user|>", "<|end|>\n", "<0x41>"]
MARKERS_TRAINED = ["<|im_start|>", "<|endoftext|>"]
SYMBOLS = ["<|user|>", "<|assistant|>", "<sep>", "3", "▁▁", "ab", "ello"]
LINES = PROSE.split("\n") * 20 + [" ".join(random.Random(i).sample(WORDS, 8)) for i in range(600)] + texts(3000, 1)


class Pair(NamedTuple):
    """One vocabulary in our hands and in the reference's."""

    ours: tokenizer.Tokenizer
    theirs: Reference
    leave_out: Callable[[str], bool] = lambda text: False  # texts that the reference cannot be asked about


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────────

_CHARACTERS = [chr(code) for code in range(0x20000) if not 0xD800 <= code <= 0xDFFF and settled(code)]
_MARKS = [chr(code) for code in (*range(0x300, 0x370), 0x200C, 0x200D, 0xFE0F, 0x20E3, 0x0E33, 0x093C, 0x1F3FD)]
_PAPER = [line for line in PROSE.split("\n") if line]


def edited(rng: random.Random) -> str:
    """A line that somebody wrote, and then anything happened to it."""
    text = rng.choice(_PAPER)
    start = rng.randrange(len(text))
    letters = list(text[start : start + rng.randrange(1, 120)])
    for _ in range(rng.randrange(8)):
        at = rng.randrange(len(letters) + 1)
        other = rng.choice(_CHARACTERS)
        kind = rng.randrange(8)
        if kind == 0:
            letters[at:at] = other * rng.choice((1, 1, 2, 17))
        elif kind == 1:
            letters[at : at + rng.randrange(5)] = []
        elif kind == 2:
            letters[at:at] = rng.choices(_MARKS, k=rng.randrange(1, 5))
        elif kind == 3:
            letters[at : at + 1] = "".join(letters[at : at + 1]).swapcase()
        elif kind == 4:
            letters[at:at] = letters[at : at + rng.randrange(20)]
        elif kind == 5:
            letters[at:at] = rng.choice(MARKERS)
        elif kind == 6:
            letters[at:at] = rng.choice((" ", "\n", "\t", "\r\n", " \n ", "\u00a0")) * rng.choice((1, 2, 3, 9))
        else:
            letters[at:at] = rng.choices(_CHARACTERS, k=rng.randrange(1, 9))
    return "".join(letters)


def batch(number: int) -> list[str]:
    rng = random.Random(f"edited {number}")
    return [*texts(BATCH // 2, 1000 + number, MARKERS), *(edited(rng) for _ in range(BATCH // 2))]


# ── vocabularies ─────────────────────────────────────────────────────────────────────────────────────────────────────


def of_sentencepiece(folder: Path, **options: Any) -> Pair:
    path = folder / "tokenizer.model"
    if not path.exists():
        path.write_bytes(train_sentencepiece(LINES, 4000, **options))
    return Pair(tokenizer.load(path), peers.asked_of_sentencepiece(path.read_bytes()))


def of_tokenizers(folder: Path, name: str) -> Pair:
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.exists():
        normalizer = tokenizers.normalizers.NFC() if name == "qwen2" else None
        made = peers.byte_level(LINES, 6000, name, MARKERS_TRAINED, normalizer)
        add_markers(made)
        made.save(str(path))
    return Pair(tokenizer.load(path), peers.asked_of_tokenizers(tokenizers.Tokenizer.from_file(str(path))))


def of_tiktoken(folder: Path) -> Pair:
    path, pattern, n_ranks = folder / "ranks.tiktoken", PRE_TOKENIZERS["llama-bpe"][0], 1200
    if not path.exists():
        path.write_bytes(peers.trained_ranks(PROSE * 2 + "\n".join(texts(100, 2)), n_ranks, pattern))
    special = {"<|endoftext|>": n_ranks, "<|im_start|>": n_ranks + 1}
    theirs = peers.asked_of_tiktoken(peers.encoding(path.read_bytes(), pattern, special))
    return Pair(tokenizer.load(path, pattern="llama-bpe", special_tokens=special), theirs._replace(decode=None))


def of_llama_cpp(name: str) -> Pair:
    data = Path(os.environ.get("POCKETLM_TEST_DATA", Path(__file__).resolve().parents[2] / "shared"))
    path = data / "vectors" / f"ggml-vocab-{name}.gguf"

    def leave_out(text: str) -> bool:
        # llama.cpp strips ASCII white space after markers, Phi-3's own tokenizer all of it
        return name == "phi-3" and any(space in text for space in "\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000")

    return Pair(tokenizer.load(path), peers.asked_of_llama_cpp(path), leave_out)


def of_smollm2() -> Pair:
    path = find_model("smollm2")
    return Pair(tokenizer.load(path), peers.asked_of_tokenizers(peers.smollm2(path)))


def of_expressions(folder: Path, name: str) -> Pair:
    """Trained by tokenizers with the expressions of the name; ours reads the same vocabulary as a GGUF's keys."""
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.exists():
        pre, whole = peers.expressions(PRE_TOKENIZERS[name]), name in WHOLE_WORDS_FIRST
        peers.byte_level(LINES, 3000, pre, MARKERS_TRAINED, ignore_merges=whole).save(str(path))
    model = json.loads(path.read_text("utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    keys = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 2 + [1] * (len(tokens) - 2), "tokenizer.ggml.merges": merges,
    }  # fmt: skip
    return Pair(
        tokenizer.from_metadata(keys, path), peers.asked_of_tokenizers(tokenizers.Tokenizer.from_file(str(path)))
    )  # fmt: skip


def of_llama_cpp_name(folder: Path, name: str) -> Pair:
    """A small vocabulary whose words llama.cpp cuts by this name."""
    path = folder / "vocabulary.gguf"
    with open_gguf(Path(__file__).parent / "vectors" / "gguf-gpt-2.gguf") as file:
        keys = {key: value for key, value in file.metadata.items() if not key.startswith("pocketlm.")}
        with open(path, "wb") as out:
            copy_gguf(out, {**keys, "tokenizer.ggml.pre": name}, {})

    def leave_out(text: str) -> bool:  # where words end before capitals, llama.cpp knows letters of ASCII only, and no marks
        return name in CASED and any(unicodedata.category(c)[0] in "LM" and not c.isascii() for c in text)

    return Pair(tokenizer.load(path), peers.asked_of_llama_cpp(path)._replace(specials=(False,)), leave_out)


TWELVE: dict[str, Callable[[Path], Pair]] = {
    "sentencepiece, defaults, bytes": lambda folder: of_sentencepiece(folder, byte_fallback=True),
    "sentencepiece, unknown characters, folded case, symbols": lambda folder: of_sentencepiece(
        folder, character_coverage=0.985, normalization_rule_name="nfkc_cf", user_defined_symbols=SYMBOLS,
        add_dummy_prefix=False,
    ),
    "sentencepiece, across words, all spaces, single digits": lambda folder: of_sentencepiece(
        folder, byte_fallback=True, split_by_whitespace=False, split_by_unicode_script=False, split_digits=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", control_symbols=["<|control|>"],
    ),
    "tokenizers, gpt-2, space in front": lambda folder: of_tokenizers(folder, "gpt-2"),
    "tokenizers, llama-bpe": lambda folder: of_tokenizers(folder, "llama-bpe"),
    "tokenizers, qwen2, composed": lambda folder: of_tokenizers(folder, "qwen2"),
    "tiktoken, llama-bpe": of_tiktoken,
    "llama.cpp, gpt-2": lambda folder: of_llama_cpp("gpt-2"),
    "llama.cpp, starcoder": lambda folder: of_llama_cpp("starcoder"),
    "llama.cpp, llama-spm": lambda folder: of_llama_cpp("llama-spm"),
    "llama.cpp, phi-3": lambda folder: of_llama_cpp("phi-3"),
    "tokenizers, SmolLM2": lambda folder: of_smollm2(),
}  # fmt: skip

CASED = ("tekken", "gpt-4o", "llama4", "kanana2", "minimax-m2")
DISTINCT = {patterns: name for name, patterns in reversed(PRE_TOKENIZERS.items())}  # the first name of each row
NAMES: dict[str, Callable[[Path], Pair]] = {
    **{f"expressions of {name}": partial(of_expressions, name=name) for name in reversed(DISTINCT.values())},
    **{
        f"llama.cpp's {name}": partial(of_llama_cpp_name, name=name)
        for name in PRE_TOKENIZERS if name != "nanochat"  # which llama.cpp does not know
    },
}  # fmt: skip

# ── comparing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _or_error(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    try:
        return function(*arguments, **named)
    except (Exception, PocketlmError) as error:  # a panic of theirs is a BaseException and ends the run
        return f"{type(error).__name__}: {error}"


def difference(pair: Pair, text: str, special: bool) -> tuple[Any, Any] | None:
    """What we say and what they say of a text, None where it is the same."""
    theirs = _or_error(lambda: pair.theirs.encode([text], special)[0])
    ours = _or_error(pair.ours.encode, text, special=special)
    if ours != theirs:
        return ours, theirs
    if pair.theirs.decode is not None and isinstance(theirs, list):
        back, their_back = _or_error(pair.ours.decode, theirs), _or_error(pair.theirs.decode, theirs)
        if back != their_back:
            return back, their_back
    return None


def shortest(text: str, differs: Callable[[str], bool]) -> str:
    """A part of the text that still differs and of which no further part does."""
    size = len(text)
    while size:
        start = 0
        while start < len(text):
            shorter = text[:start] + text[start + size :]
            if differs(shorter):
                text = shorter
            else:
                start += size
        size //= 2
    return text


def compare(pair: Pair, some: list[str]) -> list[tuple[str, bool]]:
    """The texts that differ, and whether their markers were read."""
    found = []
    encode, decode, specials = pair.theirs
    for special in specials:
        asked = [text for text in some if not ((special or len(specials) == 1) and pair.leave_out(text))]
        for text, theirs in zip(asked, encode(asked, special), strict=True):
            same = pair.ours.encode(text, special=special) == theirs
            if not same or (decode is not None and pair.ours.decode(theirs) != decode(theirs)):
                found.append((text, special))
    return found


def minimised(pair: Pair, text: str, special: bool) -> dict[str, Any]:
    least = shortest(text, lambda shorter: difference(pair, shorter, special) is not None)
    ours, theirs = difference(pair, least, special) or ("the same when asked again", "")
    return {"text": ascii(least), "special": special, "ours": ours, "theirs": theirs}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--count", type=int, default=1_000_000)
    options.add_argument("--names", action="store_true", help="every pre-tokenizer's name instead of the twelve")
    options.add_argument("--only", nargs="+", choices=[*TWELVE, *NAMES], metavar="NAME")
    args = options.parse_args()
    chosen = args.only or list(NAMES if args.names else TWELVE)
    state_file = args.folder / "progress.json"
    args.folder.mkdir(parents=True, exist_ok=True)
    state = json.loads(state_file.read_text("utf-8")) if state_file.exists() else {}
    pairs = {}
    for name in chosen:
        (place := args.folder / name.replace(", ", "-").replace(" ", "-")).mkdir(exist_ok=True)
        pairs[name] = {**TWELVE, **NAMES}[name](place)
        state.setdefault(name, {"compared": 0, "different": 0, "seconds": 0.0, "shortest": []})
    while ahead := [name for name in pairs if state[name]["compared"] < args.count]:
        name = min(ahead, key=lambda name: state[name]["compared"])
        so_far, started = state[name], time.process_time()
        for text, special in compare(pairs[name], batch(so_far["compared"] // BATCH)):
            so_far["different"] += 1
            if len(so_far["shortest"]) < MINIMISED:
                found = minimised(pairs[name], text, special)
                if found not in so_far["shortest"]:
                    so_far["shortest"].append(found)
        so_far["compared"] += BATCH
        so_far["seconds"] += time.process_time() - started
        part = state_file.with_suffix(".part")
        part.write_text(json.dumps(state, ensure_ascii=False, indent=1), "utf-8")
        part.replace(state_file)
    for name in chosen:
        so_far = state[name]
        print(f"{name:58} {so_far['compared']:9,} texts, {so_far['different']} different")
        for found in so_far["shortest"]:
            print("    " + json.dumps(found, ensure_ascii=True))
    return int(any(state[name]["different"] for name in chosen))


if __name__ == "__main__":
    sys.exit(main())
