"""A model file without a tokenizer: everything works on token ids, and what needs text says in one line what to do."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from canonical_models import make_hyper, make_model
from packing import fake_stub
from tiny_models import TOKENS, vocabulary, write_model

import pocketlm
from pocketlm.cli import main
from pocketlm.errors import FileError
from pocketlm.export.export import container_for, export

NO_KEYS = dict.fromkeys(vocabulary())
WITHOUT = {  # what such files say in place of a tokenizer
    "nothing": NO_KEYS,
    "no_vocab": {**NO_KEYS, "tokenizer.ggml.model": "no_vocab"},
    "none": {**NO_KEYS, "tokenizer.ggml.model": "none"},
}
ADVICE = "give it one: pocketlm export {path} -o OUT.gguf --tokenizer FILE"
LINE = "it has no tokenizer, so it takes token ids and no text; " + ADVICE
OPTIONS = {"max_tokens": 6, "temperature": 0}


@pytest.fixture(params=WITHOUT)
def path(request, tmp_path):
    return write_model(tmp_path / "mute.gguf", metadata=WITHOUT[request.param])


@pytest.fixture
def speaking(tmp_path):
    return write_model(tmp_path / "speaking.gguf")


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_ids_give_what_they_give_with_a_tokenizer(path, speaking, backend):
    ids = [5, 6, 7]
    with pocketlm.load(path, backend=backend) as mute, pocketlm.load(speaking, backend=backend) as other:
        np.testing.assert_array_equal(mute.logits(ids), other.logits(ids))
        pieces = list(mute.generate(ids, **OPTIONS))
        assert [piece.id for piece in pieces] == [piece.id for piece in other.generate(ids, ignore_eos=True, **OPTIONS)]
        assert {piece.text for piece in pieces} == {""}
        assert (pieces[-1].finish_reason, pieces[-1].prompt_tokens, pieces[-1].generated_tokens) == ("length", 3, 6)
        assert (mute.name, mute.hyper.n_vocab) == ("mute", len(TOKENS))


def test_an_end_token_that_the_file_names_ends(tmp_path):
    keys = {**NO_KEYS, "tokenizer.ggml.eos_token_id": 9}
    with pocketlm.load(write_model(tmp_path / "m.gguf", metadata=keys), backend="numpy") as model:
        options = {**OPTIONS, "logit_bias": {9: 1000.0}}
        assert [(p.id, p.finish_reason) for p in model.generate([5], **options)] == [(-1, "stop")]
        assert len(list(model.generate([5], ignore_eos=True, **options))) == 7


@pytest.mark.parametrize("use", [
    lambda model: model.tokenizer, lambda model: model.template, lambda model: model.generate("then"),
    lambda model: model.chat([{"role": "user", "content": "then"}]),
], ids=["tokenizer", "template", "generate", "chat"])  # fmt: skip
def test_text_in_python_is_an_error_of_one_line(path, use):
    with pocketlm.load(path, backend="numpy") as model, pytest.raises(FileError) as error:
        use(model)
    assert str(error.value) == f"{path}: " + LINE.format(path=path)


@pytest.mark.parametrize("words", [
    ["chat"], ["generate", "-p", "then"], ["generate", "-p", "then", "--json"], ["eval", "--text", "{text}"],
    ["tokenize", "then"], ["tokenize", "--decode", "5 6"], ["pack", "-o", "{out}", "--stub", "{stub}"],
    ["export", "-o", "{out}.gguf", "--quant", "q8_0", "--verify"], ["export", "--to", "ollama", "-o", "{out}"],
], ids=" ".join)  # fmt: skip
def test_commands_that_need_text_say_what_is_missing(path, words, tmp_path, capsys):
    (tmp_path / "text").write_text("then in the thing")
    names = {"text": tmp_path / "text", "out": tmp_path / "out", "stub": fake_stub(tmp_path / "stub")}
    command, *rest = [word.format(**names) for word in words]
    assert main([command, str(path), *rest]) == 1
    out, error = capsys.readouterr()
    assert error.count("\n") == 1
    assert "tokenizer" in error
    assert "--tokenizer" in error
    assert "Traceback" not in out + error


def test_commands_that_need_no_text_work(path, tmp_path, capsys):
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] > 0
    assert main(["export", str(path), "-o", str(tmp_path / "q8.gguf"), "--quant", "q8_0"]) == 0
    with pocketlm.load(tmp_path / "q8.gguf") as model:
        assert model.logits([5, 6]).shape == (2, len(TOKENS))


@pytest.mark.parametrize("out", ["out.gguf", "bin"])
def test_a_model_exported_without_a_tokenizer_opens(tmp_path, out):
    model = make_model(make_hyper())
    keys = {key: value for key, value in model.metadata.items() if not key.startswith(("tokenizer.", "pocketlm.tokenizer."))}
    export(replace(model, metadata=keys), "checkpoint", tmp_path / out, container=container_for(tmp_path / out, None))
    with pocketlm.load(tmp_path / out) as model:
        assert [piece.text for piece in model.generate([1, 2], max_tokens=3)] == [""] * 4
        with pytest.raises(FileError, match="no tokenizer"):
            _ = model.tokenizer


def test_the_advice_helps(path, speaking, tmp_path, capsys):
    """A tokenizer given to a file without one; the model then does what it does with its own from the start."""
    given = ["export", str(path), "-o", str(tmp_path / "new.gguf"), "--quant", "f32", "--tokenizer", str(speaking)]
    assert main(given) == 0
    with pocketlm.load(tmp_path / "new.gguf", backend="numpy") as new, pocketlm.load(speaking, backend="numpy") as old:
        texts = ["".join(piece.text for piece in model.generate("then in", **OPTIONS)) for model in (new, old)]
        assert texts[0] == texts[1] != ""
    assert main(["export", str(speaking), "-o", str(tmp_path / "no.gguf"), "--tokenizer", str(speaking)]) == 2
    assert "is a model file and says all of that itself" in capsys.readouterr().err


def test_a_tokenizer_that_does_not_fit_is_refused(path, tmp_path, capsys):
    larger = write_model(tmp_path / "larger.gguf", tokens=[*TOKENS[:-3], *(f"x{i}" for i in range(9)), *TOKENS[-3:]])
    assert main(["export", str(path), "-o", str(tmp_path / "new.gguf"), "--tokenizer", str(larger)]) == 1
    assert "272 tokens, but the model's token table 263 rows" in capsys.readouterr().err
    assert not (tmp_path / "new.gguf").exists()
