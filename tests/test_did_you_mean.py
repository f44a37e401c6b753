"""A word that is not known gets the known one it is near: commands, flags, formats, backends, models, presets."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

import pocketlm
from pocketlm.cli import COMMANDS, main
from pocketlm.errors import UsageError, did_you_mean
from pocketlm.export.export import CALLED_ELSEWHERE, CONTAINERS


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of an error of status 2; nothing on stdout."""
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pocketlm: ")
    assert err.count("\n") == 1
    return err.rstrip()


def test_a_flag_that_help_does_not_show_is_not_meant(capsys: pytest.CaptureFixture[str]):
    assert said(capsys, "chat", "--model_id", "x").endswith("there is no such flag; --help lists them")


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("q4_k_l", "q4_k_m"), ("Q4_K_S", "q4_k_m"), ("q3_k", "q3_k_m"), ("iq4_xs", "iq4_nl"),
        ("Q6_K_L", "q6_k"), ("q8", "q8_0"), ("q4", "q4_0"),
        ("int8", "q8_0"), ("int4", "q4_0"), ("fp16", "f16"), ("FP32", "f32"), ("float16", "f16"), ("bfloat16", "bf16"),
        ("half", "f16"), ("q40", "q4_0"), ("q8-0", "q8_0"),
    ],
)  # fmt: skip
def test_formats_as_others_write_them(asked: str, meant: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = said(capsys, "export", tiny, "-o", tmp_path / "m.gguf", "--quant", asked)
    assert line.endswith(f", did you mean {meant}?")
    assert not list(tmp_path.iterdir())


def test_onnx_has_names_of_its_own(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for asked, meant in (("q8_0", "int8"), ("fp16", "f16"), ("float32", "f32")):
        line = said(capsys, "export", tiny, "-o", tmp_path / "m.onnx", "--quant", asked)
        assert line.endswith(f"onnx knows f32, f16, int8, did you mean {meant}?")


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (["generat"], "generat: there is no such command, did you mean generate?"),
        (["Chat"], "did you mean chat?"),
        (["tokenise", "MODEL"], "did you mean tokenize?"),
        (["xyzzy"], "xyzzy: there is no such command; pocketlm --help lists them"),
        (["generate", "MODEL", "-p", "a", "--temperature", "1"], "--temperature: there is no such flag, did you mean --temp?"),
        (["chat", "MODEL", "--temperature", "1"], "--temperature: there is no such flag, did you mean --temp?"),
        (["chat", "MODEL", "--n-predict", "1"], "did you mean --max-tokens?"),
        (["generate", "MODEL", "-p", "a", "--max_tokens=1"], "did you mean --max-tokens?"),
        (["generate", "MODEL", "-p", "a", "--xyzzy"], "--xyzzy: there is no such flag; --help lists them"),
        (["export", "MODEL", "--ouput", "m.gguf"], "did you mean --output?"),
        (["export", "MODEL", "-o", "m.gguf", "--to", "guff"], "did you mean gguf?"),
        (["generate", "MODEL", "-p", "a", "--backend", "nativ"], "auto, native, numpy, did you mean native?"),
        (["bench", "MODEL", "--backends", "lama.cpp"], "did you mean llama.cpp?"),
        (["train", "a.txt", "-o", "r", "--preset", "chekov"], "did you mean chekhov-10m?"),
        (["train", "a.txt", "-o", "r", "--set", "n_layers=2"], "did you mean n_layer?"),
        (["train", "a.txt", "-o", "r", "--dtype", "fp61"], "did you mean fp16?"),
        (["train", "a.txt", "-o", "r", "--recipe", "smalltalk"], "did you mean small-talk?"),
    ],
)
def test_commands_flags_and_values(words: list[str], end: str, tiny: str, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # in this folder, Windows would take Chat for the folder chat
    if "--dtype" in words or "--set" in words:
        pytest.importorskip("torch", reason="train checks these with PyTorch at hand")
    assert said(capsys, *(tiny if word == "MODEL" else word for word in words)).endswith(end)


def test_a_file_in_place_of_a_command_is_to_be_talked_to(tiny: str, capsys: pytest.CaptureFixture[str]):
    assert said(capsys, tiny).endswith(f"did you mean pocketlm chat {tiny}?")


def test_a_short_name_that_is_nearly_right(capsys: pytest.CaptureFixture[str]):
    for command in ("chat", "inspect", "tokenize"):
        assert main([command, "smolm2"]) == 1
        assert capsys.readouterr().err.rstrip().endswith("small-talk, smollm2, did you mean smollm2?")


def test_every_flag_of_every_command_is_known(capsys: pytest.CaptureFixture[str]):
    """What --help lists is never called unknown."""
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        flags = {word.strip(",.:;[]()") for word in capsys.readouterr().out.split() if word.lstrip("[").startswith("--")}
        for flag in {flag.partition("=")[0] for flag in flags}:
            with contextlib.suppress(SystemExit):
                main([name, flag, "--help"])
            err = capsys.readouterr().err
            assert "there is no such flag" not in err, (name, flag)


def test_what_is_called_otherwise_elsewhere_is_a_name_somewhere():
    known = {quant for row in CONTAINERS.values() for quant in row.quants}
    assert set(CALLED_ELSEWHERE.values()) <= known


def test_the_nearest_is_as_it_is_written():
    assert did_you_mean("HELP", ["help", "quit"], "/") == ", did you mean /help?"
    assert did_you_mean("zzz", ["help", "quit"], "/") == ""


@pytest.mark.parametrize(
    ("option", "end"),
    [
        ("temprature", "did you mean temperature?"), ("max_token", "did you mean max_tokens?"), ("topk", "did you mean top_k?"),
        ("logprob", "did you mean logprobs?"), ("json_scheme", "did you mean json_schema?"), ("xyzzy", "such option"),
        ("exempt", "such option"), ("n_vocab", "such option"),
    ],
)  # fmt: skip
def test_options_in_python(option: str, end: str, tiny: str):
    with pocketlm.load(tiny, threads=1) as model, pytest.raises(UsageError) as told:
        list(model.generate("the", **{option: 1}))
    assert str(told.value).startswith(f"{option}: there is no such option")
    assert str(told.value).endswith(end)
