"""Characters that a vocabulary lacks: an error in Python, left out where that is asked for, named once by `generate`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import write_model

from pocketlm.cli import main
from pocketlm.errors import UsageError
from pocketlm.tokenizer import Tokenizer, from_metadata, to_metadata
from pocketlm.tokenizer.characters import from_table

ALPHABET = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"абвгд ,\n"]


@pytest.fixture(params=["table", "GGUF keys"])
def tok(request: pytest.FixtureRequest) -> Tokenizer:
    made = from_table("vocab.json", {token: i for i, token in enumerate(ALPHABET)})
    return made if request.param == "table" else from_metadata(to_metadata(made, made.n_vocab), "m.gguf")


def test_an_unknown_character_is_an_error_unless_it_may_be_left_out(tok: Tokenizer):
    with pytest.raises(UsageError, match=r"the vocabulary has no 'x' \(U\+0078\)"):
        tok.encode("абxв")
    assert tok.encode("абxв", errors="ignore") == tok.encode("абв")
    assert tok.encode("xyz", errors="ignore") == []
    assert tok.unknown("yабxвx") == "yx"
    assert tok.encodable("yабxвx") == "абв"
    assert tok.unknown("абв") == ""


def test_markers_are_found_before_characters_are_left_out(tok: Tokenizer):
    text = "<|im_start|>user\nда<"
    assert [ALPHABET[i] for i in tok.encode(text, special=True, errors="ignore")] == ["<|im_start|>", "\n", "д", "а"]
    assert set(tok.unknown(text, special=True)) == set("user<")
    assert set(tok.unknown(text)) == set("<|im_start|>user")


def test_lone_surrogates_are_left_out_by_every_kind(tiny: str):
    from pocketlm import tokenizer

    tok = tokenizer.load(tiny)
    with pytest.raises(UsageError, match="lone surrogate"):
        tok.encode("a\udcffb")
    assert tok.encode("a\udcffb", errors="ignore") == tok.encode("ab")


def test_other_ways_with_errors_are_refused(tok: Tokenizer):
    with pytest.raises(UsageError, match="errors is 'replace'; it must be 'strict' or 'ignore'"):
        tok.encode("а", errors="replace")


def test_generate_leaves_out_what_the_vocabulary_lacks_and_says_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = from_table("vocab.json", {token: i for i, token in enumerate(ALPHABET)})
    keys = to_metadata(made, made.n_vocab)
    keys = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in keys.items()}
    keys = {**dict.fromkeys(("tokenizer.ggml.pre", "tokenizer.ggml.merges")), **keys}
    path = write_model(tmp_path / "chars.gguf", tokens=ALPHABET, metadata=keys)
    outputs = []
    for prompt in ("да x, yx", "да , "):
        assert main(["generate", str(path), "-p", prompt, "-n", "5", "--temp", "0", "--ignore-eos"]) == 0
        outputs.append(capsys.readouterr())
    assert outputs[0].out == outputs[1].out
    said = [line for line in outputs[0].err.splitlines() if line.startswith("pocketlm: ")]
    assert said == ["pocketlm: the model knows no 'x', 'y': left out of the prompt"]
    assert "left out" not in outputs[1].err
