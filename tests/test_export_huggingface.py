"""The folder that `--to huggingface` writes, as the libraries of Hugging Face read it: same logits, same ids, same chats."""

from __future__ import annotations

import json
import lzma
import unicodedata
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from canonical_models import GPT2, N_VOCAB, logits_of, make_hyper, make_model
from make_vectors import FOLDER, MARKERS, WRITTEN
from tiny_models import write_model
from tokenizer_texts import texts

from pocketlm.chat.templates import choose
from pocketlm.errors import FileError, UsageError
from pocketlm.export.canonical import CanonicalModel, CanonicalTensor
from pocketlm.export.dialects import read_canonical
from pocketlm.export.export import container_for, export
from pocketlm.export.from_model_file import read_model_file
from pocketlm.export.safetensors_reader import read_safetensors
from pocketlm.export.verify import verify
from pocketlm.runtime.hyper import Rope
from pocketlm.runtime.positions import llama3_factors
from pocketlm.tokenizer import Tokenizer, from_metadata, load, to_metadata
from pocketlm.tokenizer.base import CONTROL, USER_DEFINED
from pocketlm.tokenizer.characters import from_table
from pocketlm.tokenizer.huggingface_writer import to_tokenizer_json
from pocketlm.tokenizer.sentencepiece_bpe import SentencePieceBPE

IDS = np.random.default_rng(3).integers(0, N_VOCAB, 40)
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}{{ bos_token }}"
HALF = Rope(500.0, 8, "half", original_ctx=64)
MODELS: dict[str, CanonicalModel] = {
    "llama": make_model(make_hyper("llama")),
    "llama, untied, biases of attention": make_model(make_hyper("llama"), tied=False),
    "llama, wide heads, geglu, half pairs": make_model(
        make_hyper("pocketlm", head_dim=16, activation="gelu_erf", rope=replace(HALF, n_dims=16))
    ),
    "llama, q, k, v in one tensor": make_model(make_hyper("llama"), fused=True),
    "linear scaling": make_model(make_hyper("llama", rope=replace(HALF, scaling="linear", factor=4.0))),
    "yarn": make_model(
        make_hyper("llama", rope=Rope(10000.0, 8, "interleaved", "yarn", 4.0, 16, attention_factor=1.1, beta_fast=16.0))
    ),
    "gpt2": make_model(make_hyper("gpt2", **GPT2), bias=True, fused=True),
    "gpt2, no biases, exact GELU, untied": make_model(make_hyper("gpt2", **GPT2 | {"activation": "gelu_erf"}), tied=False),
    "gpt2, relu, q, k, v apart": make_model(make_hyper("pocketlm", **GPT2 | {"activation": "relu"}), bias=True),
    "starcoder2": make_model(make_hyper("pocketlm", norm="layer", gated=False, activation="gelu_tanh"), bias=True),
    "starcoder2, no biases": make_model(make_hyper("pocketlm", norm="layer", gated=False, activation="silu")),
}  # fmt: skip


def with_attention_biases(model: CanonicalModel, *parts: str) -> CanonicalModel:
    """The model with biases on some products of every layer."""
    random, tensors = np.random.default_rng(9), dict(model.tensors)
    for name, tensor in model.tensors.items():
        if name.endswith(tuple(f"{part}.weight" for part in parts)):
            bias = random.standard_normal(tensor.shape[0]).astype(np.float32)
            tensors[name.replace(".weight", ".bias")] = CanonicalTensor(bias.shape, bias.copy)
    return replace(model, tensors=tensors)


def with_factors(model: CanonicalModel, factors: np.ndarray) -> CanonicalModel:
    factor = CanonicalTensor(factors.shape, factors.copy)
    return replace(model, tensors={**model.tensors, "rope_freqs.weight": factor})


MODELS |= {
    "llama, biases of attention as Qwen2": with_attention_biases(MODELS["llama"], "attn_q", "attn_k", "attn_v"),
    "llama, biases of the feed-forward": with_attention_biases(MODELS["llama"], "ffn_up", "ffn_gate"),
    "llama 3's factors": with_factors(MODELS["llama"], llama3_factors(10000.0, 8, 8.0, 1.0, 4.0, 8192)),
    "factors of one's own": with_factors(MODELS["llama"], np.array([1.0, 1.5, 2.5, 7.0], np.float32)),
}


def write(model: CanonicalModel, path: Path, quant: str = "f32") -> Path:
    export(model, "checkpoint.pt", path, container="huggingface", quant=quant)
    return path


def their_logits(folder: Path, ids: Iterable[int]) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.inference_mode():
        return model.eval()(torch.tensor([[*map(int, ids)]])).logits[0].numpy()


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    expected = logits_of(model, IDS)
    found = their_logits(write(model, tmp_path / "hf"), IDS)
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1.0, np.abs(expected).max()), rtol=0)


@pytest.mark.parametrize("format", ["Q8_0", "Q4_0"])
def test_a_quantised_file_becomes_its_dequantised_values(format: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", arch="llama", n_kv_head=2, format=format)
    model = read_model_file(path)
    ids = IDS % model.hyper.n_vocab
    found = their_logits(write(model, tmp_path / "hf"), ids)
    np.testing.assert_allclose(found, logits_of(model, ids), atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_exported_again_is_the_same_model(name: str, tmp_path: Path) -> None:
    again = read_canonical(write(MODELS[name], tmp_path / "hf"))
    np.testing.assert_allclose(logits_of(again, IDS), logits_of(MODELS[name], IDS), atol=1e-4)
    tokenizers = [from_metadata(model.metadata, "m") for model in (again, MODELS[name])]
    for text in ("the quick brown fox", "  zażółć\n", "</s> and <s>", ""):
        ids = [tokenizer.encode(text, special=True) for tokenizer in tokenizers]
        assert ids[0] == ids[1]
    ends = [(t.bos_id, t.eos_id, t.end_ids, t.adds_bos) for t in tokenizers]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(("quant", "dtype"), [("f16", "F16"), ("bf16", "BF16"), ("f32", "F32")])
def test_the_weights_have_the_format_that_was_asked_for(quant: str, dtype: str, tmp_path: Path) -> None:
    folder = write(MODELS["llama"], tmp_path / "hf", quant)
    tensors, metadata = read_safetensors((folder / "model.safetensors").read_bytes(), folder)
    names = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
    assert {names[tensor.dtype] for tensor in tensors.values()} == {dtype}
    assert metadata == {"format": "pt"}
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        assert set(file.keys()) == set(tensors)


def test_verify_compares_the_folder_with_the_float32_weights(tmp_path: Path) -> None:
    comparison = verify(MODELS["llama"], write(MODELS["llama"], tmp_path / "hf", "bf16"))
    assert 0.999 < comparison.cosine < 0.9999999


REFUSED = {
    "rms norm, alibi positions": make_model(make_hyper("refact", position="alibi")),
    "layer norm, learned positions and a feed-forward without a gate, 2 heads": make_model(
        make_hyper("pocketlm", **GPT2 | {"n_kv_head": 2})
    ),
    "rotary positions in 4 of a head's 8": make_model(make_hyper("pocketlm", rope=replace(HALF, n_dims=4))),
    "a token_embd.bias": with_attention_biases(MODELS["llama"], "token_embd"),
    "a blk.0.attn_norm.bias": make_model(make_hyper("pocketlm"), bias=True),
    "rotary positions scaled in this way": with_factors(MODELS["yarn"], np.ones(4, np.float32)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_class_of_transformers_computes_is_refused_with_the_reason(reason: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=reason) as found:
        write(REFUSED[reason], tmp_path / "hf")
    assert "\n" not in str(found.value)
    assert list(tmp_path.iterdir()) == []


def test_weights_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    large = np.full((48,), 1e6, np.float32)
    norm = CanonicalTensor((48,), large.copy)
    model = replace(MODELS["llama"], tensors={**MODELS["llama"].tensors, "output_norm.weight": norm})
    with pytest.raises(FileError, match="too large for float16; add --quant bf16"):
        write(model, tmp_path / "hf", "f16")
    write(model, tmp_path / "hf", "bf16")


def test_the_folder_is_named_without_an_ending(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="makes a folder"):
        container_for(tmp_path / "m.gguf", "huggingface")
    assert container_for(tmp_path / "m", "huggingface") == "huggingface"


# ── tokenizers ───────────────────────────────────────────────────────────────────────────────────────────────────────

VOCABULARIES = sorted(path.name for path in FOLDER.iterdir() if path.name != "answers.json.xz")
NOT_SAID = ("sentencepiece-symbols.model", "sentencepiece-nfkc.model.xz")  # user-defined symbols in the normalised text


def vocabulary(name: str, folder: Path) -> Tokenizer:
    data = (FOLDER / name).read_bytes()
    path = folder / name.removesuffix(".xz")
    path.write_bytes(lzma.decompress(data) if name.endswith(".xz") else data)
    return load(path)


def normalising(folder: Path) -> Tokenizer:
    """A SentencePiece vocabulary with NFKC rules that collapses spaces; its symbols are control tokens here."""
    found = vocabulary("sentencepiece-nfkc.model.xz", folder)
    assert isinstance(found, SentencePieceBPE)
    assert found.options.rules
    assert found.options.collapse_spaces
    types = bytes(CONTROL if kind == USER_DEFINED else kind for kind in found.vocabulary.types)
    return SentencePieceBPE("m", replace(found.vocabulary, types=types), found.table, found.options)


def characters(folder: Path) -> Tokenizer:
    letters = sorted({letter for text in WRITTEN for letter in text})
    return from_table("m", {letter: i + 1 for i, letter in enumerate(letters)} | {"<|endoftext|>": 0})


MADE = {"characters": characters, "NFKC rules": normalising}


@pytest.mark.parametrize("name", [*(name for name in VOCABULARIES if name not in NOT_SAID), *MADE])
def test_tokenizers_gives_the_same_ids_and_texts(name: str, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    original = MADE[name](tmp_path) if name in MADE else vocabulary(name, tmp_path)
    content, notes = to_tokenizer_json(original, original.n_vocab + 3, "m")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    theirs, again = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")), None
    if name != "gguf-default.gguf":  # whose splits are several, which pocketlm reads from a GGUF only
        again = load(tmp_path / "tokenizer.json")
    samples = [*WRITTEN, *(f"{marker}{text}{marker}" for marker in MARKERS for text in WRITTEN[:30]), *texts(300, 11)]
    for text in samples if name != "characters" else WRITTEN:
        expected = original.encode(text, special=True)
        if notes and any(unicodedata.category(letter)[0] in "MC" for letter in text):
            continue  # combining marks and control characters, as the note says
        assert theirs.encode(text, add_special_tokens=False).ids == expected, text
        assert again is None or again.encode(text, special=True) == expected, text
        with_start = original.encode(text, special=True, bos=original.adds_bos)
        assert theirs.encode(text).ids == with_start, text


def test_a_tokenizer_that_the_library_cannot_run_is_a_note_and_no_file(tmp_path: Path) -> None:
    tokenizer = vocabulary("sentencepiece-symbols.model", tmp_path)
    model = make_model(make_hyper("llama", n_vocab=tokenizer.n_vocab))
    model = replace(model, metadata=to_metadata(tokenizer, tokenizer.n_vocab))
    receipt = export(model, "checkpoint.pt", tmp_path / "hf", container="huggingface")
    assert receipt.notes[-1].startswith("there is no tokenizer.json: its tokenizer cannot be said")
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    assert (tmp_path / "hf" / "config.json").exists()


def test_a_chat_is_the_same_text_and_the_same_ids(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    path = write_model(tmp_path / "m.gguf", metadata={"tokenizer.chat_template": CHAT})
    model = read_model_file(path)
    theirs = transformers.AutoTokenizer.from_pretrained(write(model, tmp_path / "hf"))
    tokenizer = from_metadata(model.metadata, path)
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind.\n"},
        {"role": "user", "content": "  in the  "},
        {"role": "assistant", "content": "th"},
    ]
    template = choose(CHAT, tokenizer)
    assert theirs.apply_chat_template(messages, tokenize=False) == template.render(messages)
    ids = theirs.apply_chat_template(messages, return_dict=False)
    assert ids == template.encode(messages, tokenizer)
    assert theirs.decode(ids[:-1], skip_special_tokens=True) == tokenizer.decode(ids[:-1])
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    config = json.loads((tmp_path / "hf" / "generation_config.json").read_text("utf-8"))
    ends = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    assert ends[0] == tokenizer.eos_id
    assert set(ends) == set(tokenizer.end_ids)


def test_transformers_generates_what_pocketlm_does(tmp_path: Path) -> None:
    import pocketlm

    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    path = write_model(tmp_path / "m.gguf", arch="llama", n_kv_head=2, format="F32")
    folder = write(read_model_file(path), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ids = transformers.AutoTokenizer.from_pretrained(folder)("in the")["input_ids"]
    made = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    with pocketlm.load(path, backend="numpy") as model:
        ours = [piece.id for piece in model.generate("in the", max_tokens=12, temperature=0) if piece.id >= 0]
    assert made[: len(ours)] == ours
