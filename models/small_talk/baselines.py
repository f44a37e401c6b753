"""How well a model file predicts a held-out split, in bits per character, beside unigram and bigram models.

In: a model file and the `data/` of a run. Out: a table. All predictors see the same tokens (those the mask says to learn:
what is said and the ends of turns), predict the same ones, and their bits are divided by the same number of characters.
Knows no PyTorch: the model is run as its users run it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.errors import UsageError
from pocketlm.runtime.evaluation import cross_entropy
from pocketlm.train.data import Corpus, open_corpus

TURN = "\n"  # stands for the end of a turn where characters are counted


def kneser_ney(before: np.ndarray, after: np.ndarray, n_symbols: int) -> Any:
    """Bits of (before, after) pairs under a unigram and a bigram counted from these pairs, as a function of other pairs.

    Unigram: add-one smoothing. Bigram: interpolated Kneser-Ney with the discount n1 / (n1 + 2 n2) (Ney, Essen and Kneser
    1994), its lower order mixed with the uniform distribution in the same way.
    """
    pairs, counts = np.unique(before.astype(np.int64) * n_symbols + after, return_counts=True)
    n1, n2 = (int((counts == n).sum()) for n in (1, 2))
    discount = n1 / max(n1 + 2 * n2, 1)
    total = np.bincount(before, minlength=n_symbols)
    kinds = np.bincount(pairs // n_symbols, minlength=n_symbols)  # different symbols after each
    heads = np.bincount(pairs % n_symbols, minlength=n_symbols)  # different symbols before each
    lower = np.maximum(heads - discount, 0) / len(pairs) + discount * (heads > 0).sum() / len(pairs) / n_symbols
    single = (np.bincount(after, minlength=n_symbols) + 1) / (len(after) + n_symbols)

    def bits(b: np.ndarray, a: np.ndarray) -> tuple[float, float]:
        keys = b.astype(np.int64) * n_symbols + a
        places = np.minimum(np.searchsorted(pairs, keys), len(pairs) - 1)
        found = np.where(pairs[places] == keys, counts[places], 0)
        known = np.maximum(total[b], 1)
        weight = np.where(total[b] > 0, discount * kinds[b] / known, 1.0)
        both = np.maximum(found - discount, 0) / known + weight * lower[a]
        return float(-np.log2(single[a]).sum()), float(-np.log2(both).sum())

    return bits


def learnt_pairs(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """(token before, learnt token) of all blocks, one after the other."""
    blocks = [corpus.block(n) for n in range(corpus.n_blocks())]
    ids, targets, masks = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return ids[masks > 0], targets[masks > 0]


def model_bits(model: Any, corpus: Corpus) -> float:
    """Bits of the learnt tokens under a loaded model, block by block from an empty context."""
    nats = 0.0
    for number in range(corpus.n_blocks()):
        ids, targets, mask = corpus.block(number)
        nats += cross_entropy(model.logits(ids.tolist())[mask > 0].astype(np.float64), targets[mask > 0])
    return nats / math.log(2)


def _texts(targets: np.ndarray, tok: Any) -> Iterator[str]:
    """What is said, turn by turn, from learnt tokens."""
    ends = np.flatnonzero(np.isin(targets, sorted(tok.end_ids)))
    for start, stop in zip([0, *(ends + 1)], [*ends, len(targets)], strict=True):
        yield tok.decode(targets[start:stop].tolist())


def table(path: Path, data: Path) -> list[str]:
    """The lines of the comparison. Raises FileError or UsageError."""
    import pocketlm

    with pocketlm.load(path) as model:
        tok = model.tokenizer
        train, val = (open_corpus(data, split, model.n_ctx, tok.n_vocab) for split in ("train", "val"))
        seen, held_out = learnt_pairs(train), learnt_pairs(val)
        texts = list(_texts(held_out[1], tok))
        n_characters = sum(map(len, texts))
        tokens = kneser_ney(*seen, tok.n_vocab)(*held_out)
        rows: dict[str, float] = {"unigram of tokens": tokens[0], "bigram of tokens": tokens[1]}
        codes = [np.array([min(ord(c), 255) for c in TURN.join(t)]) for t in (_texts(seen[1], tok), texts)]
        characters = kneser_ney(codes[0][:-1], codes[0][1:], 256)(codes[1][:-1], codes[1][1:])
        rows |= {"unigram of characters": characters[0], "bigram of characters": characters[1]}
        rows[f"the model ({path.name})"] = model_bits(model, val)
    best = rows["bigram of tokens"]
    lines = [f"| {name} | {bits / n_characters:.3f} | {bits / best - 1:+.1%} |" for name, bits in rows.items()]
    head = f"{len(held_out[1]):,} tokens, {n_characters:,} characters of the validation split"
    return [head, "", "| predictor | bits per character | beside the bigram of tokens |", "|---|---|---|", *lines]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(str(UsageError("usage: python -m pocketlm.models.small_talk.baselines MODEL.gguf RUN/data")))
    print(*table(Path(sys.argv[1]), Path(sys.argv[2])), sep="\n")
