"""What a server has done, as Prometheus reads it (text format 0.0.4). Knows no HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocketlm.serve.answering import Answerer


def text(answerer: Answerer) -> str:
    """Every metric with its help and type."""
    c, slots = answerer.counters, answerer.slots
    rows = [
        ("requests_total", "counter", "Requests that were given a slot.", c.requests),
        ("requests_refused_total", "counter", "Requests that were refused because too many waited.", c.refused),
        ("requests_abandoned_total", "counter", "Requests whose client hung up before the end.", c.left),
        ("prompt_tokens_total", "counter", "Tokens of prompts that were computed.", c.prompt_tokens),
        ("cached_tokens_total", "counter", "Tokens of prompts that a slot still had.", c.cached_tokens),
        ("tokens_predicted_total", "counter", "Tokens of answers.", c.generated_tokens),
        ("prompt_seconds_total", "counter", "Seconds until first tokens.", c.prompt_seconds),
        ("tokens_predicted_seconds_total", "counter", "Seconds from first tokens to last ones.", c.generation_seconds),
        ("slots", "gauge", "Requests that can be answered at the same time.", len(slots.all)),
        ("requests_processing", "gauge", "Requests that are being answered.", slots.busy),
        ("requests_deferred", "gauge", "Requests that wait for a slot.", slots.waiting),
    ]
    lines = [f"# HELP pocketlm_{name} {help}\n# TYPE pocketlm_{name} {kind}\npocketlm_{name} {value}\n"
             for name, kind, help, value in rows]  # fmt: skip
    return "".join(lines)
