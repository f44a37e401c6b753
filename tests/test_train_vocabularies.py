"""Vocabularies of other people, and those made with options: the ids of training are the library's, and the model's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import peer_tokenizers as peers
import pytest
from languages import ENGLISH, POLISH, RUSSIAN, TURKISH, long

torch = pytest.importorskip("torch", reason="the trainer is PyTorch")
tokenizers: Any = pytest.importorskip("tokenizers", reason="compared with")
sentencepiece: Any = pytest.importorskip("sentencepiece", reason="compared with")

from pocketlm import cli, load, tokenizer  # noqa: E402
from pocketlm.errors import FileError  # noqa: E402
from pocketlm.tokenizer import Tokenizer  # noqa: E402
from pocketlm.tokenizer.huggingface_writer import to_tokenizer_json  # noqa: E402
from pocketlm.train import documents, vocabularies  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")
LANGUAGES = {"Russian": RUSSIAN, "Turkish": TURKISH, "Polish": POLISH, "English": ENGLISH}
SAMPLES = [
    *LANGUAGES.values(), "e\u0301 ё Ё — «kâr» “x”… ", "  two  spaces\n\n\ttab", "kâr, kar; ŻÓŁĆ İIıi 3.14 1234",
    "<|user|> 你好 🙂",
]  # fmt: skip
SMALL = "--set n_layer=1 --set n_embd=32 --set n_head=2 --set n_kv_head=2 --set n_ff=32 --set n_ctx=32 --threads 1"
SHORT = "--steps 3 --batch 2 --micro-batch 2 --warmup 1 --eval-every 3"


def texts(folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, text in LANGUAGES.items():
        (folder / f"{name}.txt").write_text(long(text), encoding="utf-8")
    return [folder / f"{name}.txt" for name in LANGUAGES]


def train(*arguments: object, options: str = f"{SMALL} {SHORT}") -> int:
    return cli.main(["train", *map(str, arguments), *options.split()])


def exported(run: Path) -> Tokenizer:
    """The tokenizer of the run's model as a friend gets it; the model writes a few tokens."""
    out = run.parent / f"{run.name}.gguf"
    assert cli.main(["export", str(run / "last.pt"), "-o", str(out)]) == 0
    with load(out, backend="numpy") as model:
        assert len(list(model.generate("a", max_tokens=4, temperature=0))) > 0
    return tokenizer.load(out)


# ── made elsewhere ───────────────────────────────────────────────────────────────────────────────────────────────────


def byte_bpe(folder: Path) -> Any:
    """GPT-2's kind, trained by the library on all four languages."""
    lines = [path.read_text(encoding="utf-8") for path in texts(folder / "texts")]
    return peers.byte_level(lines, 600, special=["<|endoftext|>"])


def from_tokenizer_json(folder: Path) -> tuple[Path, Callable[[str], list[int]]]:
    made = byte_bpe(folder)
    made.save(str(folder / "mine.json"))
    return folder / "mine.json", lambda text: made.encode(text).ids


def from_normalising_json(folder: Path) -> tuple[Path, Callable[[str], list[int]]]:
    made, parts = byte_bpe(folder), tokenizers.normalizers
    made.normalizer = parts.Sequence([parts.NFC(), parts.Replace("ё", "е"), parts.Replace("Ё", "Е"), parts.Replace("«", '"')])
    made.save(str(folder / "mine.json"))
    return folder / "mine.json", lambda text: made.encode(text).ids


def from_vocab_and_merges(folder: Path, prefix: str | None = None) -> tuple[Path, Callable[[str], list[int]]]:
    made = byte_bpe(folder)
    made.model.save(str(folder), prefix)
    return folder / ("vocab.json" if prefix is None else f"{prefix}-vocab.json"), lambda text: made.encode(text).ids


def from_openais_files(folder: Path) -> tuple[Path, Callable[[str], list[int]]]:
    path, encode = from_vocab_and_merges(folder)
    path.rename(folder / "encoder.json")
    (folder / "merges.txt").rename(folder / "vocab.bpe")
    return folder, encode


def from_sentencepiece(folder: Path) -> tuple[Path, Callable[[str], list[int]]]:
    sentencepiece.SentencePieceTrainer.train(
        input=",".join(map(str, texts(folder / "texts"))), model_prefix=str(folder / "m"), model_type="bpe", vocab_size=700,
        byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
        user_defined_symbols=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "—", "«", "»"],
    )  # fmt: skip
    path = (folder / "m.model").rename(folder / "pieces of mine")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return path, processor.encode


def from_unigram(folder: Path) -> tuple[Path, Callable[[str], list[int]]]:
    """What SentencePiece makes unless it is asked for BPE."""
    sentencepiece.SentencePieceTrainer.train(
        input=",".join(map(str, texts(folder / "texts"))), model_prefix=str(folder / "m"), vocab_size=500, minloglevel=2,
        byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False,
    )  # fmt: skip
    return folder / "m.model", sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model")).encode


def ranks() -> tuple[dict[bytes, int], Any]:
    tiktoken: Any = pytest.importorskip("tiktoken", reason="compared with")
    from tiktoken.load import load_tiktoken_bpe

    found = load_tiktoken_bpe(str(Path(__file__).parent / "vectors" / "tiktoken-gpt-2.tiktoken"))
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    special = {"<|endoftext|>": len(found)}
    return found, tiktoken.Encoding("mine", pat_str=pattern, mergeable_ranks=found, special_tokens=special)


def from_tiktoken(folder: Path) -> tuple[Path, Callable[[str], list[int]]]:
    source = Path(__file__).parent / "vectors" / "tiktoken-gpt-2.tiktoken"
    (folder / "ranks").write_bytes(source.read_bytes())
    return folder / "ranks", ranks()[1].encode_ordinary


SOURCES = [
    from_tokenizer_json, from_normalising_json, from_vocab_and_merges, from_openais_files, from_sentencepiece, from_unigram,
    from_tiktoken,
]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_a_tokenizer_of_somebody_else_gives_its_librarys_ids_in_training_and_in_the_model(
    tmp_path: Path, source: Callable[[Path], tuple[Path, Callable[[str], list[int]]]]
) -> None:
    path, encode = source(tmp_path)
    assert train(*texts(tmp_path / "texts"), "-o", tmp_path / "run", "--tokenizer", path) == 0
    for tok in (tokenizer.load(tmp_path / "run"), exported(tmp_path / "run")):
        assert tok.eos_id is not None
        for text in SAMPLES:
            assert tok.encode(text) == encode(text), text


def test_merges_are_found_by_the_name_of_their_vocabulary(tmp_path: Path) -> None:
    path, encode = from_vocab_and_merges(tmp_path, "mine")
    tok = tokenizer.load(path)
    assert all(tok.encode(text) == encode(text) for text in SAMPLES)
    (tmp_path / "mine-merges.txt").unlink()
    with pytest.raises(FileError, match=r"tokens of several characters, .* nothing says how they merge; put its merges.txt"):
        tokenizer.load(path)


def test_markers_added_to_gpt2s_files_are_read(tmp_path: Path) -> None:
    path, _ = from_vocab_and_merges(tmp_path)
    n_tokens = len(json.loads(path.read_text()))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": n_tokens}))
    assert tokenizer.load(path).encode("a<|user|>", special=True)[-1] == n_tokens


def test_gpt2_is_what_tiktoken_calls_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken: Any = pytest.importorskip("tiktoken", reason="stands for it")
    _, encoding = ranks()
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    monkeypatch.chdir(tmp_path)
    assert train(*texts(tmp_path / "texts"), "-o", tmp_path / "run", "--tokenizer", "gpt2") == 0
    tok = exported(tmp_path / "run")
    assert tok.token_id("<|endoftext|>") == tok.eos_id == encoding.eot_token
    assert all(tok.encode(text) == encoding.encode_ordinary(text) for text in SAMPLES)


def test_gpt2_that_cannot_be_fetched_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiktoken: Any = pytest.importorskip("tiktoken", reason="stands for it")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(ConnectionError("no network")))
    monkeypatch.chdir(tmp_path)
    assert train(*texts(tmp_path / "texts"), "-o", tmp_path / "run", "--tokenizer", "gpt2") == 1
    assert "gpt2: could not be fetched by tiktoken (ConnectionError); give its files" in capsys.readouterr().err


# ── made here ────────────────────────────────────────────────────────────────────────────────────────────────────────


def library(folder: Path) -> Callable[[str], list[int]]:
    """The ids of the library that made the tokenizer in a run's folder."""
    if (folder / "tokenizer.model").exists():
        return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode
    if (folder / "tokenizer.json").exists():
        made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda text: made.encode(text).ids
    letters = {letter: i for i, letter in enumerate(json.loads((folder / "vocab.json").read_text()))}
    return lambda text: [letters[letter] for letter in text]


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_what_texts_go_through_is_carried_into_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The library knows nothing of it: it gives the same ids for texts that were normalised before."""
    table, files = tmp_path / "table.tsv", texts(tmp_path / "texts")
    table.write_text("ё\tе\nЁ\tЕ\n…\t...\n<<\t«\n", encoding="utf-8")

    def normalised(text: str) -> str:
        text = normalize("NFC", text)
        return text.replace("ё", "е").replace("Ё", "Е").replace("…", "...").replace("<<", "«")

    (files[0].parent / "more.txt").write_text("e\u0301 kâr… <<Ёж>> ёж\n" * 300, encoding="utf-8")
    files.append(files[0].parent / "more.txt")
    how = ("--tokenizer", kind, "--set", "n_vocab=700")
    assert train(*files, "-o", tmp_path / "run", *how, "--normalize", "nfc", "--normalize", table) == 0
    for file in files:
        file.write_text(normalised(file.read_text(encoding="utf-8")), encoding="utf-8")
    assert train(*files, "-o", tmp_path / "plain", *how) == 0
    encode = library(tmp_path / "plain")
    own = tokenizer.load(tmp_path / "run")
    for tok in (own, exported(tmp_path / "run")):
        for text in [*LANGUAGES.values(), "e\u0301 kâr… <<Ёж>> ёж\n"]:
            assert tok.encode(text) == encode(normalised(text)), text
    if kind == "bytes":  # the other two are not BPE of a kind that the library normalises so
        content, _ = to_tokenizer_json(own, own.n_vocab, "run")
        theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
        assert all(theirs.encode(text, add_special_tokens=False).ids == own.encode(text) for text in SAMPLES)
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "run" / "last.pt"), "-o", str(tmp_path / "again.gguf")]) == 0
    assert "stock llama.cpp tokenizes" in capsys.readouterr().out, "which does not normalise"
    learnt = [(tmp_path / run / "data" / "part-00004.train").read_bytes() for run in ("run", "plain")]
    assert learnt[0] == learnt[1] != b""


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_symbols_are_one_token_in_every_text(tmp_path: Path, kind: str) -> None:
    symbols = ["—", "«", "»", "<|note|>", "İstanbul"] if kind != "characters" else ["—", "«", "»", "ﬁ"]
    (tmp_path / "symbols.txt").write_text("\n".join([*symbols, "", "—", "<|im_end|>"]), encoding="utf-8")
    how = ("--tokenizer", kind, "--set", "n_vocab=700", "--symbols", tmp_path / "symbols.txt")
    assert train(*texts(tmp_path / "texts"), "-o", tmp_path / "run", *how) == 0
    encode, own = library(tmp_path / "run"), tokenizer.load(tmp_path / "run")
    for tok in (own, exported(tmp_path / "run")):
        for symbol in symbols:
            assert tok.encode(f"a{symbol}b").count(tok.token_id(symbol)) == 1
            assert tok.decode(tok.encode(f"a{symbol}b")) == f"a{symbol}b"
        texts_with = [*LANGUAGES.values(), f"в {symbols[-1]}, {symbols[0]}"]
        assert [tok.encode(text) for text in texts_with] == [encode(text) for text in texts_with]


def test_character_coverage_decides_which_letters_become_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(long(RUSSIAN) * 2 + "\nø", encoding="utf-8")
    sizes, few = [], ("--val-every", 4)
    for name, more in (("usual", ()), ("whole", ("--character-coverage", 1))):
        how = ("--tokenizer", "sentencepiece", "--set", "n_vocab=600", *few, *more)
        assert train(tmp_path / "a.txt", "-o", tmp_path / name, *how) == 0
        sizes.append(len(tokenizer.load(tmp_path / name).encode("ø")))
    assert sizes == [2, 1]


def test_a_vocabulary_is_made_of_an_even_share_of_large_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = texts(tmp_path / "texts")
    total = sum(file.stat().st_size for file in files)
    read = ["".join(documents.read_texts(files, documents.Reading(), share)) for share in (0, total // 2)]
    assert len(read[0]) == sum(len(file.read_text(encoding="utf-8")) for file in files)
    assert 0.3 < len(read[1]) / len(read[0]) < 0.7
    assert all(text[:40] in read[1] or text[60:100] in read[1] for text in LANGUAGES.values()), "every file has its share"
    monkeypatch.setattr(vocabularies, "MOST_BYTES", total // 4)
    fed: list[str] = []
    right = vocabularies.KINDS["bytes"]

    def kept(given: Iterable[str], *more: Any) -> None:
        fed.extend(given)
        right(fed, *more)

    monkeypatch.setitem(vocabularies.KINDS, "bytes", kept)
    assert train(*files, "-o", tmp_path / "run") == 0
    assert sum(len(text.encode()) for text in fed) < total / 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--normalize {folder}/none.tsv", "none.tsv: cannot be read"),
        ("--normalize {folder}/table", "table: line 2 is no replacement; write what, a tab, and by what"),
        ("--normalize nfc --normalize nfkc", "nfkc: a text has one normal form"),
        ("--normalize {folder}/dash --symbols {folder}/dash-alone", "--normalize replaces —, which is a token of its own"),
        ("--symbols {folder}/none.txt", "none.txt: cannot be read"),
        ("--character-coverage 0.99", "--character-coverage is a number from 0.9 to 1, for --tokenizer sentencepiece"),
        ("--tokenizer {folder}/table --symbols {folder}/table", "--symbols is for vocabularies that are made here"),
        ("--tokenizer {folder}/none.model", "or a tokenizer's file or folder"),
        ("--seed -1", "expected a seed of 0 or more"),
        ("--weight-decay nan", "0 <= weight decay"),
        ("--save-seconds nan", "--save-seconds is 0 or more"),
        ("--from=", "--from is empty"),
        ("--rope-theta 5e5", "--rope-theta is for --from"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, said: str) -> None:
    (tmp_path / "table").write_text("a\tb\nc\n")
    (tmp_path / "dash").write_text("—\t-\n", encoding="utf-8")
    (tmp_path / "dash-alone").write_text("—\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text(ENGLISH * 20)
    assert train(tmp_path / "a.txt", "-o", tmp_path / "run", *options.format(folder=tmp_path).split()) in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pocketlm: ")]
    assert len(lines) == 1
    assert said in lines[0]


def test_an_attempt_without_a_step_leaves_no_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, run = tmp_path / "a.txt", tmp_path / "run"
    text.write_text(RUSSIAN[:60], encoding="utf-8")
    assert train(text, "-o", run) == 1
    assert "too few for a sequence" in capsys.readouterr().err
    text.write_text(long(RUSSIAN), encoding="utf-8")  # as the message advises
    assert train(text, "-o", run) == train(text, "-o", tmp_path / "fresh") == 0
    assert (run / "tokenizer.json").read_bytes() == (tmp_path / "fresh" / "tokenizer.json").read_bytes()
    parts = (json.loads((folder / "data" / "state.json").read_text()) for folder in (run, tmp_path / "fresh"))
    assert len({json.dumps(part) for part in parts}) == 1, "its ids are of this vocabulary, too"


def test_a_run_that_has_a_vocabulary_takes_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, run = texts(tmp_path / "texts")[0], tmp_path / "run"
    assert train(text, "-o", run) == 0
    for options, said in (("--tokenizer characters", "tokenizer = bytes, not characters"),
                          ("--normalize nfkc", "normalize = [None], not ['NFKC']"),
                          ("--normalize nfx", "nfx: cannot be read")):  # fmt: skip
        capsys.readouterr()
        assert train(text, "-o", run, "--steps", "6", options=f"{SMALL} {options}") in (1, 2)
        assert said in capsys.readouterr().err
    np.save(tmp_path / "ids.npy", np.arange(100, dtype=np.uint16))
    assert train(text, tmp_path / "ids.npy", "-o", run, options=f"{SMALL} {SHORT} --steps 6") == 0, "ids of this vocabulary"
    (run / vocabularies.MADE_OF).unlink()  # a run of an earlier version
    assert train(text, "-o", run, options=f"{SMALL} {SHORT} --steps 9") == 0


def test_of_two_vocabularies_that_are_taken_a_run_has_the_one_it_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, short, run = texts(tmp_path / "texts")[0], tmp_path / "short.txt", tmp_path / "run"
    short.write_text("а" * 40, encoding="utf-8")
    tables = [tmp_path / name / "vocab.json" for name in ("one", "two")]
    for path, alphabet in zip(tables, ("абв", "".join(sorted(set(long(RUSSIAN))))), strict=True):
        path.parent.mkdir()
        path.write_text(json.dumps(["<|endoftext|>", *alphabet], ensure_ascii=False), encoding="utf-8")
    assert train(short, "-o", run, "--tokenizer", tables[0]) == 1
    assert train(text, "-o", run, "--tokenizer", tables[1]) == 0, "the attempt before has left none"
    capsys.readouterr()
    assert train(text, "-o", run, "--tokenizer", tables[0], options=f"{SMALL} {SHORT} --steps 6") == 2
    assert "choose another folder with -o" in capsys.readouterr().err
    tables[1].unlink()
    assert train(text, "-o", run, "--tokenizer", tables[1], options=f"{SMALL} {SHORT} --steps 6") == 0, "the run has it"
    (run / "last.pt").unlink()  # its best weights are still of this vocabulary
    before = (run / "vocab.json").read_bytes()
    assert train(text, "-o", run, "--tokenizer", tables[0]) == 2
    assert (run / "vocab.json").read_bytes() == before


def test_a_vocabulary_that_was_put_there_stays(tmp_path: Path) -> None:
    made = []

    def make(place: Path) -> None:
        made.append(place)
        (place / "vocab.json").write_text('["<|endoftext|>", "a"]')

    own = '["<|endoftext|>", "b"]'
    for _ in range(2):
        vocabularies.kept_or_made(tmp_path, {"tokenizer": "x"}, [], make)
    assert len(made) == 1
    with pytest.raises(KeyError):  # whatever goes wrong, what is there stays
        vocabularies.kept_or_made(tmp_path, {"tokenizer": "y"}, [], lambda place: {}["no"])
    assert (tmp_path / "vocab.json").read_text() == '["<|endoftext|>", "a"]'
    (tmp_path / "vocab.json").write_text(own)
    vocabularies.kept_or_made(tmp_path, {"tokenizer": "y"}, [], make)
    assert ((tmp_path / "vocab.json").read_text(), len(made)) == (own, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vocab.json", vocabularies.MADE_OF]
