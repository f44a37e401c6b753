"""A stub is the same bytes whoever composes it, of the files that were fetched before; and what its Python is told."""

import os
import site
import subprocess
import sys
import venv
from pathlib import Path

from packing import composed_stub
from test_pack_aarch64 import entries

PLATFORM = "macos-arm64"  # the smallest, and of no system whose own Python might go in
COMPOSE = """
import os, site, sys
from pathlib import Path
os.umask(0o077)
for folder in sys.argv[4:]:
    site.addsitedir(folder)
from pocketlm.build.compose import compose
compose(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_another_python_of_this_version_composes_the_same_bytes_without_a_network(request, tmp_path):
    """Another installation, folder, order of sets, clock, umask and user."""
    cache = Path(request.config.cache.mkdir("pocketlm-stub"))
    stub = composed_stub(PLATFORM, cache)
    python = Path(sys.executable)
    if os.name != "nt":  # where making another takes a launcher that the Python under wine has not
        venv.create(tmp_path / "elsewhere")
        python = tmp_path / "elsewhere/bin/python"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "HOME": str(tmp_path), "PIP_NO_INDEX": "1"}
    command = [python, "-c", COMPOSE, PLATFORM, tmp_path / "stub", cache / "wheels", *site.getsitepackages()]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "stub").read_bytes() == stub.read_bytes()


def test_python_is_told_that_its_code_has_no_docstrings(request):
    """As -OO would: some versions of NumPy complain of missing ones otherwise, and do not start."""
    stub = composed_stub(PLATFORM, Path(request.config.cache.mkdir("pocketlm-stub")))
    assert [name for kind, name, _ in entries(stub) if kind == b"o"] == ["X utf8=1", "O", "O"]
