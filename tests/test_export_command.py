"""`pocketlm export` as a user runs it: what it prints, what it makes, what it refuses."""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import pytest
from canonical_models import GPT2, make_hyper, make_model
from languages import RUSSIAN

from pocketlm import tokenizer
from pocketlm.chat.templates import BUILT_IN
from pocketlm.cli import main
from pocketlm.errors import FileError, PocketlmError, UsageError
from pocketlm.export import command
from pocketlm.export import verify as verify_module
from pocketlm.export.canonical import CanonicalModel
from pocketlm.export.dialects import read_canonical
from pocketlm.export.export import CONTAINERS, container_for, export
from pocketlm.export.ollama import modelfile
from pocketlm.export.verify import verify
from pocketlm.model import find_model
from pocketlm.runtime.model_file import open_model
from pocketlm.tokenizer.characters import from_table


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A GGUF to export again: the command takes model files as it takes checkpoints."""
    path = tmp_path / "source.gguf"
    export(make_model(make_hyper("llama", n_embd=64, n_head=4, head_dim=16, n_ff=128)), "c", path, quant="f32")
    return path


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    command.arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_a_receipt_is_printed(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(source, "-o", tmp_path / "out.gguf", "--quant", "q4_0") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert re.match(
        r".*out.gguf: 99,136 parameters \(GGUF\), 0.1 MB, \d\.\d\d bits per weight \(Q4_0 x14, F32 x5, Q8_0 x1\)", lines[0]
    )
    assert lines[1] == "in Q8_0: token_embd.weight; Q6_K needs rows of a multiple of 256 weights, these have 64"
    assert lines[2].startswith("largest quantisation error: ")
    assert err == ""  # no terminal, no bar


def test_names_and_templates_are_written(source: Path, tmp_path: Path):
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    run(source, "-o", tmp_path / "out.gguf", "--name", "Ada", "--chat-template", tmp_path / "chat.jinja")
    with open_model(tmp_path / "out.gguf") as file:
        assert file.metadata["general.name"] == "Ada"
        assert file.metadata["tokenizer.chat_template"] == "{{ messages[0].content }}"
    run(source, "-o", tmp_path / "out.gguf", "--chat-template", "alpaca")
    with open_model(tmp_path / "out.gguf") as file:
        assert file.metadata["tokenizer.chat_template"] == BUILT_IN["alpaca"].jinja


@pytest.mark.parametrize(
    ("out", "asked", "expected"),
    [
        ("m.gguf", None, "gguf"),
        ("m.ONNX", None, "onnx"),
        ("folder", None, "fp16"),
        ("folder", "ollama", "ollama"),
        ("m", "gguf", "gguf"),
    ],
)
def test_the_outputs_name_says_what_it_is(out: str, asked: str | None, expected: str):
    assert container_for(Path(out), asked) == expected


@pytest.mark.parametrize(("out", "asked"), [("m.gguf", "fp16"), ("m.onnx", "ollama"), ("m", "pdf"), ("m.safetensors", None)])
def test_a_name_that_contradicts_is_refused(out: str, asked: str | None):
    with pytest.raises(UsageError):
        container_for(Path(out), asked)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "n_head=4"], "--set is for checkpoints"),
        (["--map", "x.toml"], "--map is for checkpoints"),
        (["--quant", "q9"], "--quant q9"),
        (["--verify", "no-such-file"], "no-such-file: cannot be read"),
        (["--chat-template", "no-such-file"], "no-such-file: cannot be read"),
        (["--lora", "no-such-folder"], "no-such-folder"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_writes_nothing(source: Path, tmp_path: Path, words: list[str], message: str):
    with pytest.raises(PocketlmError, match=message) as caught:
        run(source, "-o", tmp_path / "out.gguf", *words)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_the_input_is_not_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):  # fmt: skip
    """However it is called, by export and by pack; nor is the folder that it lies in."""
    before = source.read_bytes()
    folder = tmp_path / "folder"
    run(source, "-o", folder, "--to", "huggingface")
    link = str(Path("folder", "..", "source.gguf"))
    monkeypatch.chdir(tmp_path)
    weights = folder / "model.safetensors"
    for name, out in ((source, "source.gguf"), ("source.gguf", link), (folder, "folder"), (weights, "folder")):
        for words in (["export", "--to", "huggingface" if out == "folder" else "gguf"], ["pack", "--for", "linux-x86_64"]):
            assert main([*words, str(name), "-o", out]) == 2
            assert f"-o {Path(out)} is where the input is; name another output" in capsys.readouterr().err
    assert source.read_bytes() == before
    assert weights.exists()


@pytest.mark.parametrize(
    ("command", "option"), [("export", "--verify"), ("export", "--imatrix"), ("pack", "--chat-template"), ("pack", "--icon")]
)
def test_nor_is_what_an_option_names(source: Path, tmp_path: Path, command: str, option: str):
    mine = tmp_path / "mine.gguf"
    mine.write_text("mine")
    assert main([command, str(source), "-o", str(mine), option, str(mine)]) == 2
    assert mine.read_text() == "mine"


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path):
    with pytest.raises(FileError, match="missing"):
        run(tmp_path / "missing.pt", "-o", tmp_path / "out.gguf")


def test_an_installed_model_has_a_short_name_here_too(tmp_path: Path):
    run("small-talk", "-o", tmp_path / "out.gguf", "--quant", "q4_0")
    with open_model(tmp_path / "out.gguf") as made, open_model(find_model("small-talk")) as installed:
        assert made.metadata["general.name"] == installed.metadata["general.name"]


def test_set_wants_a_name_and_a_value(tmp_path: Path):
    (tmp_path / "ckpt.pt").write_bytes(b"x")
    with pytest.raises(UsageError, match="--set n_head: expected a name and a value"):
        run(tmp_path / "ckpt.pt", "-o", tmp_path / "out.gguf", "--set", "n_head")


def test_the_bar_is_for_terminals_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    for is_terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda is_terminal=is_terminal: is_terminal, raising=False)
        with command.Progress(100) as progress:
            progress.step("blk.0.attn_q.weight", 50)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("50% blk.0.attn_q.weight" in err) == is_terminal


# ── --verify ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("container", CONTAINERS)
def test_verify_finds_the_float32_model_in_every_container(container: str, tmp_path: Path):
    if container == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        pytest.importorskip("onnx", reason="the package onnx is not installed")
    model = make_model(make_hyper("llama"))
    out = tmp_path / ("m.onnx" if container == "onnx" else "m.gguf" if container == "gguf" else "m")
    export(model, "c", out, container=container, quant=None if container in ("onnx", "fp16") else "f32")
    result = verify(model, out, "the quick brown fox jumps over the lazy dog\n" * 5)
    assert result.worst_cosine > 0.9999
    assert result.agreement > 0.98
    assert result.perplexity == pytest.approx(result.exact_perplexity, rel=1e-2)
    assert f"verified on {result.n_tokens} tokens: cosine " in result.line()


def test_verify_sees_what_a_coarse_format_costs(tmp_path: Path):
    model = make_model(make_hyper("llama", n_embd=64, n_head=4, head_dim=16, n_ff=128))
    export(model, "c", tmp_path / "m.gguf", quant="q4_0", pure=True)
    result = verify(model, tmp_path / "m.gguf")
    assert result.cosine < 0.999
    assert result.agreement < 1
    assert result.n_tokens > 200


@pytest.mark.parametrize(
    ("alphabet", "sample"),
    [
        (sorted(set(verify_module.TEXT)), "tokens: "),
        (sorted(set(verify_module.TEXT) - set("Tk")), "tokens of the usual text without 'Tk', which the tokenizer does not"),
        (sorted(set(verify_module.TEXT) - set("bcdfghklopvwx")), "tokens drawn at random, since the tokenizer takes too few"),
        (list("ąβж漢\n"), "tokens drawn at random, since the tokenizer takes too few of the characters of the usual text: "),
    ],
)
def test_verify_uses_what_a_character_vocabulary_has(alphabet: list[str], sample: str, tmp_path: Path):
    model = make_model(make_hyper("llama", n_vocab=len(alphabet)))
    keys = tokenizer.to_metadata(from_table("meta.pkl", {c: i for i, c in enumerate(alphabet)}), len(alphabet))
    model = replace(model, metadata=keys)
    export(model, "c", tmp_path / "m.gguf", quant="f32")
    result = verify(model, tmp_path / "m.gguf")
    assert sample in result.line()
    assert not ("at random" in sample and "foreign" in result.line())
    assert result.n_tokens > 500
    assert result.worst_cosine > 0.9999


def test_verify_has_a_conversation_for_a_chat_model(tmp_path: Path):
    """A text that the model never met the like of says nothing, and the line says that."""
    model = read_canonical(find_model("small-talk"))
    export(model, "c", tmp_path / "m.gguf", quant="q8_0")
    own, foreign = (verify(model, tmp_path / "m.gguf", text) for text in (None, RUSSIAN))
    assert f"verified on {own.n_tokens} tokens of a conversation in its template: " in own.line()
    assert own.exact_perplexity < 100
    assert own.n_tokens > 300
    assert "foreign" not in own.line()
    assert foreign.exact_perplexity > 1024
    assert foreign.line().endswith("; the text is foreign to the model, which a guess beats")


def test_verify_has_a_text_for_a_chat_model_that_cannot_spell_its_template(tmp_path: Path):
    """Of characters, with the markers of a chat but without the letters of the roles."""
    alphabet = ["<|im_start|>", "<|im_end|>", *sorted(set(verify_module.TEXT) - set("u"))]
    model = make_model(make_hyper("llama", n_vocab=len(alphabet)))
    keys = tokenizer.to_metadata(from_table("meta.pkl", {c: i for i, c in enumerate(alphabet)}), len(alphabet))
    model = replace(model, metadata=keys)
    export(model, "c", tmp_path / "m.gguf", quant="f32")
    assert "tokens of the usual text without 'u', which" in verify(model, tmp_path / "m.gguf").line()


@pytest.mark.parametrize("change", ["no vocabulary", "no text"])
def test_verify_says_what_it_lacks(change: str, tmp_path: Path):
    model = make_model(make_hyper("llama"))
    export(model, "c", tmp_path / "m.gguf")
    if change == "no vocabulary":
        model = replace(model, metadata={})
    with pytest.raises(PocketlmError, match=r"without a tokenizer|at least two tokens"):
        verify(model, tmp_path / "m.gguf", "")


# ── Ollama ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def with_tokens(*tokens: str, template: str | None = None) -> CanonicalModel:
    """A tiny model whose last tokens are these control tokens."""
    model = make_model(make_hyper("llama"))
    metadata = dict(model.metadata)
    names, types = list(metadata["tokenizer.ggml.tokens"]), metadata["tokenizer.ggml.token_type"].copy()
    for i, token in enumerate(tokens, len(names) - len(tokens)):
        names[i], types[i] = token, 3
    metadata |= {"tokenizer.ggml.tokens": names, "tokenizer.ggml.token_type": types}
    return replace(model, metadata=metadata | ({"tokenizer.chat_template": template} if template else {}))


def go_template(text: str, messages: list[dict[str, str]]) -> str:
    """Go's text/template, as far as the Modelfiles use it."""
    system = any(m["role"] == "system" for m in messages)
    text = re.sub(r"\{\{ if not \.System \}\}(.*?)\{\{ end \}\}", lambda m: "" if system else m[1], text, flags=re.DOTALL)
    before, text = text[: text.index("{{ range")], text[text.index("{{ range") :]
    loop = re.fullmatch(r"\{\{ range \.Messages \}\}((?:\{\{ if .*?\{\{ end \}\})*)\{\{ end \}\}(.*)", text, re.DOTALL)
    assert loop
    turns = dict(re.findall(r'\{\{ if eq \.Role "(\w+)" \}\}(.*?)\{\{ end \}\}', loop[1], re.DOTALL))
    return before + "".join(turns[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + loop[2]


CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "plain"])
def test_the_go_template_renders_what_the_built_in_one_does(name: str, messages: list[dict[str, str]]):
    row = BUILT_IN[name]
    model = with_tokens(*row.needs)
    text, notes = modelfile("model.gguf", model.metadata, model.hyper, Path("m"))
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert template
    assert go_template(template[1], messages) == row.render(messages, add_generation_prompt=True)
    assert not notes
    for stop in row.stop:
        assert f'PARAMETER stop "{stop}"' in text
    assert 'PARAMETER stop "</s>"' in text
    assert "PARAMETER num_ctx 64" in text
    assert text.startswith("FROM ./model.gguf\n")


def test_a_template_of_another_kind_is_left_to_ollama():
    model = with_tokens(template="{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}")
    text, notes = modelfile("model.gguf", model.metadata, model.hyper, Path("m"))
    assert "TEMPLATE" not in text
    assert "none of the built-in ones" in notes[0]


def test_a_model_without_a_template_continues_the_prompt():
    model = with_tokens()
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile("model.gguf", model.metadata, model.hyper, Path("m"))[0]


def test_ollama_gets_a_folder_with_both_files(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for quant in ("q4_0", "q8_0"):  # the second replaces the first
        run(source, "-o", tmp_path / "friend", "--to", "ollama", "--quant", quant)
    assert sorted(path.name for path in (tmp_path / "friend").iterdir()) == ["Modelfile", "model.gguf"]
    with open_model(tmp_path / "friend" / "model.gguf") as file:
        assert file.tensors["blk.0.attn_q.weight"].format.name == "Q8_0"
        assert file.metadata["general.name"] == "tiny"
    assert "ollama create friend -f" in capsys.readouterr().out


def test_the_gelu_that_llama_cpp_does_not_know_is_named(tmp_path: Path):
    receipt = export(make_model(make_hyper("gpt2", **{**GPT2, "activation": "gelu_erf"})), "c", tmp_path / "m.gguf")
    assert any("tanh formula" in line for line in receipt.lines())
