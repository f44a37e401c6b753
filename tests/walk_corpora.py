"""Small corpora for the walks of train/WALKS.md, each as its author had it: texts, dialogues, ids and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import languages
import numpy as np
import peer_tokenizers as peers

TURKISH = {
    "Merhaba!": "Merhaba! Bugün nasılsın?", "Adın ne?": "Benim adım Deniz.", "En sevdiğin renk ne?": "Mavi, gökyüzü gibi.",
    "Çay içer misin?": "Evet, şekersiz bir çay lütfen.", "Nerelisin?": "İstanbul'da büyüdüm.", "Hoşça kal!": "Görüşürüz!",
}  # fmt: skip
RUSSIAN = {
    "Привет!": "Здравствуй! Рад тебя видеть.", "Кто ты?": "Я маленькая языковая модель.", "Что ты любишь?": "Я люблю чай.",
    "Как дела?": "Всё хорошо, спасибо.", "Где ты живёшь?": "Я живу в твоём компьютере.", "Пока!": "До встречи!",
}  # fmt: skip
POLISH = {
    "Cześć!": "Cześć! Miło cię widzieć.", "Jak się masz?": "Świetnie, dziękuję!", "Jak masz na imię?": "Mam na imię Wanda.",
    "Gdzie mieszkasz?": "Mieszkam w małym pudełku.", "Co lubisz?": "Lubię gżegżółki i herbatę.", "Pa!": "Do zobaczenia!",
}  # fmt: skip
ENGLISH = {
    "Hello!": "Hello! How are you?", "What is your name?": "My name is Ada.", "What do you like?": "I like long walks.",
    "Where do you live?": "I live in this file.", "Do you drink tea?": "No, but I like the smell.", "Bye!": "See you soon!",
}  # fmt: skip
ROLES = ("user", "assistant")


def prose(text: str, turn: int, n_characters: int = 9000) -> str:
    """The sentences of a text in many orders, in paragraphs; others for another `turn`."""
    lines = languages.long(text, n_characters * (turn + 1)).splitlines()
    return "\n\n".join(lines[turn :: turn + 1]) + "\n"


def dialogues(path: Path, answers: dict[str, str]) -> None:
    """Conversations of one turn, and of two, in which every question has its answer."""
    pairs = [*answers.items()]
    talks = [[pair] for pair in pairs * 12] + [[pairs[i], pairs[i - 1]] for i in range(len(pairs))]
    rows = [
        {"messages": [{"role": role, "content": text} for turn in talk for role, text in zip(ROLES, turn, strict=True)]}
        for talk in talks
    ]
    write_rows(path, rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def turkish_gpt2(folder: Path) -> None:
    for i in range(3):
        (folder / f"wiki-{i + 1}.txt").write_text(prose(f"İstanbul\n{languages.TURKISH}", i), encoding="utf-8")
    words = ("kar", "kâr", "rüzgâr", "ağaç", "ışık", "gemi", "çay", "bal")
    entries = "".join(f"{word}: {other} gibi bir söz, {i}. anlamı.\n\n" for i, word in enumerate(words * 20) for other in words)
    (folder / "sozluk.txt").write_text(entries[:9000], encoding="utf-8")
    (folder / "held-out.txt").write_text(prose(languages.TURKISH, 4, 3000), encoding="utf-8")
    dialogues(folder / "sohbet.jsonl", TURKISH)


def turkish_alibi(folder: Path) -> None:
    """A tokenizer that the library `tokenizers` made, and documents as uint16 ids, BOS and EOS around each."""
    texts = [prose(languages.TURKISH, i) for i in range(2)]
    made = peers.byte_level(texts, 700, special=["<pad>", "<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    ids = [id for document in texts[0].split("\n\n") for id in [1, *made.encode(document).ids, 2]]
    np.array(ids, np.uint16).tofile(folder / "train.bin")
    (folder / "wiki.txt").write_text(texts[1], encoding="utf-8")
    sums = "".join(f"{a} artı {b} eşittir {a + b}.\n\n" for a in range(1, 20) for b in range(1, 20))
    (folder / "matematik.txt").write_text(sums, encoding="utf-8")
    (folder / "held-out.txt").write_text(prose(languages.TURKISH, 4, 3000), encoding="utf-8")
    dialogues(folder / "sohbet.jsonl", TURKISH)


def russian(folder: Path) -> None:
    """With the assistant's tokenizer as its author made it: 0 for what is unknown, 1 a control token, 2 to 5 the markers."""
    import sentencepiece

    for name, turn in (("chekhov", 0), ("classics", 1), ("held-out", 4)):
        (folder / f"{name}.txt").write_text(prose(languages.RUSSIAN, turn, 9000 if turn < 4 else 3000), encoding="utf-8")
    (folder / "symbols.txt").write_text("—\n«\n»\n…\n", encoding="utf-8")
    (folder / "yo.tsv").write_text("ё\tе\nЁ\tЕ\n", encoding="utf-8")
    dialogues(folder / "dialogues.jsonl", RUSSIAN)
    said = "\n".join([*RUSSIAN, *RUSSIAN.values()] * 20)
    (folder / "all.txt").write_text(prose(languages.RUSSIAN, 0) + said, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "all.txt"), model_prefix=str(folder / "assistant"), model_type="bpe", vocab_size=600, unk_id=0,
        bos_id=-1, eos_id=1, pad_id=-1, byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
        user_defined_symbols=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False,
    )  # fmt: skip
    (folder / "all.txt").unlink()


def polish(folder: Path) -> None:
    for name, turn in (("proza", 0), ("gazety", 1), ("held-out", 4)):
        (folder / f"{name}.txt").write_text(prose(languages.POLISH, turn, 9000 if turn < 4 else 3000), encoding="utf-8")
    dialogues(folder / "rozmowy.jsonl", POLISH)


def colab(folder: Path) -> None:
    """Ranks as tiktoken keeps them, and a corpus that it has made ids of."""
    ranks = (Path(__file__).with_name("vectors") / "tiktoken-gpt-2.tiktoken").read_bytes()
    (folder / "gpt2.tiktoken").write_bytes(ranks)
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    encoding = peers.encoding(ranks, pattern, {"<|endoftext|>": ranks.count(b"\n")})
    web = prose(languages.ENGLISH, 0, 12000).replace("\n\n", "<|endoftext|>")
    np.save(folder / "web.npy", np.array(encoding.encode(web, allowed_special="all"), np.uint16))
    for name, turn in (("books", 1), ("stories", 2), ("held-out", 4)):
        (folder / f"{name}.txt").write_text(prose(languages.ENGLISH, turn, 6000), encoding="utf-8")
    rows = [{"instruction": asked, "input": "", "output": answer} for asked, answer in ENGLISH.items()]
    write_rows(folder / "instructions.jsonl", rows * 20)
