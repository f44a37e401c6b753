"""What decides how fast an answer comes beside the forward pass: Python around it, drafts, and other programs.

    python bench/decoding.py share [MODEL …]     µs a token beside the compiled passes: median, and the quietest tenth
    python bench/decoding.py drafts [MODEL]      with drafts beside without: a program and a text written again, and prose
    python bench/decoding.py constrained [MODEL] time a token of answers that have a form, the first of one and later ones
    python bench/decoding.py caches [MODEL]      every kind of cache beside that of int16 with every position
    python bench/decoding.py busy [MODEL]        two threads beside a busy loop, in shares of one undisturbed thread

Rounds alternate, a figure is the median of their ratios. Processor time stands beside wall time: on a machine that others use
it is the figure to look at.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np

import pocketlm
from pocketlm.bench.measure import open_subject
from pocketlm.bench.processes import Worker
from pocketlm.bench.protocol import BACKENDS
from pocketlm.errors import PocketlmError
from pocketlm.model import find_model
from pocketlm.runtime.executors import make_executor
from pocketlm.runtime.model_file import open_model
from pocketlm.runtime.operations import Attend
from pocketlm.runtime.plan import read_plan
from pocketlm.runtime.threads import default_threads

SEEN = 2000  # positions, in `caches`

PROGRAM = """def read_table(path, separator=","):
    rows = []
    with open(path, encoding="utf-8") as file:
        header = file.readline().rstrip("\\n").split(separator)
        for line in file:
            values = line.rstrip("\\n").split(separator)
            row = {}
            for name, value in zip(header, values):
                row[name] = float(value) if value else None
            rows.append(row)
    return rows
"""
TEXT = (
    "The lighthouse keeper climbed the stairs every evening at six. He carried a can of oil, a cloth and a small brass lamp."
    " At the top he opened the window, looked at the weather and wrote two lines into a book that was older than himself. Then"
    " he lit the great lamp, waited until the flame stood still and sat down beside it."
)
AGAIN = f"Python:\n```python\n{PROGRAM}```\nThe same program with another name:\n```python\n{PROGRAM[:40]}"
TASKS = {  # (what the answer goes on from: a text, or a question in a chat)
    "a program again": (AGAIN, False),
    "a text again": (f"{TEXT}\n\nOnce more, word for word:\n\n{TEXT[:60]}", False),
    "prose": ("Write a long story about a dragon who wants to learn to swim.", True),
    "an explanation": ("Explain how rain forms.", True),
}
_TEXT, _SHORT = {"type": "string"}, {"type": "string", "maxLength": 120}
_PET = {"name": _TEXT, "story": _TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 99}, "tags": {"items": _TEXT}}
FORMS: dict[str, dict[str, Any]] = {
    "any JSON object": {"json_object": True},
    "a schema": {"json_schema": {"type": "object", "properties": _PET, "required": list(_PET)}},
    "texts of bounded length": {"json_schema": {"type": "array", "items": _SHORT, "minItems": 4, "maxItems": 8}},
    "a pattern": {"regex": r"([A-Z][a-z' -]{3,90}[.!?]\n?){4,8}"},
}
CHAINS: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0, "repeat_penalty": 1.0}, "sampled": {"repeat_penalty": 1.0}}


def share(names: list[str], rounds: int) -> Iterator[str]:
    for name in names:
        with pocketlm.load(name, threads=1) as model:
            workers: Any = model.executor._workers  # type: ignore[attr-defined]  the pass and nothing but it
            run, passes = workers.run, []

            def timed(run: Callable[[], None] = run, passes: list[float] = passes) -> None:
                started = time.thread_time()
                run()
                passes.append(time.thread_time() - started)

            workers.run = timed
            for logprobs in (True, False):
                shares = []
                for seed in range(max(2, rounds)):
                    stream = model.generate("Once", max_tokens=64, ignore_eos=True, seed=seed, draft=False, logprobs=logprobs)
                    next(stream)
                    passes.clear()
                    started, n = time.thread_time(), sum(1 for _ in stream)  # several tokens are made at once
                    shares.append(1e6 * (time.thread_time() - started - sum(passes)) / n)
                tenth, *_ = statistics.quantiles(shares, n=10)
                words = f"{model.hyper.n_vocab:6} words, {'with' if logprobs else 'without':7} log-probabilities"
                yield f"{name:12} {words} {statistics.median(shares):7.1f} {tenth:7.1f}"


def drafts(names: list[str], rounds: int) -> Iterator[str]:
    with pocketlm.load(names[0], threads=1) as model:

        def once(prompt: str, chat: bool, draft: bool, **sampling: Any) -> tuple[list[int], float, float, Any]:
            options = {"max_tokens": 150, "draft": draft, **sampling}
            stream = model.chat([{"role": "user", "content": prompt}], **options) if chat else model.generate(prompt, **options)
            pieces = [next(stream)]
            wall, processor = time.perf_counter(), time.process_time()
            pieces += stream
            return [p.id for p in pieces], time.perf_counter() - wall, time.process_time() - processor, pieces[-1]

        yield f"{'':32} {'wall':>6} {'processor':>10}  drafted, accepted"
        for task, (prompt, chat) in TASKS.items():
            for chain, sampling in CHAINS.items():
                ratios, last = [], None
                for seed in range(rounds):
                    ids, *before, _ = once(prompt, chat, False, seed=seed, **sampling)
                    same, *after, last = once(prompt, chat, True, seed=seed, **sampling)
                    assert ids == same, "a draft has changed an answer"
                    ratios.append([a / b for a, b in zip(before, after, strict=True)])
                wall, processor = (statistics.median(column) for column in zip(*ratios, strict=True))
                assert last is not None
                yield f"{task:20} {chain:11} {wall:6.2f} {processor:10.2f}  {last.drafted_tokens}, {last.accepted_tokens}"


def constrained(names: list[str], rounds: int) -> Iterator[str]:
    with pocketlm.load(names[0], threads=1) as model:

        def once(seed: int, **form: Any) -> float:
            """Seconds a token, the end token's pass included."""
            messages = [{"role": "user", "content": "Describe a pet of yours, with many details, as JSON."}]
            stream = model.chat(messages, max_tokens=160, seed=seed, draft=False, logprobs=False, **form)
            next(stream)
            started, n = time.process_time(), sum(1 for _ in stream)
            return (time.process_time() - started) / n

        for _ in range(2):
            once(0, json_object=True)  # the vocabulary is read once
        yield f"{'':28} {'first':>6} {'later':>6}  times the time a token takes without"
        for form, options in FORMS.items():
            ratios = []
            for seed in range(rounds):
                plain = once(seed, ignore_eos=True)
                if "json_schema" in options:  # one that was never seen
                    options = {"json_schema": {**options["json_schema"], "title": str(seed)}}
                ratios.append((once(seed, **options) / plain, once(seed, **options) / once(seed, ignore_eos=True)))
            first, later = (statistics.median(column) for column in zip(*ratios, strict=True))
            yield f"{form:28} {first if 'json_schema' in options else float('nan'):6.3f} {later:6.3f}"


def caches(names: list[str], rounds: int) -> Iterator[str]:
    """A token that sees 2,000 positions: in every kind of cache, beside the plain one. The rings have gone round once."""
    path = find_model(names[0])
    with open_model(path) as file, ExitStack() as stack:
        plain = read_plan(file.metadata, file.tensors, path)
        ring = replace(plain, ops=[replace(op, window=SEEN) if isinstance(op, Attend) else op for op in plain.ops])
        kinds = {"int16": (plain, "q16"), "int8": (plain, "q8"), "int16, ring": (ring, "q16"), "int8, ring": (ring, "q8")}
        executors = dict[str, Any]()
        for kind, (plan, kv) in kinds.items():
            before = SEEN if plan is plain else 2 * SEEN + 1000  # a ring has a pass and a margin more than the window
            executor = executors[kind] = make_executor("native", plan, file.tensors, before + 64, default_threads(), path, kv)
            stack.callback(executor.close)
            for at in range(0, before - 16, executor.block):
                executor.forward(np.arange(at, min(at + executor.block, before - 16)) % plain.hyper.n_vocab)

        def once(executor: Any) -> float:
            length, started = executor.cache.length, time.perf_counter()
            for id in range(32):
                executor.forward(np.array([id]))
            seconds = time.perf_counter() - started
            executor.cache.truncate(length)
            return seconds / 32

        ratios, order = dict[str, list[float]](), list(kinds)
        for number in range(2 * rounds):
            took = {kind: once(executors[kind]) for kind in order[number % 4 :] + order[: number % 4]}
            for kind, seconds in took.items():
                ratios.setdefault(kind, []).append(seconds / took["int16"])
        for kind, found in ratios.items():
            low, middle, high = statistics.quantiles(found, n=4)
            yield f"{kind:16} {middle:6.3f} of the time with int16 (quartiles {low:.3f} to {high:.3f})"


@contextmanager
def busy_loop(processor: int | None) -> Iterator[None]:
    """Another program that wants a processor: this one, or whichever the system gives it."""
    pin = f"import os; os.sched_setaffinity(0, [{processor}])\n" if processor is not None else ""
    program = subprocess.Popen([sys.executable, "-c", f"{pin}while True: pass"])
    try:
        time.sleep(0.3)
        yield
    finally:
        program.kill()
        program.wait()


def busy(names: list[str], rounds: int) -> Iterator[str]:
    path = find_model(names[0])
    n_vocab = open_subject(path).hyper.n_vocab
    subjects = {"pocketlm, one thread, undisturbed": ("native", 1), "pocketlm": ("native", 2), "llama.cpp": ("llama.cpp", 2)}
    workers: dict[str, Worker] = {}
    with ExitStack() as stack:
        for label, (backend, threads) in subjects.items():
            worker = Worker(threads, {})
            stack.callback(worker.close)
            with suppress(PocketlmError):
                worker.load(BACKENDS[backend], path, 100, threads, 512, n_vocab)
                workers[label] = worker

        def speed(label: str) -> float:
            n = 32 if label == "llama.cpp" else 256  # its threads wait for one another: a token takes up to a second
            return n / sum(workers[label].ask("decode", 600, n=n, depth=32, at_least=0.0)["seconds"])

        one, *others = workers
        core = sorted(os.sched_getaffinity(0))[-1] if hasattr(os, "sched_getaffinity") else None
        for name, processor in (("anywhere", None), ("on one of the cores", core)):
            shares: dict[str, list[float]] = {label: [] for label in others}
            for _ in range(rounds):
                undisturbed = speed(one)
                with busy_loop(processor):
                    for label in others:
                        shares[label].append(speed(label) / undisturbed)
            for label in others:
                yield f"busy loop {name:20} {label:12} {statistics.median(shares[label]):6.2f} of one undisturbed thread"


TABLES = {"share": share, "drafts": drafts, "constrained": constrained, "caches": caches, "busy": busy}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(TABLES))
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    usual = ["small-talk", "smollm2"] if options.what == "share" else ["smollm2"]
    for line in TABLES[options.what](options.models or usual, options.rounds):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
