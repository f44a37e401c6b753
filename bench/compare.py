"""A result beside an older one: which figures moved, and whether that is the program's doing or may be the machine's.

A change is real where it is larger than what the medians of both runs may be off by together, and larger than what the
reference loops moved in the meantime: within either run, and from one run to the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pocketlm.bench.report import Table
from pocketlm.bench.summary import FEWEST
from pocketlm.bench.tasks import TASKS

LEAST = 0.05  # no change below this is shown, however steady the runs were
BUSY = "unreliable: the machine was busy"
FEW = f"unreliable: fewer than {FEWEST} rounds"
Result = dict[str, Any]


def compare(new: Result, old: Result) -> Table:
    """The figures that moved, those that can be relied on first, the worst first; the notes say what cannot be compared."""
    before, after = dict(_measures(old)), dict(_measures(new))
    drift, found = _drift(new, old), []
    for key in before.keys() & after.keys():
        then, now = before[key]["median"], after[key]["median"]
        if then and now and (verdict := _verdict(before[key], after[key], drift)):
            row = [*key, f"{then:.1f}", f"{now:.1f}", f"{now / then - 1:+.0%}", verdict]
            found.append((verdict in (BUSY, FEW), now / then, row))
    header = ["model", "backend", "tokens/s", "then", "now", "change", ""]
    rows = [row for *_, row in sorted(found)]
    return Table(f"Since {old['time']}", header, rows, list(_notes(new, old, before, after, rows, drift)))


def _verdict(then: Result, now: Result, drift: float) -> str | None:
    """None: it has not moved beyond what the medians may be off by. `drift`: a factor, 1.0 for a steady machine."""
    factor = now["median"] / then["median"]
    uncertainties = then["uncertainty"], now["uncertainty"]
    if abs(factor - 1) <= max(LEAST, sum(x or 0.0 for x in uncertainties)):
        return None
    if None in uncertainties:
        return FEW
    if max(factor, 1 / factor) <= drift:
        return BUSY
    return "slower" if factor < 1 else "faster"


def _drift(new: Result, old: Result) -> float:
    """How much the reference loops moved within either run and, on the same machine, from one to the other: a factor."""
    factors = [result["reference_loop"]["drift"] for result in (new, old)]
    if not list(_differences(new, old)):
        factors += [max(factor, 1 / factor) for _, factor in _loops(new, old)]
    return max(factors)


def _loops(new: Result, old: Result) -> Iterator[tuple[str, float]]:
    """How many times as long each reference loop takes now."""
    for name, seconds in new["reference_loop"]["medians"].items():
        then = old["reference_loop"]["medians"].get(name)
        if then and seconds:
            yield name, seconds / then


def _measures(result: Result) -> Iterator[tuple[tuple[str, str, str], Result]]:
    for model in result["models"]:
        for row in model["backends"]:
            for task in TASKS:
                for n, measure in row.get(task.name, {}).items():
                    yield (model["name"], row["name"], task.column.format(n)), measure
            if "user" in row:
                yield (model["name"], row["name"], "user sees"), row["user"]


def _differences(new: Result, old: Result) -> Iterator[str]:
    for name in ("cpu", "threads"):
        if new["machine"][name] != old["machine"][name]:
            yield f"not the same machine: {name} was {old['machine'][name]}, is {new['machine'][name]}"


def _notes(
    new: Result, old: Result, before: dict[Any, Result], after: dict[Any, Result], rows: list[list[str]], drift: float
) -> Iterator[str]:
    both, lost = len(before.keys() & after.keys()), sorted(before.keys() - after.keys())
    verdicts = [row[-1].partition(":")[0] for row in rows]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("slower", "faster", "unreliable"))
    missing = f"; {len(lost)} of then are not there now, as {' '.join(lost[0])}" if lost else ""
    yield f"{both} figures compared: {counts}{missing}"
    if any(row[-1] == BUSY for row in rows):
        yield f"the reference loops moved by {drift - 1:.0%}: measure again while nothing else runs"
    yield from _differences(new, old)
    then = {model["name"]: model["file_bytes"] for model in old["models"]}
    for name, size in ((model["name"], model["file_bytes"]) for model in new["models"]):
        if then.get(name, size) != size:
            yield f"not the same file: {name} had {then[name]:,} bytes, has {size:,}"
    for name, factor in _loops(new, old):
        if abs(factor - 1) > 0.1:
            yield f"the {name} reference loop takes {factor:.0%} of its time then: the machine itself has changed"
