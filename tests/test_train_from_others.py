"""`--from` weights that others trained: what the decoder computes is what their own code does, and what comes of it runs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the trainer is PyTorch")

from canonical_models import GPT2 as GPT2_HYPER  # noqa: E402
from canonical_models import logits_of, make_hyper, make_model  # noqa: E402
from torch_models import GPT  # noqa: E402

import pocketlm  # noqa: E402
from pocketlm import cli, tokenizer  # noqa: E402
from pocketlm.errors import FileError  # noqa: E402
from pocketlm.export.export import export  # noqa: E402
from pocketlm.train.presets import Settings  # noqa: E402
from pocketlm.train.starting_weights import read_start  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TEXT = "".join(f"line {i}: the quick brown fox {i * 7919 % 1000} jumps.\n" for i in range(400))
IDS = [3, 14, 15, 9, 26, 5, 35, 58, 0, 60, 7, 7]


def logits(path: Path) -> np.ndarray:
    decoder, _ = read_start(path, Settings())
    with torch.no_grad():
        return decoder.eval()(torch.tensor([IDS]))[0].numpy()


def close(ours: np.ndarray, theirs: Any, places: float = 2e-4) -> bool:
    theirs = theirs.numpy() if hasattr(theirs, "numpy") else theirs
    return float(np.abs(theirs).max()) > 0.05 and float(np.abs(ours - theirs).max()) < places


def randomised(model: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def hugging_face(kind: str, folder: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="makes the folders")
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=61, n_positions=24)
        model = transformers.GPT2LMHeadModel(config)
    else:
        others = {"attention_bias": True} if kind == "llama with biases" else {}
        config = transformers.LlamaConfig(
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=48,
            vocab_size=61, max_position_embeddings=24, tie_word_embeddings=kind == "llama, tied", **others,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    randomised(model).save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama, tied", "llama with biases"])
def test_a_hugging_face_folder_computes_the_same(tmp_path: Path, kind: str) -> None:
    model = hugging_face(kind, tmp_path)
    with torch.no_grad():
        assert close(logits(tmp_path), model(torch.tensor([IDS])).logits[0])


@pytest.mark.parametrize("bias", [True, False])
def test_a_nanogpt_checkpoint_computes_the_same(tmp_path: Path, bias: bool) -> None:
    model = randomised(GPT(bias=bias))
    arguments = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "bias": bias, "vocab_size": 61, "dropout": 0.0}
    torch.save({"model": model.state_dict(), "model_args": arguments, "iter_num": 5}, tmp_path / "ckpt.pt")
    with torch.no_grad():
        assert close(logits(tmp_path / "ckpt.pt"), model(torch.tensor(IDS)))
    decoder, _ = read_start(tmp_path / "ckpt.pt", Settings())
    assert decoder.shape.bias == bias


HYPERS = {
    "llama": make_hyper("llama"), "gpt2": make_hyper("gpt2", **GPT2_HYPER),
    "ALiBi": make_hyper("refact", position="alibi", n_kv_head=6),
    "half pairs": make_hyper(rope=pocketlm.runtime.hyper.Rope(10000.0, 8, "half", original_ctx=64)),
    "exact GELU": make_hyper(norm="layer", position="learned", activation="gelu_erf", gated=False),
}  # fmt: skip


@pytest.mark.parametrize("quant", ["f32", "f16"])
@pytest.mark.parametrize("name", HYPERS)
def test_a_gguf_computes_the_same(tmp_path: Path, name: str, quant: str) -> None:
    bias = HYPERS[name].norm == "layer"
    model = make_model(HYPERS[name], tied=name != "llama", bias=bias, fused=name == "gpt2")
    export(model, "test", tmp_path / "m.gguf", quant=quant)
    assert close(logits(tmp_path / "m.gguf"), logits_of(model, np.array(IDS)), 2e-3 if quant == "f32" else 0.1)


def test_a_quantised_gguf_says_what_it_lost(tmp_path: Path) -> None:
    export(make_model(make_hyper(n_embd=96, head_dim=16)), "test", tmp_path / "m.gguf", quant="q8_0")
    _, notes = read_start(tmp_path / "m.gguf", Settings())
    assert any("what that lost stays lost" in note for note in notes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activation": "relu"}, "has activation = relu"), ({"head_dim": 4}, "has head_dim = 4"),
        ({"rope": pocketlm.runtime.hyper.Rope(10000.0, 4, "interleaved", original_ctx=64)}, "has rope"),
        ({"position": "alibi", "n_kv_head": 6, "alibi_max_bias": 4.0}, "has alibi_max_bias = 4.0"),
    ],
)  # fmt: skip
def test_a_model_that_the_decoder_cannot_be_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    export(make_model(make_hyper(**options)), "test", tmp_path / "m.gguf", quant="f32")
    with pytest.raises(FileError, match=said):
        read_start(tmp_path / "m.gguf", Settings())


# ── end to end ───────────────────────────────────────────────────────────────────────────────────────────────────────

SHORT = "--steps 3 --batch 2 --micro-batch 2 --warmup 1 --context 16 --threads 1 --lr 1e-4 --eval-every 3"


def go_on(folder: Path, start: Path, *words: str) -> Path:
    (folder / "text.txt").write_text(TEXT)
    given = ["train", str(folder / "text.txt"), "--val", str(folder / "text.txt"), "-o", str(folder / "run")]
    assert cli.main([*given, "--from", str(start), *SHORT.split(), *words]) == 0
    return folder / "run"


def answers(run: Path, out: Path) -> list[int]:
    assert cli.main(["export", str(run), "-o", str(out), "--quant", "f32"]) == 0
    with pocketlm.load(out, backend="numpy") as model:
        return model.tokenizer.encode("the quick brown fox")


def test_a_gguf_is_trained_further_with_its_tokenizer_and_template(tmp_path: Path) -> None:
    model = make_model(make_hyper("llama"))
    model.metadata["tokenizer.chat_template"] = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    export(model, "test", tmp_path / "m.gguf", quant="f16")
    run = go_on(tmp_path, tmp_path / "m.gguf")
    assert (run / "chat_template.jinja").read_text() == model.metadata["tokenizer.chat_template"]
    with pocketlm.load(tmp_path / "m.gguf", backend="numpy") as before:
        assert answers(run, tmp_path / "out.gguf") == before.tokenizer.encode("the quick brown fox")
        with pocketlm.load(tmp_path / "out.gguf", backend="numpy") as after:
            moved = np.abs(after.logits(IDS) - before.logits(IDS)).max()
            assert 0 < moved < 0.1


def test_a_hugging_face_folder_is_trained_further_with_its_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="trains the vocabulary")
    transformers = pytest.importorskip("transformers", reason="makes the folders")
    tok = tokenizers.ByteLevelBPETokenizer()
    tok.train_from_iterator([TEXT], 300, special_tokens=["<|endoftext|>"])
    theirs = tmp_path / "theirs"
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=tok.get_vocab_size(), n_positions=24)
    transformers.GPT2LMHeadModel(config).save_pretrained(theirs)
    tok.save(str(theirs / "tokenizer.json"))
    (theirs / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    run = go_on(tmp_path, theirs)
    assert answers(run, tmp_path / "out.gguf") == tok.encode("the quick brown fox").ids


def test_a_nanogpt_checkpoint_is_trained_further_with_the_characters_of_its_data(tmp_path: Path) -> None:
    characters = ["<|endoftext|>", *sorted({*TEXT})]
    table: dict[str, Any] = {"stoi": {c: i for i, c in enumerate(characters)}, "itos": dict(enumerate(characters))}
    (tmp_path / "data" / "chars").mkdir(parents=True)
    (tmp_path / "data" / "chars" / "meta.pkl").write_bytes(pickle.dumps(table))
    (tmp_path / "out").mkdir()
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "bias": False, "vocab_size": len(characters)}
    content = {"model": GPT(vocab_size=len(characters), bias=False).state_dict(), "model_args": shape}
    torch.save({**content, "config": {"dataset": "chars"}}, tmp_path / "out" / "ckpt.pt")
    run = go_on(tmp_path, tmp_path / "out" / "ckpt.pt")
    assert answers(run, tmp_path / "out.gguf") == [table["stoi"][c] for c in "the quick brown fox"]


def test_a_run_goes_on_in_another_from_its_best_weights(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    shape = "--set n_layer=1 --set n_embd=16 --set n_head=2 --set n_ctx=16 --set n_ff=16 --tokenizer characters"
    words = ["train", str(tmp_path / "text.txt"), "--val", str(tmp_path / "text.txt"), "-o", str(tmp_path / "first")]
    assert cli.main([*words, *shape.split(), *SHORT.split()]) == 0
    both = [read_start(path, Settings())[0].state_dict() for path in (tmp_path / "first", tmp_path / "first" / "best.pt")]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    run = go_on(tmp_path, tmp_path / "first")
    own, before = (tokenizer.load(folder) for folder in (run, tmp_path / "first"))
    assert (own.encode(TEXT), own.vocabulary.tokens) == (before.encode(TEXT), before.vocabulary.tokens)


def test_weights_that_do_not_say_their_shape_are_told_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    characters = [*sorted({*TEXT})]
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {c: i for i, c in enumerate(characters)}}))
    model = randomised(GPT(vocab_size=len(characters) + 1, bias=False))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    told = ["--set", "n_head=4", "--tokenizer", str(tmp_path / "meta.pkl")]
    run = go_on(tmp_path, tmp_path / "weights.pt", *told, "--lr", "1e-9")
    ids = answers(run, tmp_path / "out.gguf")
    with torch.no_grad(), pocketlm.load(tmp_path / "out.gguf", backend="numpy") as after:
        assert close(after.logits(ids), model(torch.tensor(ids)), 1e-3)
    words = ["train", str(tmp_path / "text.txt"), "-o", str(tmp_path / "other"), "--from", str(tmp_path / "out.gguf")]
    assert cli.main([*words, "--set", "n_head=2"]) == 2
    assert "out.gguf says all of it" in capsys.readouterr().err
