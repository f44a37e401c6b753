"""How fast pocketlm is beside llama.cpp (llama_decode, called directly), other libraries and a plain NumPy loop: one run.

    python bench/speed.py [--quick] [--json] [--only TEXT …] [--rounds N]

Every row alternates between two engines in processes of their own, same file, same number of threads; a figure is the median
of the rounds. A fixed loop between the rounds shows whether the machine was quiet; ratios are what counts. See README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pocketlm.bench import machine, shapes
from pocketlm.bench.measure import DRIFT, converted, open_subject
from pocketlm.bench.processes import Failure, Worker
from pocketlm.bench.protocol import BACKENDS, Backend
from pocketlm.model import find_model
from pocketlm.runtime.native.caches import NativeCache
from pocketlm.runtime.native.sizes import SPAN

LARGE = "decode 1.3B-class Q4_0"  # the row whose use of the memory bandwidth is shown
ENGINES = {**BACKENDS, "naive NumPy": Backend("naive NumPy", "pocketlm.bench.adapter_naive:Naive")}
LIMIT = 600.0  # seconds for one round
WIDER = ("avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8", "avx512_fp16", "i8mm", "bf16")  # what other libraries may use


@dataclass(frozen=True)
class Row:
    """One comparison: `engine` should be `at_least` times as fast as `rival`."""

    name: str
    model: str
    task: str  # "decode" | "prefill" | "together": decoding in several conversations at the same time
    at_least: float
    aim: float | None = None
    engine: str = "native"
    rival: str = "llama.cpp"
    threads: int = 2
    conversations: int = 1
    rival_conversations: int = 1
    n: int = 128  # tokens of a round
    filled: int = 0  # tokens in the cache before decoding begins
    environment: dict[str, str] = field(default_factory=dict)


ROWS = [
    Row("decode 48M Q4_0", "48M Q4_0", "decode", 2.0, 3.0),
    Row("decode 48M Q8_0", "48M Q8_0", "decode", 1.6, 2.3),
    Row("decode 48M F16", "48M F16", "decode", 1.3, 1.6),
    Row("decode SmolLM2 Q4_1", "SmolLM2", "decode", 2.0, 3.0),
    Row(LARGE, "1.3B-class Q4_0", "decode", 1.3, 1.8, n=24),
    Row("decode SmolLM2, 2000 in the cache", "SmolLM2", "decode", 2.0, 3.0, rival="llama.cpp no-flash", filled=2000),
    Row("eight conversations, SmolLM2 Q4_1", "SmolLM2", "together", 1.5, n=128, conversations=8, rival_conversations=8),
    Row("eight beside one alone, SmolLM2 Q4_1", "SmolLM2", "together", 3.0, rival="native", n=128, conversations=8),
    Row("decode SmolLM2, 4000 in the cache", "SmolLM2", "decode", 2.0, 3.0, rival="llama.cpp no-flash", filled=4000),
    Row("generate 48M Q4_0", "48M Q4_0", "together", 2.0, 3.0),  # with default sampling, beside llama_decode with nothing drawn
    Row("generate 48M Q8_0", "48M Q8_0", "together", 1.6, 2.3),
    Row("generate 48M F16", "48M F16", "together", 1.3, 1.6),
    Row("prefill 512, 48M Q4_0", "48M Q4_0", "prefill", 1.5, 3.0, n=512),
    Row("prefill 512, SmolLM2 Q4_1", "SmolLM2", "prefill", 1.5, 3.0, n=512),
    Row("prefill 4000, SmolLM2 Q4_1", "SmolLM2", "prefill", 1.5, 3.0, n=4000),
    *(
        Row(f"decode SmolLM2 beside {rival}", "SmolLM2", "decode", 1.0, 1.5, rival=rival)
        for rival in ("onnxruntime-genai", "openvino", "ctranslate2")
    ),
    *(
        Row(f"prefill 512 SmolLM2 beside {rival}", "SmolLM2", "prefill", 0.5, 0.9, rival=rival, n=512)
        for rival in ("onnxruntime-genai", "openvino", "ctranslate2")
    ),
    Row("prefill 4000 SmolLM2 beside openvino", "SmolLM2", "prefill", 0.5, 1.0, rival="openvino", n=4000),
    Row("decode 48M beside ctranslate2", "48M Q4_0", "decode", 1.0, 1.5, rival="ctranslate2"),
    Row("prefill 512 48M beside ctranslate2", "48M Q4_0", "prefill", 0.8, 1.5, rival="ctranslate2", n=512),
    Row("one thread: decode 48M Q4_0", "48M Q4_0", "decode", 1.4, threads=1),
    Row("one thread: decode SmolLM2 Q4_1", "SmolLM2", "decode", 1.4, threads=1),
    Row("one thread: decode 48M Q8_0", "48M Q8_0", "decode", 1.4, threads=1),
    Row("one thread: decode 48M F16", "48M F16", "decode", 1.1, threads=1),
    *(Row(f"format {kind}", f"Llama-125M {kind}", "decode", 1.0, 1.4, threads=1, n=32) for kind in shapes.KINDS),
    Row("POCKETLM_ISA=avx2: decode 48M Q4_0", "48M Q4_0", "decode", 1.5, environment={"POCKETLM_ISA": "avx2"}),
    Row("numpy: decode SmolLM2", "SmolLM2", "decode", 0.25, engine="numpy", n=24),
    Row("numpy: decode 48M, beside naive NumPy", "48M Q4_0", "decode", 1.3, engine="numpy", rival="naive NumPy", n=24),
    Row("numpy: prefill 512, SmolLM2", "SmolLM2", "prefill", 0.6, engine="numpy", n=512),
]


def measure(
    row: Row, path: Path, rounds: int, n: int, steady: machine.Steady, say: Callable[[str], None]
) -> dict[str, Any]:  # fmt: skip
    """Tokens per second of both engines and their ratio, each round's own ratio being the unit of the median.

    Raises Failure where one of them is not there or cannot run the model.
    """
    hyper = open_subject(path).hyper
    n_ctx, n_vocab = min(max(1024, row.filled + n + 64), hyper.n_ctx), hyper.n_vocab

    def seconds(worker: Worker, conversations: int) -> float:
        if row.task == "together":  # of n tokens, whosever they are
            return worker.ask("together", LIMIT, n=n, conversations=conversations)["seconds"] / conversations
        if row.task == "prefill":
            return sum(worker.ask("prefill", LIMIT, n=n, at_least=0.0)["seconds"])
        return sum(worker.ask("decode", LIMIT, n=n, depth=row.filled, at_least=0.0)["seconds"])

    with ExitStack() as stack:
        workers = []
        for name in (row.engine, row.rival):
            engine = ENGINES[name]
            if engine.missing:
                raise Failure("missing", f"{name} is not installed: {engine.get}")
            file, _ = converted(engine, path, row.threads, LIMIT, say)
            workers.append(Worker(row.threads, row.environment if name == row.engine else {}))
            stack.callback(workers[-1].close)
            workers[-1].load(engine, file, LIMIT, row.threads, n_ctx, n_vocab)
        both = list(zip(workers, (row.conversations, row.rival_conversations), strict=True))
        for worker, conversations in both:  # caches warm, clocks up
            seconds(worker, conversations)
        times = []
        for _ in range(rounds):
            steady.check()
            times.append([seconds(worker, conversations) for worker, conversations in both])
    ours, theirs = (n / statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(other / own for own, other in times)
    return {"ours": ours, "theirs": theirs, "ratio": ratio}


# ── what is not a ratio ──────────────────────────────────────────────────────────────────────────────────────────────


def seconds_of(program: list[str]) -> float:
    """Wall time of a command, its start included."""
    started = time.perf_counter()
    subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def printed(program: str, environment: dict[str, str] | None = None) -> float:
    """The number that a Python program prints: it times itself, after the imports that are not part of the promise.

    With compiled modules kept, as a user has them, whatever the caller's environment says.
    """
    variables = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", **(environment or {})}
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=variables)
    return float(done.stdout.split()[-1])


OPEN = """
import time
started = time.perf_counter()
import pocketlm
pocketlm.tokenizer.load({path!r}).encode("Hello, world")
print(time.perf_counter() - started)
"""
COMPILE = """
import time
from pocketlm.runtime.native import levels
from pocketlm.runtime.native.kernels import kernels
level = levels.detect()
started = time.perf_counter()
kernels(["F32", "Q4_1"], level)
print(time.perf_counter() - started)
"""


PEAK = """
import pocketlm
from pocketlm.bench.worker import peak_bytes
model = pocketlm.load({path!r}, "native")
model.logits([1, 2, 3])
print((peak_bytes() - {size} - {position} * model.n_ctx) / 1e6)
"""


def compiled(times: int) -> float:
    """Seconds until the kernels are there, for the last of `times` processes that share a cache, empty at first."""
    with tempfile.TemporaryDirectory() as folder:
        return [printed(COMPILE, {"POCKETLM_CACHE": folder}) for _ in range(times)][-1]


def ninth(smollm2: Path) -> dict[str, float]:
    """The first token of a ninth conversation beside eight: `first`, its seconds; `others`, seconds of a token of the eight;
    `passes` that end until then.
    """
    with closing(Worker(2)) as worker:
        worker.load(ENGINES["native"], smollm2, LIMIT, 2, 1024, open_subject(smollm2).hyper.n_vocab)
        return worker.ask("ninth", LIMIT, n=24, conversations=8)


def peak(smollm2: Path) -> float:
    """Megabytes at the default context, after three tokens."""
    hyper = open_subject(smollm2).hyper
    position = NativeCache.bytes_for(hyper, SPAN) // SPAN
    return printed(PEAK.format(path=str(smollm2), size=smollm2.stat().st_size, position=position))


class Other(NamedTuple):
    """What is measured by itself: the median of the rounds should be `at_most`."""

    name: str
    measure: Callable[[Path], float]  # of SmolLM2's file
    at_most: float
    unit: str = "s"


OTHERS = [  # what a user waits for before the first token, and what it takes
    Other("open SmolLM2 until the tokenizer encodes", lambda path: printed(OPEN.format(path=str(path))), 0.25),
    Other("pocketlm --help", lambda path: seconds_of([sys.executable, "-m", "pocketlm", "--help"]), 0.15),
    Other("compile SmolLM2's kernels, nothing cached", lambda _: compiled(1), 0.7),
    Other("the same from the cache", lambda _: compiled(2), 0.1),
    Other("first token of a ninth beside eight", lambda path: ninth(path)["passes"], 2.0, "passes"),
    Other("the same, in tokens of the eight", lambda path: (found := ninth(path))["first"] / found["others"], 4.0, "tokens"),
    Other("open SmolLM2: peak beyond file and cache", peak, 60, "MB"),
]


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def find(name: str, folder: Path) -> Path:
    """The file of a model such as "48M Q4_0" or "SmolLM2"."""
    return find_model("smollm2") if name == "SmolLM2" else shapes.find(name.replace(" ", "-"), folder)


@contextmanager
def models(folder: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(folder or temporary)
        path.mkdir(parents=True, exist_ok=True)
        yield path


def mark(value: float, at_least: float, aim: float | None = None) -> str:
    return "MISSED" if value < at_least else "aim reached" if aim is not None and value >= aim else "ok"


def show_rows(
    rows: list[Row], folder: Path, rounds: int, quick: bool, steady: machine.Steady, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure and print every row, and the large model's share of the memory bandwidth."""
    result: dict[str, Any] = {"rows": []}
    say(f"\n{'':<40} {'tokens/s':>10} {'rival':>10}   ratio  at least / aim")
    for row in rows:
        path = find(row.model, folder)
        try:
            found = measure(row, path, rounds, 4 if quick and row.task != "prefill" else row.n, steady, say)
        except Failure as failure:
            result["rows"].append({"name": row.name, "rival": row.rival, "status": failure.status, "reason": str(failure)})
            say(f"{row.name:<40} {failure.status}: {failure}")
            continue
        result["rows"].append({"name": row.name, "rival": row.rival, **found, "at_least": row.at_least, "aim": row.aim})
        limits = f"{row.at_least:.2f}" + (f" / {row.aim:.1f}" if row.aim else "")
        verdict = mark(found["ratio"], row.at_least, row.aim)
        say(f"{row.name:<40} {found['ours']:>10.1f} {found['theirs']:>10.1f} {found['ratio']:>7.2f}  {limits:<14} {verdict}")
        if row.name == LARGE:
            possible = machine.bandwidth(row.threads)
            share = found["ours"] * open_subject(path).bytes_per_token / possible
            result |= {"bandwidth": possible, "share": share}
            gigabytes = f"of {possible / 1e9:.1f} GB/s"
            verdict = mark(share, 0.8, 0.92)
            say(f"{'  share of the memory bandwidth':<40} {gigabytes:>21} {share:>7.0%}  {'80% / 92%':<14} {verdict}")
    return result


def show_others(others: list[Other], folder: Path, rounds: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    for name, measure_once, limit, unit in others:
        path = find("SmolLM2", folder)
        value = statistics.median(measure_once(path) for _ in range(rounds))
        rows.append({"name": name, "value": value, "unit": unit, "at_most": limit})
        say(f"{name:<44} {value:>8.3f} {unit:<6} at most {limit:g} {unit}   {mark(-value, -limit)}")
    return rows


def instructions() -> str:
    """The processor's instruction sets that matter for speed, and the level that pocketlm's kernels are compiled for."""
    from pocketlm.runtime.native import levels

    level = levels.detect()
    known = {flag for other in levels.LEVELS.values() for flag in other.needs} | set(WIDER)
    found = sorted(known & levels.cpu_flags(level.machine))
    return f"kernels for {level.name}; the processor has {', '.join(found)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round of everything: does the script work?")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    parser.add_argument("--only", action="append", metavar="TEXT", help="only rows whose name holds this; may be given again")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", metavar="FOLDER", help="keep the written models here")
    options = parser.parse_args()
    rounds, steady = 1 if options.quick else options.rounds, machine.Steady()

    def say(line: str) -> None:
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)

    def wanted(name: str) -> bool:
        return not options.only or any(text in name for text in options.only)

    result: dict[str, Any] = {"machine": machine.line(machine.describe()), "instructions": instructions()}
    say(f"{result['machine']}\n{result['instructions']}")
    with models(options.models) as folder:
        result |= show_rows([row for row in ROWS if wanted(row.name)], folder, rounds, options.quick, steady, say)
        result["others"] = show_others([other for other in OTHERS if wanted(other.name)], folder, rounds, say)
    result["drift"] = steady.drift
    if steady.drift > DRIFT:
        say(f"\nwarning: the reference loop was up to {steady.drift - 1:.0%} slower than its best: the machine is busy")
    if options.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
