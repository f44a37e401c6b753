"""Sessions that come and go at random on one model, beside the same texts made alone by another: no difference is allowed.

    python tests/session_walk.py [MODEL] [--tokens 1000000] [--threads 2] [--sessions 8] [--seed 0] [--kv q8]
        [--folder FOLDER]

Each of several threads has a place with a few conversations, which it extends, cuts back, leaves in the middle of a stream,
cancels, forks, saves and loads, drops and begins anew, with drafts and without. Their passes are merged as they come. Every
token and log-probability, and logits of texts that are only read, are compared bit for bit with those of a model opened for
that purpose, which gets the same ids from an empty cache, one text at a time and without drafts. At the end no more memory
is in use than after the first tenth. Without a MODEL, a tiny one with random weights.

With a FOLDER, the run notes there how far it came, and goes on from there the next time.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from test_drafts import Eager
from tiny_models import write_model

import pocketlm
from pocketlm.conversation import Conversation
from pocketlm.model import Model
from pocketlm.runtime.drafts import Odds
from pocketlm.runtime.kv_cache import KINDS

ACTIONS = ("extended", "extended", "extended", "read", "cut", "left", "cancelled", "forked", "saved", "begun", "closed")
ROUND = 10_000  # tokens between two looks at memory
MEGABYTES_ALLOWED = 16
TINY = {"n_ctx": 512, "n_kv_head": 2, "head_dim": 24, "format": "Q8_0"}

Check = Callable[[Model], object]  # None, or how what the other model says differs


class Countdown:
    """Stands for an Event that is set while an answer is being made: at the n-th look, be it between two passes of a prompt."""

    def __init__(self, n: int):
        self.left = n

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


class Walk:
    """`tokens`: how many were compared; `wrong`: what differed, or went wrong; `done`: how often what was done; `merged`: how
    many passes were of several texts, of how many.
    """

    def __init__(self, model: Model, alone: Model, folder: Path, n_sessions: int = 8):
        self.model, self.alone, self.folder, self.tokens, self.wrong = model, alone, folder, 0, list[object]()
        self.done, self.merged, self.drafts = Counter[str](), [0, 0], [0, 0]
        self._places: list[list[tuple[Conversation, list[int]]]] = [[] for _ in range(n_sessions)]
        step = model.executor.step

        def counted(work: Any, *how: Any) -> Any:
            logits, n = step(work, *how)
            self.merged[0] += n * (len(work) > 1)
            self.merged[1] += n
            return logits, n

        model.executor.step = counted  # type: ignore[method-assign]

    def run(self, n_tokens: int, seed: object) -> None:
        """As many tokens more. The threads are new ones each time, and take the conversations over."""
        found: queue.Queue[tuple[int, Check]] = queue.Queue(64)
        stop = self.tokens + n_tokens
        threads = [
            threading.Thread(target=self._live, args=(random.Random(f"{seed} {i}"), i, stop, found), daemon=True)
            for i in range(len(self._places))
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or not found.empty():
            try:
                n, check = found.get(timeout=0.1)
            except queue.Empty:
                continue
            if (difference := check(self.alone)) is not None:
                self.wrong.append(difference)
            self.tokens += n

    def _live(self, rng: random.Random, place: int, stop: int, found: queue.Queue[tuple[int, Check]]) -> None:
        try:
            while self.tokens < stop and not self.wrong:
                found.put(self._act(rng, self._places[place], self.folder / f"{place}.state"))
        except BaseException as error:
            self.wrong.append(error)

    def _act(self, rng: random.Random, place: list[tuple[Conversation, list[int]]], path: Path) -> tuple[int, Check]:
        """One thing done with one conversation of a place, and a text continued there; what has to be compared with that."""
        n_ctx, n_vocab, action = self.model.n_ctx, self.model.hyper.n_vocab, rng.choice(ACTIONS)
        if place and (action in ("begun", "closed") or len(place) > 2 or len(place[-1][1]) > n_ctx * 2 // 3):
            session, _ = place.pop(rng.randrange(len(place)))
            if action == "closed":
                session.close()  # the others are forgotten
        rng.shuffle(place)
        session, ids = place.pop() if place else (self.model.session(), [])
        if action == "cut":
            ids = ids[: rng.randint(0, len(ids))]
        elif action == "forked":
            place.append((session, ids))
            session = session.fork()
        elif action == "saved":
            exactly = rng.random() < 0.5
            session.save(path, exactly=exactly)
            if rng.random() < 0.5:
                session.close()
                session = self.model.session()
            session.load(path, exactly=exactly)
        self.done[action] += 1
        part = [rng.randrange(n_vocab) for _ in range(rng.choice([1, 2, 5, 20, 150]))]
        ids = (ids + part * rng.choice([1, 1, 3]))[: n_ctx - 30]
        if action == "read":
            logits, _ = session.state.advance(ids)
            place.append((session, ids))
            return 1, lambda alone: _same_logits(alone, ids, logits)
        options = {"temperature": rng.choice([0, 0.9]), "seed": rng.randrange(100), "ignore_eos": True}
        options |= {"max_tokens": rng.randint(1, 25), "repeat_penalty": rng.choice([1.0, 1.2])}
        draft = rng.random() < 0.7
        session.state.odds = Eager((0, 1, 3, 7)) if rng.random() < 0.5 else Odds()
        stop = rng.randint(1, 25)
        cancel: Any = Countdown(stop) if action == "cancelled" else None
        got, last = list[tuple[int, float]](), None
        for piece in session.generate(ids, draft=draft, cancel=cancel, **options):
            if piece.id >= 0:
                got.append((piece.id, piece.logprob))
            else:
                last = piece
            if action == "left" and len(got) == stop:
                break
        if last is not None:
            self.drafts[0] += last.drafted_tokens
            self.drafts[1] += last.accepted_tokens
        place.append((session, ids + [id for id, _ in got]))
        return len(got), lambda alone: _same_text(alone, ids, got, options, action)


def _same_logits(alone: Model, ids: list[int], logits: np.ndarray) -> object:
    assert alone._own is not None
    expected, _ = alone._own.state.advance(ids, reuse_cache=False)
    return None if (expected.view(np.uint32) == logits.view(np.uint32)).all() else ("read", ids, logits, expected)


def _same_text(alone: Model, ids: list[int], got: list[tuple[int, float]], options: dict[str, Any], action: str) -> object:
    pieces = alone.generate(ids, **{**options, "max_tokens": len(got)}, draft=False, reuse_cache=False)
    expected = [(piece.id, piece.logprob) for piece in pieces if piece.id >= 0]
    return None if got == expected else (action, ids, options, got, expected)


def walk(
    path: Path, folder: Path, n_tokens: int, *, threads: int = 2, n_sessions: int = 8, seed: int = 0, **options: Any
) -> int:  # fmt: skip
    """The whole run, told line by line: 1 where something differed or memory grew. `folder` keeps how far it came."""
    progress = folder / f"progress-{seed}.json"
    before = json.loads(progress.read_text()) if progress.exists() else {"tokens": 0, "rounds": 0}
    with (
        tempfile.TemporaryDirectory() as states, pocketlm.load(path, "native", threads, **options) as model,
        pocketlm.load(path, "native", 1, **options) as alone,
    ):  # fmt: skip
        one, warm, started = Walk(model, alone, Path(states), n_sessions), 0, time.monotonic()
        while (done := before["tokens"] + one.tokens) < n_tokens:
            one.run(min(ROUND, n_tokens - done), f"{seed} {before['rounds']}")
            before["rounds"] += 1
            progress.write_text(json.dumps({"tokens": before["tokens"] + one.tokens, "rounds": before["rounds"]}))
            warm = warm if warm and one.tokens * 10 > n_tokens - before["tokens"] else resident()
            rate = one.tokens / (time.monotonic() - started)
            print(f"{before['tokens'] + one.tokens:,} tokens, {rate:.0f} a second, {resident() >> 20} MB", flush=True)
            if one.wrong:
                print(f"DIFFERENT in round {before['rounds'] - 1}: {one.wrong[0]!r}")
                return 1
        grown = (resident() - warm) / (1 << 20)
        print(f"{dict(one.done)}, {one.merged[0]} of {one.merged[1]} passes of several texts")
        print(f"{one.drafts[0]} tokens drafted, {one.drafts[1]} of them right; memory {grown:+.1f} MB since the first tenth")
        return int(grown > MEGABYTES_ALLOWED)


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    for name, value in {"tokens": 1_000_000, "threads": 2, "sessions": 8, "seed": 0, "ctx": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--kv", default=KINDS[0], choices=KINDS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        path = Path(options.model) if options.model else write_model(folder / "tiny.gguf", **TINY)
        return walk(
            path, folder, options.tokens, threads=options.threads, n_sessions=options.sessions, seed=options.seed,
            ctx=options.ctx, kv=options.kv,
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
