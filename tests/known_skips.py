"""`pytest --known-skips-only`: a run in which a test is skipped for a reason that is not in the table below fails.

For `.ci/run`, which installs all that tests compare with: a package that is missing there would otherwise take its tests
along without a word. In a checkout like any other, tests skip and say why.
"""

import re
import sys
from typing import Any

import pytest

# A reason, as a regular expression for all of it: why `.ci/run` cannot remove it.
KNOWN = {
    r"this CPU lacks .*": "a CPU's instructions cannot be installed; each level is run wherever a machine has it",
    r"no emulator for x86-64": "on a machine of another kind qemu has no vector instructions of x86-64",
    r"runs x86-64 code": "on a machine of another kind",
    r"compares with /proc/cpuinfo": "the flags there are those of x86-64",
    r"permissions do not bind root": "apt-get wants to be run as root; an ordinary user's run covers these",
    r"modes do not bind Windows or root": "the same",
    r"no test vectors in .*": "the large vocabularies are no part of the repository; tests/vectors proves the same",
    r"this system does not let programs be traced": "a container may forbid it, whatever is installed",
    r"this system does not allow (namespaces|mounts)": "the same",
    r"this system has no IPv6": "the same",
    r"this system lets nobody register programs of another processor: .*": "the same",
    r"only Windows loads a DLL .*": "a test under wine does so here",
    r"llama-cpp-python came without the ggml-base library": "some of its wheels link it into one file",
    r"this NumPy has no OpenBLAS in its wheel": "the wheels of some platforms use another library",
    r"its library does not convert this: .*": "no library knows every architecture",
    r"the NumPy executor promises closeness, not bits": "the native one promises them, and the test has it",
    r"the slopes of .* heads are another test's": "two parameters that do not go together",
}
# The same for a run on Windows or under wine (tests/windows/suite.py)
ON_WINDOWS = {
    r".*(POSIX|fork|SIGKILL|signal|flock|/dev/full|always full|named pipes|interval timer|XDG|limit on the size).*":
        "Windows has no such thing",
    r".*(/proc|madvise|getrusage|only Linux|needs Linux|Linux's|Linux lets|ulimit|packs for this system|does not say).*":
        "Linux says it, Windows does not",
    r".*(terminal|pexpect).*": "Windows has consoles, no pseudo-terminals: test_pack_windows.py runs one, from outside of wine",
    r"names of files are Unicode on this system": "Windows' and macOS' are; a POSIX system's are bytes",
    r"needs wine .*": "it is wine that runs this",
    r".*(qemu|no emulator).*": "Windows has no qemu-user",
    r"this Python has no pip": "the Python under wine has none",
    r"(.*(PyTorch|torch).*|(writes|makes) the checkpoints?( and the adapter)?|writes the adapter|draws)":
        "torch needs a minute to start under wine",
    r"(onnxruntime|transformers|llama-cpp-python|matplotlib|torch|onnx|llama[._]cpp|PyInstaller) "
    r"(is not installed|is what is compared with|reads its archives)": "large, and wine adds nothing to it",
    r"(the package onnx is not installed|(writes|verifies|runs the) ONNX.*|runs what was written)": "the same",
    r"(playwright|axe-playwright-python|markdown-it-py|no Chromium|the openai package|needs llvm-mca|makes the folders"
    r"|jsonschema|the 8-b|distributed spreads|systemd-analyze).*":
        "large, or no program for Windows; Linux' run has it",
    r"Windows has no Ctrl-C .*": "Windows itself says so",
    r"SmolLM2 is not installed.*": "it is talked to under wine as a packed program",
    r"stubs of other systems keep NumPy's library": "what replaces it on Windows is tested in a packed program under wine",
}  # fmt: skip


UNKNOWN_SKIPS = 6  # an exit status that is none of pytest's


class KnownSkips:
    """Collects the skips of a run; those that the table does not know are listed at its end and turn its exit status to 6."""

    def __init__(self) -> None:
        self.known = {**KNOWN, **(ON_WINDOWS if sys.platform == "win32" else {})}
        self.unknown: dict[str, list[str]] = {}
        self.numbers: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._see(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._see(report)

    def _see(self, report: Any) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            why = next((why for known, why in self.known.items() if re.fullmatch(known, reason)), None)
            if why is None:
                self.unknown.setdefault(reason, []).append(report.nodeid)
            else:
                self.numbers[f"{reason} ({why})"] = self.numbers.get(f"{reason} ({why})", 0) + 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unknown and session.exitstatus in (0, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = UNKNOWN_SKIPS

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if sys.platform == "win32" and self.numbers:
            terminalreporter.section("skipped on Windows")
            for reason, number in sorted(self.numbers.items(), key=lambda row: -row[1]):
                terminalreporter.line(f"{number:4} {reason}")
        if self.unknown:
            terminalreporter.section("skipped for a reason that tests/known_skips.py does not know", red=True)
        for reason, tests in self.unknown.items():
            terminalreporter.line(f"{reason}: {tests[0]}" + f" and {len(tests) - 1} more" * (len(tests) > 1), red=True)
