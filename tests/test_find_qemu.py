"""The emulator is found under the names that Debians give it."""

from pathlib import Path

import pytest
from find_qemu import find_qemu

STATIC, DYNAMIC = b"\x7fELF".ljust(8192, b"\0"), b"\x7fELF".ljust(1000, b"\0") + b"/lib64/ld-linux-x86-64.so.2\0"


@pytest.mark.parametrize(
    ("programs", "anywhere", "here"),
    [
        ({}, None, None),
        ({"qemu-aarch64": DYNAMIC}, None, "qemu-aarch64"),
        ({"qemu-aarch64": DYNAMIC, "qemu-aarch64-static": STATIC}, "qemu-aarch64-static", "qemu-aarch64-static"),
        ({"qemu-aarch64": STATIC}, "qemu-aarch64", "qemu-aarch64"),
    ],
    ids=["none", "Debian 12's qemu-user", "qemu-user-static", "a newer qemu-user"],
)
def test_one_that_runs_in_another_root_and_one_that_runs_here(programs, anywhere, here, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, content in programs.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o755)
    found = [find_qemu(), find_qemu(anywhere=False)]
    assert [path and Path(path).name for path in found] == [anywhere, here]
