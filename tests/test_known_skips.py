"""A run with `--known-skips-only` fails for a skip that nobody allowed, wherever the skip comes from, and for no other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from known_skips import KNOWN

KNOWN_ONLY = """
import pytest
@pytest.mark.skipif(True, reason="this CPU lacks amx")
def test_of_a_cpu(): pass
def test_that_passes(): pass
@pytest.mark.xfail(strict=True)
def test_that_is_known_to_fail(): assert False
"""
UNKNOWN = """
import pytest
def test_one(): pytest.skip("no apples in the test")
@pytest.fixture
def pears(): pytest.skip("no pears in a fixture")
def test_two(pears): pass
@pytest.mark.skip(reason="no plums by a mark")
def test_three(): pass
def test_four(): pytest.skip("this NumPy has no OpenBLAS in its wheel and more")
"""
UNKNOWN_MODULE = "import pytest\npytest.importorskip('no_such_module', reason='no cherries of a module')\n"
REASONS = [
    "no apples in the test", "no pears in a fixture", "no plums by a mark", "this NumPy has no OpenBLAS in its wheel and more",
]  # fmt: skip


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).parent
    (folder / "conftest.py").write_text(
        f"import sys\nsys.path.append({str(tests)!r})\n" + (tests / "conftest.py").read_text("utf-8"), "utf-8"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), *options, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.parametrize("parallel", [(), ("-n", "2", "--capture=sys")], ids=["one process", "xdist"])
def test_unknown_skips_fail_the_run_and_are_named(parallel, tmp_path):
    if parallel:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (tmp_path / "test_known.py").write_text(KNOWN_ONLY)
    (tmp_path / "test_unknown.py").write_text(UNKNOWN)
    (tmp_path / "test_module.py").write_text(UNKNOWN_MODULE)
    done = run(tmp_path, "--known-skips-only", *parallel)
    assert done.returncode == 6, done.stdout
    listed = done.stdout.partition("does not know")[2]
    for reason in [*REASONS, "no cherries of a module"]:
        assert re.search(rf"{reason}: \S*test_(unknown|module)\.py", listed), listed
    assert "amx: " not in listed


def test_without_the_option_a_skip_is_a_skip(tmp_path):
    (tmp_path / "test_unknown.py").write_text(KNOWN_ONLY + UNKNOWN)
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "does not know" not in done.stdout


def test_known_skips_and_expected_failures_are_no_failure(tmp_path):
    (tmp_path / "test_known.py").write_text(KNOWN_ONLY)
    done = run(tmp_path, "--known-skips-only")
    assert done.returncode == 0, done.stdout
    assert "does not know" not in done.stdout


def test_every_known_reason_stands_in_a_test_and_says_why():
    files = [path for path in Path(__file__).parent.glob("*.py") if "known_skips" not in path.name]
    sources = "\n".join(path.read_text("utf-8") for path in files)
    for reason, why in KNOWN.items():
        assert re.search(re.sub(r"\.\*$", "", reason), sources), f"no test is skipped because {reason!r}"
        assert len(why) > 7
