"""Sessions that come and go at random on one model, beside the same texts made alone by another: no difference is allowed.

    python tests/session_walk.py MODEL [--tokens 1000000] [--threads 2] [--sessions 8] [--seed 0]

Each of several threads holds a conversation and extends it, cuts it back, leaves a stream in the middle, cancels, forks, saves
and loads, drops it and begins another. What it gets is compared with what a model opened for that purpose alone makes.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
from pathlib import Path

import pocketlm
from pocketlm.conversation import Conversation
from pocketlm.model import Model


class Walk:
    """`tokens`: how many were compared so far; `wrong`: what differed."""

    def __init__(self, model: Model, alone: Model, folder: Path, seed: int):
        self.model, self.alone, self.folder, self.seed = model, alone, folder, seed
        self.tokens, self.wrong, self._one = 0, list[object](), threading.Lock()
        self.done = dict.fromkeys(("extended", "cut", "left", "cancelled", "forked", "saved", "begun"), 0)

    def run(self, n_tokens: int, n_sessions: int) -> None:
        threads = [threading.Thread(target=self._live, args=(i, n_tokens), daemon=True) for i in range(n_sessions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _live(self, number: int, n_tokens: int) -> None:
        try:
            rng, session, ids = random.Random(self.seed * 1000 + number), self.model.session(), list[int]()
            while self.tokens < n_tokens and not self.wrong:
                session, ids = self._act(rng, session, ids, self.folder / f"{number}.state")
        except BaseException as error:
            self.wrong.append(error)

    def _act(self, rng: random.Random, session: Conversation, ids: list[int], path: Path) -> tuple[Conversation, list[int]]:
        action = rng.choice(["extended"] * 4 + ["cut", "left", "cancelled", "forked", "saved", "begun"])
        if len(ids) > self.model.n_ctx * 2 // 3 or not ids:
            action = "begun"
        self.done[action] += 1
        if action == "begun":
            session, ids = self.model.session(), []
        elif action == "cut":
            ids = ids[: rng.randint(1, len(ids))]
        elif action == "forked":
            session = session.fork()
        elif action == "saved":
            session.save(path)
            session = self.model.session(load=path)
        ids = [*ids, *(rng.randrange(self.model.hyper.n_vocab) for _ in range(rng.choice([1, 2, 5, 20, 150])))]
        ids = ids[: self.model.n_ctx - 30]
        options = {"temperature": rng.choice([0, 0.9]), "seed": rng.randrange(100), "ignore_eos": True}
        n, cancel, got = rng.randint(1, 25), threading.Event(), []
        stop = rng.randint(1, n) if action in ("left", "cancelled") else n
        stream = session.generate(ids, max_tokens=n, cancel=cancel, **options)
        for piece in stream:
            if piece.id >= 0:
                got.append(piece.id)
            if len(got) == stop and action == "left":
                stream.close()
                break
            if len(got) == stop and action == "cancelled":
                cancel.set()
        with self._one:
            pieces = self.alone.generate(ids, max_tokens=len(got), reuse_cache=False, **options)
            if got != (said := [piece.id for piece in pieces if piece.id >= 0]):
                self.wrong.append((action, ids, options, got, said))
            self.tokens += len(got)
        return session, ids + got


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name, value in {"tokens": 1_000_000, "threads": 2, "sessions": 8, "seed": 0, "ctx": 1024}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    path, loading = options.model, {"threads": options.threads, "ctx": options.ctx}
    step = max(options.tokens // 20, 1)
    with (
        pocketlm.load(path, **loading) as model, pocketlm.load(path, **loading) as alone,
        tempfile.TemporaryDirectory() as folder,
    ):  # fmt: skip
        for i, n_tokens in enumerate(range(step, options.tokens + 1, step)):
            walk = Walk(model, alone, Path(folder), options.seed + i)
            walk.run(step, options.sessions)
            print(f"{n_tokens:,} tokens, {_resident() >> 20} MB, {walk.done}", flush=True)
            if walk.wrong:
                print(f"DIFFERENT: {walk.wrong[0]!r}")
                return 1
    return 0


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
