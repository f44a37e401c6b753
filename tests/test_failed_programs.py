"""A test that fails since a program it started ended with an error shows what that program wrote to standard error."""

import pytest
from test_known_skips import run

FAILING = """
import subprocess, sys
def test_it():
    code = "import sys; sys.stderr.write(chr(97) * 3 + ' is why'); sys.exit(1)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True{text})
def test_silent():
    subprocess.run([sys.executable, "-c", "import sys; sys.exit(1)"], capture_output=True, check=True{text})
"""


@pytest.mark.parametrize("text", ["", ", text=True"])
def test_the_report_shows_what_a_program_said_before_it_failed(text, tmp_path):
    (tmp_path / "test_failing.py").write_text(FAILING.format(text=text))
    done = run(tmp_path)
    assert "2 failed" in done.stdout
    assert "aaa is why" in done.stdout
    assert "- standard error of the program -" in done.stdout
    assert "(nothing)" in done.stdout
