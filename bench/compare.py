"""A result beside an older one: what got slower or faster by more than either run's median may be off by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pocketlm.bench.report import Table

LEAST = 0.05  # no change below this is shown, however steady the runs were
Result = dict[str, Any]


def compare(new: Result, old: Result) -> Table:
    """The measures that moved, the worst first; the notes say what cannot be compared."""
    before, after = dict(_measures(old)), dict(_measures(new))
    changes = []
    for key in before.keys() & after.keys():
        if not before[key]["median"]:
            continue
        change = after[key]["median"] / before[key]["median"] - 1
        if abs(change) > max(LEAST, before[key]["uncertainty"] + after[key]["uncertainty"]):
            changes.append((change, key))
    rows = []
    for change, key in sorted(changes):
        then, now = (f"{measures[key]['median']:.1f}" for measures in (before, after))
        rows.append([*key, then, now, f"{change:+.0%}", "slower" if change < 0 else "faster"])
    header = ["model", "backend", "tokens/s", "then", "now", "change", ""]
    return Table(f"Since {old['time']}", header, rows, list(_notes(new, old, before, after)))


def _measures(result: Result) -> Iterator[tuple[tuple[str, str, str], Result]]:
    for model in result["models"]:
        for row in model["backends"]:
            for job, word in (("prefill", "prompt"), ("decode", "after")):
                for n, measure in row.get(job, {}).items():
                    yield (model["name"], row["name"], f"{word} {n}"), measure
            if "user" in row:
                yield (model["name"], row["name"], "user sees"), row["user"]


def _notes(new: Result, old: Result, before: dict[Any, Result], after: dict[Any, Result]) -> Iterator[str]:
    both, lost = len(before.keys() & after.keys()), sorted(before.keys() - after.keys())
    yield f"{both} figures compared" + (f"; {len(lost)} of then are not there now, as {' '.join(lost[0])}" if lost else "")
    for name in ("cpu", "threads"):
        if new["machine"][name] != old["machine"][name]:
            yield f"not the same machine: {name} was {old['machine'][name]}, is {new['machine'][name]}"
    for name, seconds in new["reference_loop"]["medians"].items():
        then = old["reference_loop"]["medians"].get(name)
        if then and abs(seconds / then - 1) > 0.1:
            yield f"the {name} reference loop takes {seconds / then:.0%} of its time then: the machine itself has changed"
