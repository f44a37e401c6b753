"""`pocketlm pack` takes what `pocketlm export` takes, and packs what that would have written, byte for byte."""

import argparse
import pickle
import shutil

import pytest
from checkpoint_checks import MAP
from packing import fake_stub, tiny_chat_model

from pocketlm.build import command as build
from pocketlm.cli import main
from pocketlm.export import command as export

torch = pytest.importorskip("torch", reason="makes the checkpoint and the adapter")
models = pytest.importorskip("torch_models")
lora = pytest.importorskip("test_export_lora")

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": 61, "bias": True, "dropout": 0.0}
NAMES = {"transformer.": "", "h.": "stem.", "wte": "words", "wpe": "places", "ln_f": "last", "ln_1": "a.gain", "ln_2": "b.gain",
         "attn.c_attn": "qkv_all", "attn.c_proj": "mix", "mlp.c_fc": "wide", "mlp.c_proj": "narrow"}  # fmt: skip
LETTERS = [chr(33 + i) for i in range(60)] + [" "]


def renamed(name):
    """A tensor of nanoGPT as MAP calls it."""
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name.removesuffix(".weight")


@pytest.fixture
def folder(tmp_path):
    """A checkpoint, with all that an option may name beside it but where nobody looks for it."""
    torch.manual_seed(0)
    module = models.initialise(models.GPT())
    state = module.state_dict()
    torch.save({"model": state, "model_args": SIZES}, tmp_path / "ckpt.pt")
    torch.save({"model": state}, tmp_path / "bare.pt")
    plain = models.initialise(models.GPT(bias=False, masks=False)).state_dict()
    torch.save({renamed(name): tensor for name, tensor in plain.items() if name != "lm_head.weight"}, tmp_path / "nobody.pt")
    away = tmp_path / "away"
    away.mkdir()
    table = {c: i for i, c in enumerate(LETTERS)}
    (away / "meta.pkl").write_bytes(pickle.dumps({"stoi": table, "itos": {i: c for c, i in table.items()}}))
    (away / "names.toml").write_text(MAP)
    (away / "chat.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    lora.adapter(away / "lora", module, ["transformer.h.0.attn.c_proj"])
    return tmp_path


CASES = {
    "--tokenizer": ["ckpt.pt"],
    "--quant": ["ckpt.pt", "--quant", "q8_0"],
    "--pure": ["ckpt.pt", "--quant", "q4_0", "--pure"],
    "--set": ["bare.pt", "--set", "n_head=4", "--set", "norm_eps=1e-5"],
    "--map": ["nobody.pt", "--map", "away/names.toml"],
    "--lora": ["ckpt.pt", "--lora", "away/lora"],
    "--name": ["ckpt.pt", "--name", "Ada"],
    "--chat-template": ["ckpt.pt", "--chat-template", "away/chat.jinja"],
}


@pytest.mark.parametrize("option", CASES)
def test_what_is_packed_is_what_export_writes(option, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = [*CASES[option], "--tokenizer", "away/meta.pkl"]
    fake_stub(folder / "stub")
    assert main(["export", *words, "-o", "plain.gguf"]) == 0, capsys.readouterr().err
    assert main(["pack", *words, "--stub", "stub", "-o", "friend"]) == 0, capsys.readouterr().err
    assert main(["unpack", "friend", "-o", "again.gguf"]) == 0
    assert (folder / "again.gguf").read_bytes() == (folder / "plain.gguf").read_bytes()
    assert not list(folder.glob(".pocketlm-*"))


def test_both_commands_have_the_same_options():
    """Every option that says what the model becomes is in both commands, with the same words."""
    parsers = {}
    declared = {"export": export.arguments, "pack": build.COMMANDS["pack"].arguments, "both": export.model_options}
    for name, arguments in declared.items():
        parser = argparse.ArgumentParser()
        arguments(parser)
        parsers[name] = {flag: action for action in parser._actions for flag in action.option_strings}
    for flag in parsers["both"]:
        first, second = parsers["export"][flag], parsers["pack"][flag]
        assert (first.help, first.default, first.metavar) == (second.help, second.default, second.metavar)
    apart = {"-o", "--output", "--to", "--verify"}  # where the file goes, and what is asked of it then
    assert set(parsers["export"]) - apart == set(parsers["both"])


def test_what_export_advises_can_be_followed(folder, monkeypatch, capsys):
    """pack's errors name options of export: they are options of pack."""
    monkeypatch.chdir(folder)
    fake_stub(folder / "stub")
    pack = ["--stub", "stub", "-o", "friend"]
    assert main(["pack", "ckpt.pt", *pack]) == 1
    assert "--tokenizer FILE" in capsys.readouterr().err
    assert main(["pack", "ckpt.pt", "--tokenizer", "away/meta.pkl", *pack]) == 0
    assert main(["unpack", "friend", "-o", "m.gguf"]) == 0
    capsys.readouterr()
    assert main(["pack", "m.gguf", "--set", "n_head=2", *pack]) == 2
    assert "--set is for checkpoints" in capsys.readouterr().err


def test_a_tokenizer_that_was_found_is_named_and_so_is_the_model(folder, monkeypatch, capsys):
    """By its folder, where every checkpoint is called so; what was given needs no word."""
    monkeypatch.chdir(folder)
    out = folder / "verse" / "out"
    out.mkdir(parents=True)
    for name in ("ckpt.pt", "away/meta.pkl"):
        shutil.copy(name, out)
    fake_stub(folder / "stub")
    for words in (["export", "-o", "m.gguf"], ["pack", "--stub", "stub", "-o", "friend"]):
        for more in ([], ["--tokenizer", "away/meta.pkl"]):
            assert main([*words, "verse/out/ckpt.pt", *more]) == 0
            said = capsys.readouterr().out.splitlines()
            assert ("note: its tokenizer is verse/out/meta.pkl" in said) == (not more), said
    assert main(["persona", "friend"]) == 0
    assert "verse" in capsys.readouterr().out


def test_a_disk_without_room_is_said_before_a_stub_is_composed(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["export", "ckpt.pt", "--tokenizer", "none", "-o", "m.gguf"]) == 0
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 30 << 20}))
    monkeypatch.setattr(build, "_stub_for", lambda *_: pytest.fail("half a minute for nothing"))
    capsys.readouterr()
    assert main(["pack", "m.gguf", "--for", "all", "-o", "friend"]) == 1
    assert "friend: needs" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [(["empty.gguf"], "empty.gguf"), (["good.gguf", "--icon", "none.ico"], "none.ico")])
def test_what_cannot_be_packed_is_found_before_anything_is_fetched(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.gguf").touch()
    tiny_chat_model(tmp_path).rename("good.gguf")
    monkeypatch.setattr(build, "_stub_for", lambda *_: pytest.fail("a stub was asked for"))
    assert main(["pack", *words, "-o", "friend"]) == 1
    assert capsys.readouterr().err.startswith(f"pocketlm: {said}")
