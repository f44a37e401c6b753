"""Answers with drafts beside those without: python tests/draft_walk.py N [MODEL]. Prompts, seeds and options are random.

Without a model file, a tiny random model with 60 words, whose answers repeat themselves; with one, its own texts.
"""

from __future__ import annotations

import sys

import numpy as np
from native_calls import executors, host_level
from test_drafts import Eager, answer, random_options, random_prompt


def walk(n: int, path: str | None) -> None:
    rng, drafted, accepted, tokens = np.random.default_rng(9), 0, 0, 0
    if path:
        import pocketlm

        model = pocketlm.load(path, threads=1)
        executor, n_vocab = model.executor, model.tokenizer.n_vocab
    else:
        executor, n_vocab = executors(host_level(), "Q4_0", 1, n_vocab=60)[0], 60
    for number in range(n):
        prompt, options = random_prompt(rng, n_vocab), random_options(rng)
        without, _ = answer(executor, prompt, draft=False, cache=executor.cache, **options)
        odds = Eager((1, 2, 3, 7)) if number % 2 else None
        executor.cache.truncate(0)
        with_drafts, last = answer(executor, prompt, draft=True, odds=odds, cache=executor.cache, **options)
        executor.cache.truncate(0)
        assert without == with_drafts, (number, prompt, options, without, with_drafts)
        drafted, accepted, tokens = drafted + last.drafted_tokens, accepted + last.accepted_tokens, tokens + len(without[0])
    print(f"{n} prompts, {tokens} tokens, {drafted} drafted, {accepted} accepted: no answer differs")


if __name__ == "__main__":
    walk(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
