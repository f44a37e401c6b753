"""Chat markers: added to a vocabulary that lacks them, or its own; conversations and their ends are learnt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from languages import ENGLISH
from test_train_vocabularies import (
    SAMPLES,
    SMALL,
    exported,
    from_sentencepiece,
    from_tiktoken,
    from_tokenizer_json,
    from_vocab_and_merges,
    sentencepiece,
    texts,
    torch,
    train,
)  # fmt: skip

from pocketlm import load, tokenizer
from pocketlm.chat.templates import BUILT_IN, choose
from pocketlm.errors import PocketlmError
from pocketlm.train import checkpoints, vocabularies
from pocketlm.train.data import CHATS, Encoder, markers_of
from pocketlm.train.decoder import Decoder
from pocketlm.train.presets import Shape
from pocketlm.train.starting_weights import add_rows

pytestmark = pytest.mark.usefixtures("one_torch_thread")
TALK = "".join(
    json.dumps({"system": "Be brief.", "instruction": asked, "output": said}) + "\n"
    for asked, said in [("Кто ты?", "Лиса."), ("Kimsin?", "Bir tilki."), ("Kim jesteś?", "Lisem.")] * 20
)


def kept(taken: tokenizer.Tokenizer, markers: tuple[str, ...], folder: Path) -> tokenizer.Tokenizer:
    """As a run keeps it."""
    (folder / "vocab.json").write_text(vocabularies.taken_as(taken, markers), encoding="utf-8")
    return tokenizer.load(folder)


@pytest.mark.parametrize("source", [from_tokenizer_json, from_tiktoken, from_vocab_and_merges], ids=lambda s: s.__name__)
@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_base_without_markers_is_taught_to_chat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: Callable[[Path], tuple[Path, Any]], tied: str
) -> None:
    path, encode = source(tmp_path)
    base, talk = tmp_path / "base" / "last.pt", tmp_path / "talk.jsonl"
    talk.write_text(TALK, encoding="utf-8")
    shape = ("--set", f"tied={tied}", "--set", "n_ctx=64")
    assert train(*texts(tmp_path / "texts"), "-o", tmp_path / "base", "--tokenizer", path, *shape) == 0
    tuning = (talk, "-o", tmp_path / "tuned", "--from", base, "--chat", "markers")
    options = "--steps 150 --batch 4 --micro-batch 4 --warmup 5 --lr 1e-2 --threads 1 --eval-every 150"
    assert train(*tuning, options=options) == 1
    assert "the chat marker <|system|> splits into" in (line := capsys.readouterr().err.splitlines()[-1])
    assert "add it with --add-markers" in line
    tuning = (talk, "-o", tmp_path / "tuned2", "--from", base, "--chat", "markers", "--add-markers")
    assert train(*tuning, options=options) == 0
    before, after = checkpoints.read(base), checkpoints.read(tmp_path / "tuned2" / "last.pt")
    assert after["shape"].n_vocab == before["shape"].n_vocab + 4
    assert ("head.weight" in after["model"]) == (tied == "false")
    tok = exported(tmp_path / "tuned2")
    for marker in markers_of("markers"):
        assert tok.encode(marker, special=True) == [tok.token_id(marker)]
    assert all(tok.encode(text) == encode(text) for text in SAMPLES)
    with load(tmp_path / "tuned2.gguf", backend="numpy") as model:
        said = model.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Kimsin?"}], temperature=0)
        assert "".join(piece.text for piece in said) == "Bir tilki."


@pytest.mark.parametrize(
    ("rule", "prefix", "collapse"),
    [("nmt_nfkc", True, True), ("identity", True, True), ("nmt_nfkc", True, False), ("identity", False, False)],
)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("chat", CHATS)
def test_conversations_in_any_sentencepiece_are_the_chats_and_their_ends_are_learnt(
    tmp_path: Path, rule: str, prefix: bool, collapse: bool, added: bool, chat: str
) -> None:
    own = [] if added else list(markers_of(chat))
    sentencepiece.SentencePieceTrainer.train(
        input=",".join(map(str, texts(tmp_path / "texts"))), model_prefix=str(tmp_path / "m"), model_type="bpe", vocab_size=700,
        byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2, normalization_rule_name=rule,
        add_dummy_prefix=prefix, remove_extra_whitespaces=collapse, user_defined_symbols=own,
    )  # fmt: skip
    tok = tokenizer.load(tmp_path / "m.model")
    if added:
        (tmp_path / "run").mkdir()
        tok = kept(tok, markers_of(chat), tmp_path / "run")
    talk = [("system", "Be brief."), ("user", "Кто  ты?"), ("assistant", "Лиса. Да."), ("user", "И?"), ("assistant", "Kâr.")]
    messages = [{"role": role, "content": content} for role, content in talk]
    ids, mask = Encoder(tok, chat, ("assistant",), tmp_path).encode(messages, True)
    template = choose(BUILT_IN[chat].jinja, tok)
    whole = template.encode(messages, tok, add_generation_prompt=False)
    assert [*whole, tok.eos_id] == ids
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    if not added:
        assert library.encode(template.render(messages, add_generation_prompt=False)) == whole
    end = markers_of(chat)[-1]
    learnt = tok.decode([i for i, m in zip(ids, mask, strict=True) if m], special=True)
    assert [part.strip() for part in learnt.split(end)] == ["Лиса. Да.", "Kâr.", ""]


def test_a_sentencepiece_with_markers_of_its_own_learns_to_answer_and_to_end(tmp_path: Path) -> None:
    path, _ = from_sentencepiece(tmp_path)
    (tmp_path / "talk.jsonl").write_text(TALK, encoding="utf-8")
    options = f"{SMALL} --set n_ctx=64 --steps 150 --batch 4 --micro-batch 4 --warmup 5 --lr 1e-2 --eval-every 150"
    run = ("-o", tmp_path / "run", "--chat", "markers", "--tokenizer", path)
    assert train(tmp_path / "talk.jsonl", *run, options=options) == 0
    exported(tmp_path / "run")
    with load(tmp_path / "run.gguf", backend="numpy") as model:
        asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Kimsin?"}]
        said = model.chat(asked, temperature=0)
        assert "".join(piece.text for piece in said).strip() == "Bir tilki."


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_leave_the_old_ones_and_lie_near_their_mean(tied: bool) -> None:
    model = Decoder(Shape(1, 1, 8, 50, 16, tied=tied))
    old = {name: weight.detach().clone() + 3.0 for name, weight in model.named_parameters()}
    model.load_state_dict(old)
    add_rows(model, 46, 53)
    assert model.shape.n_vocab == 53
    assert model(torch.tensor([[52, 1]])).shape == (1, 2, 53)
    for name, weight in model.named_parameters():
        if name not in ("tok_emb.weight", "head.weight"):
            assert torch.equal(weight, old[name])
            continue
        assert weight.shape == (53, 8)
        assert torch.equal(weight[:46], old[name][:46])
        assert (weight[46:] - old[name][:46].mean(0)).abs().max() < 0.6 * old[name].std()
        assert len({tuple(row) for row in weight[46:].tolist()}) == 7


def test_markers_of_a_vocabulary_that_has_all_but_one_are_an_error(tmp_path: Path) -> None:
    wanted = vocabularies.Wanted(400, ("<|user|>", "<|assistant|>", "<|end|>"))
    tok = vocabularies.make_tokenizer("bytes", [ENGLISH], wanted, tmp_path)
    with pytest.raises(PocketlmError, match=r"the chat marker <\|system\|> splits into \d+ tokens"):
        vocabularies.check_markers(tok, markers_of("markers"), tmp_path)
    (tmp_path / "run").mkdir()
    grown = kept(tok, markers_of("markers"), tmp_path / "run")
    vocabularies.check_markers(grown, markers_of("markers"), tmp_path)
    assert grown.n_vocab == tok.n_vocab + 1
