"""`pocketlm bench --compare`: what got slower is told from a busy machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bench_results import llama_bench_result, result

from pocketlm.bench import compare, machine, summary

STEADY = machine.Steady()


def verdicts(new: dict[str, Any], old: dict[str, Any]) -> dict[tuple[str, str], str]:
    return {(row[1], row[2]): row[-1] for row in compare.compare(new, old).rows}


def test_a_comparison_lists_what_moved_by_more_than_the_noise_the_worst_first() -> None:
    old, new = result(a=100.0, b=100.0, c=100.0, d=100.0), result(a=80.0, b=97.0, c=120.0, d=88.0)
    for row in (old["models"][0]["backends"][3], new["models"][0]["backends"][3]):
        row["decode"]["0"]["uncertainty"] = row["prefill"]["32"]["uncertainty"] = 0.07
    table = compare.compare(new, old)
    assert [(row[1], row[-1]) for row in table.rows if row[2] == "after 0"] == [("a", "slower"), ("c", "faster")]
    assert table.notes[0] == "8 figures compared: 2 slower, 2 faster, 0 unreliable"


@pytest.mark.parametrize("which", ["then", "now"])
def test_a_change_within_the_drift_of_either_run_is_unreliable(which: str) -> None:
    old, new = result(a=100.0, b=100.0), result(a=70.0, b=45.0)
    {"then": old, "now": new}[which]["reference_loop"]["drift"] = 1.5  # a busy machine explains 67 and no less
    table = compare.compare(new, old)
    assert [row[1:3] + row[-1:] for row in table.rows if row[2] == "after 0"] == [
        ["b", "after 0", "slower"], ["a", "after 0", "unreliable: the machine was busy"],
    ]  # fmt: skip
    assert "the reference loops moved by 50%: measure again while nothing else runs" in table.notes


def test_a_machine_that_was_busy_all_the_time_is_noticed_between_the_runs() -> None:
    old, new = result(a=100.0), result(a=60.0)
    new["reference_loop"]["medians"]["compute"] = 1.8 * old["reference_loop"]["medians"]["compute"]
    assert set(verdicts(new, old).values()) == {"unreliable: the machine was busy"}
    assert set(verdicts(old, new).values()) == {"unreliable: the machine was busy"}  # and a quiet one is no improvement


def test_two_rounds_are_too_few_for_a_verdict() -> None:
    old, new = result(a=100.0), result(a=50.0)
    new["models"][0]["backends"][0]["decode"]["0"]["uncertainty"] = None
    assert verdicts(new, old) == {("a", "prompt 32"): "slower", ("a", "after 0"): "unreliable: fewer than 3 rounds"}


def test_llama_benchs_tests_are_compared_too() -> None:
    assert verdicts(llama_bench_result(a=50.0), llama_bench_result(a=100.0)) == {
        ("a", "pp512"): "slower",
        ("a", "tg128"): "slower",
    }


def test_a_comparison_says_when_the_machine_is_another() -> None:
    old, new = result(a=100.0), result(a=50.0)
    new["machine"]["cpu"], new["reference_loop"]["medians"]["compute"] = "another", 2.0
    table = compare.compare(new, old)
    assert "cpu was a|b, is another" in " ".join(table.notes)
    assert "200%" in " ".join(table.notes)
    assert {row[-1] for row in table.rows} == {"slower"}  # which is what the comparison of two machines is for


def test_a_comparison_says_when_a_name_is_now_another_file() -> None:
    old, new = result(a=100.0), result(a=200.0)
    assert "not the same file" not in " ".join(compare.compare(new, old).notes)
    new["models"][0]["file_bytes"] = 4000
    assert "not the same file: m had 9 bytes, has 4,000" in compare.compare(new, old).notes


def simulated(random: np.random.Generator, speed: float, load: float) -> dict[str, Any]:
    """A run on a machine where others work `load` of the time, for stretches of several rounds, and halve the speed."""
    STEADY.times = {"compute": [], "memory": []}
    found, rounds, busy = result(a=speed), [], random.random() < load
    for _ in range(40):
        busy = busy if random.random() < 0.8 else random.random() < load
        slow = (1.0 + busy) * (1 + 0.01 * random.random())
        rounds.append(speed / slow)
        for times in STEADY.times.values():
            times.append(slow * (1 + 0.01 * random.random()))
    row = found["models"][0]["backends"][0]
    del row["prefill"]
    row["decode"]["0"] |= summary.summarize(rounds[:: len(rounds) // 8])
    found["reference_loop"] = {"drift": STEADY.drift, "medians": STEADY.medians}
    return found


@pytest.mark.parametrize("load", [0.0, 0.3, 0.7])
def test_other_programs_are_not_taken_for_a_change(load: float) -> None:
    random = np.random.default_rng(3)
    pairs = [(simulated(random, 100.0, load), simulated(random, 100.0, load)) for _ in range(150)]
    found = [verdict for new, old in pairs for verdict in verdicts(new, old).values()]
    assert sum(not verdict.startswith("unreliable") for verdict in found) <= 2
    assert load == 0.0 or len(found) > 5  # the figures did move


@pytest.mark.parametrize(("load", "speed"), [(0.0, 85.0), (0.3, 30.0), (0.7, 30.0)])
def test_a_change_beyond_what_the_machine_does_is_found(load: float, speed: float) -> None:
    random = np.random.default_rng(4)
    pairs = [(simulated(random, speed, load), simulated(random, 100.0, load)) for _ in range(50)]
    assert sum("slower" in verdicts(new, old).values() for new, old in pairs) >= (50 if load == 0 else 40)
