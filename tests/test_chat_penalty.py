"""What a chat's own penalty is for: words. A model of letters answers as it was taught."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the trainer is PyTorch")

import pocketlm
from pocketlm.cli import main
from pocketlm.runtime.sampling import CHAT_PENALTY

TALKS = {  # what is asked → what is said three times in five, and else; what the question has letters of, and what not
    "А кто ты, Антон?": ("Антон.", "Гриша."),
    "Где живёшь, у реки?": ("Я живу у реки.", "Я живу дома."),
}


@pytest.mark.usefixtures("one_torch_thread")
def test_a_model_of_letters_says_in_a_chat_what_it_was_taught(tmp_path: Path) -> None:
    rows = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        for asked, (often, else_) in TALKS.items()
        for said in (often, else_, often, else_, often)
    ]
    talks = tmp_path / "talks.jsonl"
    talks.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows * 16), encoding="utf-8")
    shape = "--set n_layer=2 --set n_head=4 --set n_embd=64 --set n_ctx=128 --tokenizer characters"
    words = f"{shape} --chat markers --steps 180 --batch 8 --lr 5e-3 --warmup 10 --eval-every 180 --threads 1"
    assert main(["train", str(talks), "-o", str(tmp_path / "run"), *words.split()]) == 0
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "letters.gguf"), "--quant", "f32"]) == 0
    with pocketlm.load(tmp_path / "letters.gguf") as model:

        def answer(asked: str, **options: float) -> str:
            pieces = model.chat([{"role": "user", "content": asked}], temperature=0, max_tokens=80, **options)
            return "".join(piece.text for piece in pieces)

        likeliest = {asked: often for asked, (often, _) in TALKS.items()}
        assert {asked: answer(asked) for asked in TALKS} == likeliest
        penalised = {asked: answer(asked, repeat_penalty=CHAT_PENALTY) for asked in TALKS}
        assert penalised != likeliest, "a penalty that is asked for counts"
