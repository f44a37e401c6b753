"""Kernels compiled aot of time: every platform's file can be made here, and this one's runs without llvmlite."""

import ctypes
import subprocess
import sys

import pytest
from aarch64_runner import CPUS, call_aarch64, needs_qemu

from pocketlm.errors import FileError, UsageError
from pocketlm.runtime.native import aot, levels
from pocketlm.runtime.native.aot import PLATFORMS, build_images, read_images
from pocketlm.runtime.native.linker import load

HERE = next(name for name, p in PLATFORMS.items() if (p.machine, p.abi) == (levels.host_machine(), levels.host_abi()))


def texts(level, abi):
    """Two modules; the results tell which level and which calling convention they were made for."""
    number = 100 * list(levels.LEVELS).index(level.name) + (1 if abi == "win64" else 2)
    convention = "win64cc " if abi == "win64" else ""
    return {
        name: f'define {convention}i64 @{name}(i64 %x, i64 %y) nounwind "no-builtins" {{\n'
        f"  %a = {operation} i64 %x, %y\n  %b = add i64 %a, {number}\n  ret i64 %b\n}}"
        for name, operation in (("difference", "sub"), ("product", "mul"))
    }


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_platforms_file_can_be_made_here(platform, tmp_path, monkeypatch):
    path = tmp_path / "kernels"
    build_images(path, platform, texts, "1")
    monkeypatch.setattr(aot, "host_abi", lambda: PLATFORMS[platform].abi)
    for level in levels.LEVELS.values():
        if level.machine == PLATFORMS[platform].machine and not platform.startswith(level.system):
            assert f'"{level.name}"'.encode() not in path.read_bytes()  # nobody asks for it there
        elif level.machine == PLATFORMS[platform].machine:
            images = read_images(path, level, "1")
            assert {name: linker.machine for name, linker in images.items()} == {
                "difference": level.machine,
                "product": level.machine,
            }
        else:
            with pytest.raises(FileError, match="another platform"):
                read_images(path, level, "1")


def test_this_platforms_file_runs(tmp_path):
    build_images(tmp_path / "kernels", HERE, texts, "1")
    level = levels.detect()
    images = read_images(tmp_path / "kernels", level, "1")
    number = 100 * list(levels.LEVELS).index(level.name) + (1 if levels.host_abi() == "win64" else 2)
    for name, expected in (("difference", 20 - 3), ("product", 20 * 3)):
        loaded = load(images[name])
        assert loaded.function(name, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(20, 3) == expected + number
        loaded.close()


@needs_qemu
def test_a_file_made_here_runs_on_aarch64(tmp_path, monkeypatch):
    build_images(tmp_path / "kernels", "linux-aarch64", texts, "1")
    monkeypatch.setattr(aot, "host_abi", lambda: "sysv")
    for name, cpu in CPUS.items():
        linker = read_images(tmp_path / "kernels", levels.LEVELS[name], "1")["difference"]
        assert call_aarch64(linker, "difference", [20, 3], cpu)[0] == 17 + 100 * list(levels.LEVELS).index(name) + 2


def test_reading_needs_no_llvmlite(tmp_path):
    build_images(tmp_path / "kernels", HERE, texts, "1")
    program = (
        "import sys; sys.modules['llvmlite'] = None\n"
        "from pocketlm.runtime.native import aot, linker, levels\n"
        "linker.load(aot.read_images(sys.argv[1], levels.detect(), '1')['product']).close()"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "kernels")]).returncode == 0


def test_a_file_that_is_not_right_is_refused(tmp_path):
    path, level = tmp_path / "kernels", levels.detect()
    with pytest.raises(FileError, match="No such file"):
        read_images(path, level, "1")
    build_images(path, HERE, texts, "1")
    with pytest.raises(FileError, match="another version"):
        read_images(path, level, "2")
    whole, right = path.read_bytes(), read_images(path, level, "1")
    changed = [whole[:k] + bytes([whole[k] ^ 1]) + whole[k + 1 :] for k in range(0, len(whole), 7)]
    cut = [whole[:k] for k in range(0, len(whole), 11)]
    refused = 0
    for data in changed + cut:
        path.write_bytes(data)
        try:
            assert read_images(path, level, "1") == right  # what is damaged belongs to another level
        except FileError:
            refused += 1
    assert refused > len(whole) / 50


def test_an_unknown_platform_or_folder_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="linux-x86_64, linux-aarch64, windows-x86_64, macos-arm64, macos-x86_64"):
        build_images(tmp_path / "kernels", "amiga-m68k", texts, "1")
    with pytest.raises(FileError, match="No such file"):
        build_images(tmp_path / "no folder" / "kernels", HERE, texts, "1")
