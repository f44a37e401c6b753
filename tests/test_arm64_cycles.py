"""Instructions of the kernels' inner loops on aarch64, counted in the code itself: no format is taken apart bit by bit."""

from __future__ import annotations

import shutil

import pytest

from pocketlm.bench import arm64_cycles
from pocketlm.errors import PocketlmError

CODE = """
Q_product1:
\tmov\tx0, #0
.LBB0_1:
\tadd\tx0, x0, #1  // a comment
\tcbz\tx0, .LBB0_3
.LBB0_2:
\tld1\t{ v0.4s }, [x1], #16
\tsdot\tv1.4s, v0.16b, v2.16b
\tsubs\tx0, x0, #1
\tb.ne\t.LBB0_2
.LBB0_3:
\tret
.Lfunc_end0:
"""


def test_the_inner_loop_is_the_block_that_branches_to_itself():
    lines = arm64_cycles.inner_loop(CODE, "Q_product1")
    assert [line.split()[0] for line in lines] == ["ld1", "sdot", "subs", "b.ne"]
    with pytest.raises(PocketlmError, match="no loop"):
        arm64_cycles.inner_loop(CODE, "another")


@pytest.mark.parametrize("core", arm64_cycles.CORES[:2], ids=lambda core: core.cpu)
@pytest.mark.parametrize("fmt", ["Q4_0", "Q5_0", "Q5_1"])
def test_formats_of_32_weights_take_at_most_40_instructions_for_them(monkeypatch, core, fmt):
    monkeypatch.setattr(arm64_cycles, "analyse", lambda lines, cpu, rounds: 1.0)
    assert arm64_cycles.loop_of(fmt, core, 1, 1).instructions < 40


@pytest.mark.parametrize(("core", "tokens", "most"), [(0, 1, 10.5), (0, 8, 10.5), (1, 1, 22.5), (1, 8, 22.5)])
@pytest.mark.parametrize("fmt", ["Q4_0", "Q8_0", "Q4_K"])
def test_an_activation_is_multiplied_by_its_lane(monkeypatch, core, tokens, most, fmt):
    """No instruction is spent on spreading it over a register, and few on moving words in and out of memory."""
    monkeypatch.setattr(arm64_cycles, "analyse", lambda lines, cpu, rounds: 1.0)
    assert arm64_cycles.loop_of(fmt, arm64_cycles.CORES[core], tokens, 1).instructions <= most


@pytest.mark.parametrize(("fmt", "most"), [("Q4_0", 9.0), ("Q8_0", 7.3), ("Q4_1", 9.5), ("IQ4_NL", 11.6), ("F16", 22.5)])
def test_a_single_token_spends_no_instruction_on_addresses(monkeypatch, fmt, most):
    monkeypatch.setattr(arm64_cycles, "analyse", lambda lines, cpu, rounds: 1.0)
    assert arm64_cycles.loop_of(fmt, arm64_cycles.CORES[0], 1, 1).instructions <= most


@pytest.mark.parametrize(("fmt", "most"), [("Q2_K", 19.5), ("Q6_K", 22.2)])
def test_runs_of_16_columns_pay_for_four_sums_and_not_for_eight(monkeypatch, fmt, most):
    monkeypatch.setattr(arm64_cycles, "analyse", lambda lines, cpu, rounds: 1.0)
    assert arm64_cycles.loop_of(fmt, arm64_cycles.CORES[0], 1, 1).instructions <= most


@pytest.mark.skipif(shutil.which("llvm-mca") is None, reason="needs llvm-mca (Debian package llvm)")
def test_the_analyser_counts_cycles():
    lines = arm64_cycles.inner_loop(CODE, "Q_product1")
    assert 1 <= arm64_cycles.analyse(lines, "cortex-a76", 50) < 10  # an A72 has no sdot, and newer analysers say so


def test_another_core_may_stand_for_one_that_llvm_has_no_model_of(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(arm64_cycles, "LAYOUTS", {"Q4_0": arm64_cycles.LAYOUTS["Q4_0"]})
    monkeypatch.setattr(arm64_cycles, "analyse", lambda lines, cpu, rounds: asked.append(cpu) or 1.0)
    monkeypatch.setattr("sys.argv", ["arm64_cycles", "--a76", "neoverse-n1"])
    arm64_cycles.main()
    assert list(dict.fromkeys(asked)) == ["neoverse-n1", "cortex-a72", "cortex-a53"]
    assert "| neoverse-n1 (Pi 5, 2.4 GHz), dotprod | Q4_0 |" in capsys.readouterr().out
