"""Results of `pocketlm bench` that nobody measured, for the tests of what is made of them."""

from __future__ import annotations

import statistics
from typing import Any

from pocketlm.bench import schema


def measure(median: float, uncertainty: float = 0.01) -> dict[str, Any]:
    return {"median": median, "low": median * 0.99, "high": median * 1.01, "uncertainty": uncertainty, "rounds": [median] * 5}


def result(**speeds: float) -> dict[str, Any]:
    """A result of one model with these backends' decode figures."""
    latency = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    rows = [
        {
            "name": name, "status": "ok", "reason": "", "facts": {"version": f"{name} 7", "settings": "s"},
            "load_seconds": 0.5, "file_bytes": 1000, "peak_bytes": 2_000_000,
            "prefill": {"32": {**measure(10 * speed), "joules_per_token": None}},
            "decode": {"0": {**measure(speed), "latency_ms": latency, "joules_per_token": 0.25}},
        }
        for name, speed in speeds.items()
    ]  # fmt: skip
    model = {"name": "m", "architecture": "llama", "parameters": 8, "file_bytes": 9, "bytes_per_token": 5, "bound": 99.0,
             "n_ctx": 64, "backends": rows}  # fmt: skip
    return {
        "schema": schema.NAME, "version": schema.VERSION, "time": "2026-01-01T00:00:00Z",
        "machine": {"cpu": "a|b", "cores": 2, "threads": 2, "memory_free_bytes": None, "bandwidth": 1e9, "system": "s",
                    "python": "3.12", "packages": {"pocketlm": "0.1.0", "numpy": "2.0"}, "load_average": [], "energy": False},
        "settings": {"rounds": 5, "tokens": 4, "prompts": [32], "depths": [0], "threads": 2, "time_limit": 9, "pass_seconds": 0,
                     "user_rounds": 1, "user_tokens": 4},
        "reference_loop": {"drift": 1.0, "medians": {"compute": 1.0}}, "warnings": ["a warning"], "models": [model],
    }  # fmt: skip


def llama_bench_result(**speeds: float) -> dict[str, Any]:
    """The same with llama-bench's tests alone: pp512 ten times as fast as tg128."""
    found = result(**speeds)
    found["settings"] |= {"prompts": [], "depths": [], "pp": [512], "tg": [128]}
    for row in found["models"][0]["backends"]:
        for old, name, number in (("prefill", "pp", "512"), ("decode", "tg", "128")):
            figures = next(iter(row.pop(old).values()))
            rounds = [x * figures["median"] for x in (0.9, 1.0, 1.0, 1.0, 1.2)]
            row[name] = {
                number: {**figures, "rounds": rounds, "mean": statistics.fmean(rounds), "deviation": statistics.stdev(rounds)}
            }
    return found
