"""The measuring: every backend in a process of its own, task by task, round by round, A B C A B C.

In: model files, rows of the table of backends, settings. Out: one plain dict, the result that schema.py describes.
A backend that is missing, lacks memory, crashes, hangs or says no gets its row with the reason; the others go on.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.bench import convert, machine, summary
from pocketlm.bench.agreement import compare
from pocketlm.bench.processes import Failure, Worker
from pocketlm.bench.protocol import BACKENDS, Backend
from pocketlm.bench.schema import NAME, STOPPED, VERSION
from pocketlm.bench.tasks import TASKS, Task
from pocketlm.errors import FileError, PocketlmError, UsageError
from pocketlm.runtime import memory
from pocketlm.runtime.evaluation import TEXT
from pocketlm.runtime.hyper import Hyper
from pocketlm.runtime.model_file import open_model, size_of
from pocketlm.runtime.plan import read_plan
from pocketlm.tokenizer import from_metadata

Say = Callable[[str], None]
USER_TEXT = "Once upon a time"
DRIFT = 1.10  # reference loops this much slower than their best mean that the machine was busy
UNSTEADY = 0.05  # a median that another run may miss by more than this share
DECODED = 32  # tokens of the text that are computed one by one for the agreement, as generation does


@dataclass(frozen=True)
class Settings:
    """What is measured. `pass_seconds`: a fast backend repeats a round's work until it has worked this long."""

    rounds: int = 4
    tokens: int = 16  # decoded in a round
    prompts: tuple[int, ...] = (32, 256)
    depths: tuple[int, ...] = (0, 512)  # tokens in the cache before decoding begins
    threads: int = 1
    time_limit: float = 180.0  # seconds for one request to a backend
    pass_seconds: float = 0.2
    user_rounds: int = 4
    user_tokens: int = 32
    pp: tuple[int, ...] = ()  # as llama-bench: prompts of N tokens, and N tokens one by one, into an empty cache
    tg: tuple[int, ...] = ()


@dataclass(frozen=True)
class Subject:
    """A model file and what the parent needs to know of it."""

    path: Path
    name: str
    hyper: Hyper
    n_parameters: int
    tensor_bytes: int
    bytes_per_token: int  # of the matrices that every decoded token reads
    ids: list[int]  # the fixed text, or random ids where the vocabulary does not take it
    room: int  # tokens that fit behind USER_TEXT; 0 where the vocabulary does not take that


def bench(paths: Sequence[Path], backends: Sequence[Backend], settings: Settings, say: Say) -> dict[str, Any]:
    """Measure every model on every backend; Ctrl-C ends that, with the figures that there are and a warning, if there are any.

    Raises PocketlmError only for what no backend could do anything about.
    """
    subjects = [open_subject(path) for path in paths]
    names = [subject.name for subject in subjects]
    subjects = [replace(one, name=str(one.path)) if names.count(one.name) > 1 else one for one in subjects]
    if subjects and not any(numbers for subject in subjects for _, numbers in _fitting(subject, settings)):
        longest = max(subjects, key=lambda subject: subject.hyper.n_ctx)
        options = [f"--{task.setting}" for task in TASKS if getattr(settings, task.setting)]
        options += ["--tokens"] if settings.depths else []
        problem = f"has a context of {longest.hyper.n_ctx} tokens"
        raise UsageError(f"{longest.path} {problem}: give shorter {', '.join(options)}")
    for subject in subjects:
        for task, numbers in _fitting(subject, settings):
            if left_out := sorted({*getattr(settings, task.setting)} - {*numbers}):
                columns = ", ".join(task.column.format(n) for n in left_out)
                say(f"{subject.name}: left out {columns}: its context is {subject.hyper.n_ctx} tokens")
    facts, steady = machine.describe(), machine.Steady(settings.threads)
    say("measuring the memory's bandwidth")
    facts |= {"threads": settings.threads, "bandwidth": machine.bandwidth(settings.threads)}
    models: list[dict[str, Any]] = []
    warnings: list[str] = []
    try:
        for subject in subjects:
            bench_model(subject, backends, settings, steady, facts["bandwidth"], say, models)
    except KeyboardInterrupt:
        rows = [row for model in models for row in model["backends"]]
        unmeasured = [row for row in rows if not any(task.name in row for task in TASKS)]
        if len(unmeasured) == len(rows):
            raise
        for row in unmeasured:
            if row["status"] == "ok":
                row |= {"status": "skipped", "reason": STOPPED}
        warnings.append(f"{STOPPED}: these are the figures until then")
    loops = {"drift": steady.drift, "medians": steady.medians}
    return {
        "schema": NAME, "version": VERSION, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": facts,
        "settings": asdict(settings) | {task.setting: list(getattr(settings, task.setting)) for task in TASKS},
        "reference_loop": loops, "warnings": [*warnings, *_warnings(loops["drift"], models)], "models": models,
    }  # fmt: skip


def open_subject(path: Path) -> Subject:
    """Read what there is to know of a model file. Raises FileError."""
    with open_model(path) as opened:
        if "token_embd.weight" not in opened.tensors:
            raise FileError(path, "it holds a vocabulary but no model", "name a file with weights")
        plan = read_plan(opened.metadata, opened.tensors, path)
        hyper = plan.hyper
        read = plan.bytes_per_token(opened.tensors)
        tokenizer = from_metadata(opened.metadata, path)
        try:
            ids, words = (tokenizer.encode(text, bos=tokenizer.adds_bos) for text in (TEXT, USER_TEXT))
            room = hyper.n_ctx - len(words) if len(words) > tokenizer.adds_bos else 0
        except PocketlmError:  # a vocabulary of single characters may lack some of these
            ids, room = np.random.default_rng(2).integers(0, hyper.n_vocab, 192).tolist(), 0
        count = sum(int(np.prod(tensor.shape)) for tensor in opened.tensors.values())
        size = sum(tensor.data.nbytes for tensor in opened.tensors.values())
        return Subject(path, path.stem, hyper, count, size, read, ids[: hyper.n_ctx], room)


def _fitting(subject: Subject, settings: Settings) -> list[tuple[Task, list[int]]]:
    """The tasks with those of their numbers that fit into the model's context."""
    n_ctx = subject.hyper.n_ctx
    return [
        (task, sorted({n for n in getattr(settings, task.setting) if task.context(n, settings.tokens) <= n_ctx}))
        for task in TASKS
    ]


class Row:
    """One backend on one model: its result, and its process until that fails."""

    def __init__(self, backend: Backend, limit: float):
        self.backend, self._limit, self._worker = backend, limit, None
        self.result: dict[str, Any] = {"name": backend.name, "status": "ok", "reason": ""}

    @property
    def alive(self) -> bool:
        return self._worker is not None

    def start(self, subject: Subject, settings: Settings, n_ctx: int, say: Say) -> None:
        """Convert the model if need be, and load it."""
        with self._marking():
            if self.backend.missing:
                raise Failure("missing", self.backend.get)
            if not any(numbers for _, numbers in _fitting(subject, settings)):
                n_tokens = subject.hyper.n_ctx
                raise Failure("skipped", f"its context of {n_tokens} tokens has no room for what is measured")
            self._require_memory(subject, n_ctx)
            path = subject.path
            if self.backend.reads != "gguf":
                self.result["converted"] = {"kind": self.backend.reads, "seconds": None}
                path, self.result["converted"]["seconds"] = converted(self.backend, path, settings.threads, self._limit, say)
            say(f"{subject.name}: loading {self.backend.name}")
            self.result["file_bytes"] = size_of(path)
            self._worker = Worker(settings.threads, self.backend.environment)
            answer = self._worker.load(self.backend, path, self._limit, settings.threads, n_ctx, subject.hyper.n_vocab)
            self.result |= {key: answer[key] for key in ("load_seconds", "first_token_seconds", "peak_bytes", "facts")}
            self.completes = answer["completes"]

    def ask(self, job: str, **arguments: Any) -> dict[str, Any] | None:
        """The backend's answer; None, and the reason in its row, where it fails."""
        assert self._worker is not None
        with self._marking():
            return self._worker.ask(job, self._limit, **arguments)
        return None

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    @contextmanager
    def _marking(self) -> Iterator[None]:
        try:
            yield
        except PocketlmError as error:
            status = error.status if isinstance(error, Failure) else "failed"
            self.result |= {"status": status, "reason": str(error)}
            self.close()

    def _require_memory(self, subject: Subject, n_ctx: int) -> None:
        weights = subject.n_parameters * self.backend.bytes_per_weight
        weights += size_of(subject.path) * self.backend.bytes_per_file_byte
        cache = 2 * 4 * subject.hyper.n_layer * subject.hyper.kv_width * n_ctx if weights else 0
        try:
            memory.require(subject.path, lambda _: (int(weights), cache, 0), n_ctx)
        except FileError as error:
            raise Failure("no memory", error.problem) from None


def converted(backend: Backend, path: Path, n_threads: int, limit: float, say: Say) -> tuple[Path, float | None]:
    """The file or folder that a backend reads for a model file, and the seconds that making it took; None: it was there.

    Raises Failure where it cannot be made.
    """
    if backend.reads == "gguf":
        return path, None
    out = convert.target(path, backend.reads)
    if out.exists():
        return out, None
    say(f"{path.stem}: converting to {backend.reads} for {backend.name}, once; kept as {out}")
    started, worker = time.perf_counter(), Worker(n_threads)
    try:
        worker.ask("convert", limit, kind=backend.reads, path=str(path), out=str(out))
    finally:
        worker.close()
        convert.sweep(out)
    return out, time.perf_counter() - started


def bench_model(
    subject: Subject, backends: Sequence[Backend], settings: Settings, steady: machine.Steady, bandwidth: float, say: Say,
    models: list[dict[str, Any]],
) -> None:  # fmt: skip
    """One model on every backend. It joins `models` before anything is measured, and gets its figures one after the other."""
    tasks = _fitting(subject, settings)
    longest = max((task.context(n, settings.tokens) for task, numbers in tasks for n in numbers), default=0)
    n_ctx = min(max(longest, len(subject.ids), 256), subject.hyper.n_ctx)
    rows = [Row(backend, settings.time_limit) for backend in backends]
    models.append({
        "name": subject.name, "architecture": subject.hyper.architecture, "parameters": subject.n_parameters,
        "file_bytes": size_of(subject.path), "tensor_bytes": subject.tensor_bytes, "bytes_per_token": subject.bytes_per_token,
        "bound": bandwidth / subject.bytes_per_token, "n_ctx": n_ctx, "backends": [row.result for row in rows],
    })  # fmt: skip
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for row in rows:
            stack.callback(row.close)
            row.start(subject, settings, n_ctx, say)
        for task, numbers in tasks:
            for n in reversed(numbers):  # the deepest first: a cache is filled once and then cut
                say(f"{subject.name}: {'decoding ' if task.name == 'decode' else ''}{task.legend.format(n)}")
                _measure(rows, settings, steady, task, n)
        say(f"{subject.name}: agreement")
        _compare(rows, subject, settings, n_ctx, Path(folder))
        if subject.room > 0 and settings.user_rounds:
            say(f"{subject.name}: what a user sees")
            _complete(rows, settings, min(settings.user_tokens, subject.room), steady)


def _measure(rows: list[Row], settings: Settings, steady: machine.Steady, task: Task, number: int) -> None:
    """One task, in rounds that go from backend to backend; the figures go into the rows."""
    arguments = task.request(number, settings.tokens)
    at_least = 0.0 if task.like_llama_bench else settings.pass_seconds
    for row in rows:
        if row.alive:  # caches warm, clocks up, everything compiled
            row.ask(task.job, **arguments | {"n": min(arguments["n"], 2) if task.generates else number}, at_least=0.0)
    answers: dict[str, list[dict[str, Any]]] = {row.backend.name: [] for row in rows}
    try:
        for _ in range(settings.rounds):
            steady.check()
            for row in rows:
                if row.alive and (answer := row.ask(task.job, **arguments, at_least=at_least)) is not None:
                    answers[row.backend.name].append(answer)
                    row.result["peak_bytes"] = answer["peak_bytes"]
    finally:  # whoever stops it in the middle gets what there is
        for row in rows:
            if row.alive and (found := answers[row.backend.name]):
                figures = row.result.get(task.name, {}) | {str(number): _figures(task, number, found)}
                row.result[task.name] = dict(sorted(figures.items(), key=lambda item: int(item[0])))


def _figures(task: Task, number: int, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens per second of the rounds as one figure, latencies of single tokens, energy."""
    tokens = [len(answer["seconds"]) * (1 if task.generates else number) for answer in answers]
    speeds = [count / sum(answer["seconds"]) for count, answer in zip(tokens, answers, strict=True)]
    figures = summary.summarize(speeds) | (summary.spread(speeds) if task.like_llama_bench else {})
    if task.generates:
        figures["latency_ms"] = summary.latency([x for answer in answers for x in answer["seconds"]])
    joules = [
        answer["joules"] / count
        for count, answer in zip(tokens, answers, strict=True)
        if answer["joules"] is not None and answer["joules"] >= 0
    ]
    figures["joules_per_token"] = summary.summarize(joules)["median"] if joules else None
    return figures


def _compare(rows: list[Row], subject: Subject, settings: Settings, n_ctx: int, folder: Path) -> None:
    """Every backend's logits on the fixed text beside those of the float32 executor."""
    ids, n_prompt = subject.ids, max(len(subject.ids) - DECODED, 1)

    def logits(row: Row) -> np.ndarray | None:
        out = folder / "logits.npy"
        return np.load(out) if row.ask("logits", ids=ids, n_prompt=n_prompt, out=str(out)) is not None else None

    reference = next((row for row in rows if row.alive and row.backend is BACKENDS["numpy"]), None)
    own = reference is None
    if reference is None:
        reference = Row(BACKENDS["numpy"], settings.time_limit)
        reference.start(subject, settings, n_ctx, lambda line: None)
    exact = logits(reference) if reference.alive else None
    if own:
        reference.close()
    for row in rows:
        if row.alive and exact is None:
            row.result["agreement"] = {"agrees": None, "reason": f"no reference: {reference.result['reason']}"}
        elif row.alive and exact is not None:
            found = exact if row is reference else logits(row)
            if found is not None:
                agreement = row.result["agreement"] = compare(exact, found, ids)
                if not agreement["agrees"]:
                    row.result |= {"status": "disagrees", "reason": agreement["reason"]}


def _complete(rows: list[Row], settings: Settings, n_tokens: int, steady: machine.Steady) -> None:
    """Tokens per second of the libraries' own calls that complete a text by so many tokens."""
    speeds: dict[str, list[float]] = {}
    completing = [row for row in rows if row.alive and row.completes]
    for i in range(settings.user_rounds + 1):
        steady.check()
        for row in completing:
            if not row.alive:
                continue
            answer = row.ask("complete", text=USER_TEXT, n_tokens=n_tokens)
            if answer is not None and i > 0 and answer["tokens"]:  # the first is the warm-up
                speeds.setdefault(row.backend.name, []).append(answer["tokens"] / answer["seconds"])
    for row in completing:
        if row.alive and row.backend.name in speeds:
            row.result["user"] = summary.summarize(speeds[row.backend.name])


def _warnings(drift: float, models: list[dict[str, Any]]) -> Iterator[str]:
    if drift > DRIFT:
        yield f"the reference loop was up to {drift - 1:.0%} slower than its best: the machine was busy or slowed down"
    for model in models:
        for row in model["backends"]:
            unsteady = [
                task.column.format(key) for task in TASKS for key, figures in row.get(task.name, {}).items()
                if (figures["uncertainty"] or 0) > UNSTEADY
            ]  # fmt: skip
            if unsteady:
                yield (
                    f"{model['name']}, {row['name']}: another run may differ by more than {UNSTEADY:.0%} in "
                    f"{', '.join(unsteady)}"
                )
