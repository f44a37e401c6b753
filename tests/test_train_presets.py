"""Every preset, made small, from a text in one language to a model that talks: trained, exported in all formats, asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from languages import ENGLISH, POLISH, RUSSIAN, TURKISH, long

torch = pytest.importorskip("torch", reason="the trainer is PyTorch")

import pocketlm  # noqa: E402
from pocketlm import cli  # noqa: E402
from pocketlm.train import loop  # noqa: E402
from pocketlm.train.presets import PRESETS  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LANGUAGES = {  # the author's own, English for the others
    "chekhov-10m": RUSSIAN, "turkish-25m": TURKISH, "turkish-68m": TURKISH, "polish-1.3b": POLISH,
}  # fmt: skip
LIBRARIES = {"bytes": "tokenizers", "sentencepiece": "sentencepiece", "characters": "json"}
SMALL = "--set n_layer=2 --set n_embd=96 --set n_ctx=64 --set n_ff=128 --set n_vocab=400 --context 32 --batch 4 --micro-batch 2"
SHORT = "--steps 4 --warmup 1 --threads 1 --no-compile"
OUTPUTS = {"f16.gguf": "f16", "q8_0.gguf": "q8_0", "q4_0.gguf": "q4_0", "bin": "f16", "m.onnx": "f16", "int8.onnx": "int8"}


def trained(folder: Path, text: str, preset: str, *options: str) -> Path:
    for name in ("text", "val"):
        (folder / f"{name}.txt").write_text(long(text, 12000 if name == "text" else 1500), encoding="utf-8")
    words = ["train", str(folder / "text.txt"), "--val", str(folder / "val.txt"), "-o", str(folder / "run"), "--preset", preset]
    assert cli.main([*words, *f"{SMALL} {SHORT}".split(), *options]) == 0
    return folder / "run" / "last.pt"


@pytest.fixture(scope="module", params=PRESETS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    pytest.importorskip(LIBRARIES[PRESETS[request.param].tokenizer], reason="trains this kind of vocabulary")
    text = LANGUAGES.get(request.param, ENGLISH)
    return text, trained(tmp_path_factory.mktemp("preset"), text, request.param)


@pytest.mark.parametrize("output", OUTPUTS)
def test_every_preset_is_exported_in_every_format(run: tuple[str, Path], output: str, capsys: pytest.CaptureFixture[str]):
    if output.endswith(".onnx"):
        pytest.importorskip("onnx", reason="writes ONNX")
        pytest.importorskip("onnxruntime", reason="verifies ONNX")
    text, checkpoint = run
    out = checkpoint.parent / output
    words = ["export", str(checkpoint), "-o", str(out), "--quant", OUTPUTS[output]]
    assert cli.main([*words, "--verify", str(checkpoint.parent.parent / "val.txt")]) == 0
    said = capsys.readouterr().out
    assert "pocketlm's trainer" in said
    cosine = float(said.split("cosine ")[1].split()[0])
    assert cosine > 0.97
    if not output.endswith(".onnx"):
        assert cli.main(["generate", str(out), "-p", text[:12], "-n", "5", "--ignore-eos", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["generated_tokens"] == 5


def test_every_preset_talks(run: tuple[str, Path], tmp_path: Path):
    """A model of texts alone goes on with what is said to it: it never saw the markers of a chat."""
    text, checkpoint = run
    out = tmp_path / "m.gguf"
    assert cli.main(["export", str(checkpoint), "-o", str(out)]) == 0
    with pocketlm.load(out, backend="numpy") as model:
        assert model.template.name == "plain"
        assert model.template.render([{"role": "user", "content": "да"}]) == "да"
        options: dict[str, Any] = {"max_tokens": 5, "temperature": 0, "repeat_penalty": 1}
        answer = [piece.id for piece in model.chat([{"role": "user", "content": text[:12]}], **options)]
        assert answer == [piece.id for piece in model.generate(text[:12], **options)]
        assert len(answer) > 1


def conversations(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    path = folder / "talk.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows * 30), encoding="utf-8")
    return path


def test_a_model_of_another_alphabet_can_be_taught_conversations(tmp_path: Path):
    """Of characters, whose vocabulary has the letters of the roles although the text has none of them."""
    base = trained(tmp_path, RUSSIAN, "chekhov-10m", "--steps", "60", "--lr", "3e-3", "--dropout", "0")
    talk = conversations(tmp_path, [("Пора", "чинить лодку."), ("кто там", "дед и собака.")])
    tuned = ["train", str(talk), "-o", str(tmp_path / "talk"), "--from", str(base), "--context", "64", "--batch", "8"]
    options = "--steps 150 --lr 1e-2 --micro-batch 8 --threads 1 --learn all --no-compile"
    assert cli.main([*tuned, *options.split()]) == 0
    assert cli.main(["export", str(tmp_path / "talk" / "last.pt"), "-o", str(tmp_path / "m.gguf")]) == 0
    with pocketlm.load(tmp_path / "m.gguf", backend="numpy") as model:
        answer = model.chat([{"role": "user", "content": "кто там"}], temperature=0, repeat_penalty=1, max_tokens=20)
        assert "".join(piece.text for piece in answer) == "дед и собака."


def test_a_vocabulary_without_the_letters_of_roles_encodes_texts(tmp_path: Path):
    """As nanoGPT makes them; conversations are refused with the letter that is missing."""
    from pocketlm.errors import UsageError
    from pocketlm.tokenizer.characters import from_table
    from pocketlm.train.data import Encoder

    tok = from_table("vocab.json", {c: i for i, c in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"абв\n"])})
    encoder = Encoder(tok, "chatml", ("assistant",), tmp_path)
    assert encoder.encode("абв", True) == ([3, 4, 5, 0], [1, 1, 1, 1])
    with pytest.raises(UsageError, match="the vocabulary has no 'u'"):
        encoder.encode([{"role": "user", "content": "а"}], True)


def test_texts_learnt_after_conversations_keep_the_chat(tmp_path: Path):
    talk = conversations(tmp_path, [("Hi", "Hello."), ("Bye", "Farewell.")])
    words = ["-o", str(tmp_path / "talk"), *f"{SMALL} {SHORT} --tokenizer characters --learn all".split()]
    assert cli.main(["train", str(talk), "--val", str(talk), *words]) == 0
    (tmp_path / "more.txt").write_text("Hello.Farewell.ByeHi\n" * 40)
    more = [str(tmp_path / "more.txt"), "-o", str(tmp_path / "more"), "--from", str(tmp_path / "talk" / "last.pt")]
    assert cli.main(["train", *more, "--val", str(tmp_path / "more.txt"), *SHORT.split(), "--context", "32"]) == 0
    templates = [(tmp_path / run / "chat_template.jinja").read_text() for run in ("talk", "more")]
    assert templates[0] == templates[1] != ""
    assert "<|im_start|>" in templates[0]


def test_the_template_of_texts_alone_is_jinja_that_others_read_alike():
    jinja2 = pytest.importorskip("jinja2")
    from pocketlm.chat.templates import BUILT_IN, PLAIN_JINJA

    talk = [{"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant", "user", "assistant")]
    theirs = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(PLAIN_JINJA)
    assert theirs.render(messages=talk, add_generation_prompt=True) == BUILT_IN["plain"].render(talk, True)


def test_without_a_compiler_a_preset_trains_uncompiled_and_compile_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("sentencepiece", reason="trains the vocabulary")
    monkeypatch.setattr(loop.torch._inductor.config.cpp, "cxx", (None, str(tmp_path / "no-compiler")))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # what was compiled before needs no compiler
    monkeypatch.setattr(loop.torch._inductor.config, "force_disable_caches", True)
    loop.torch.compiler.reset()
    wanted = PRESETS["turkish-25m"].settings.compile
    assert wanted
    text = tmp_path / "text.txt"
    text.write_text(long(TURKISH), encoding="utf-8")
    words = ["train", str(text), "--val", str(text), "-o", str(tmp_path / "run"), "--preset", "turkish-25m"]
    options = f"{SMALL} {SHORT}".replace(" --no-compile", "").split()
    assert cli.main([*words, *options, "--compile"]) == 1
    assert "pocketlm: --compile: " in capsys.readouterr().err
    assert cli.main([*words, *options]) == 0
    assert "training without torch.compile, which is slower: " in capsys.readouterr().err
