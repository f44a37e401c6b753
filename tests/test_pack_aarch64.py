"""What a Raspberry Pi's friends get, composed here and run under qemu in a bare Debian: it talks and checks itself.

The root is made once by `debootstrap --arch=arm64 --variant=minbase --foreign bookworm ROOT`; POCKETLM_ARM64_ROOT names it.
Programs for the other processor start as if they were this one's, by an entry of the kernel's own that only they see.
"""

import json
import os
import platform
import struct
import subprocess
import zlib

import pytest
from find_qemu import entry, find_qemu
from packing import ask, friend_fixture, model_fixture, web  # noqa: F401

import pocketlm
from pocketlm.runtime.container import program_place

PLATFORM = "linux-aarch64"
ROOT, QEMU = os.environ.get("POCKETLM_ARM64_ROOT"), find_qemu()
_SCRIPT = """
mount -t binfmt_misc none /proc/sys/fs/binfmt_misc && printf %s "$1" > /proc/sys/fs/binfmt_misc/register || exit 77
mount -t tmpfs none "$2/tmp" && mount --rbind /proc "$2/proc" && mkdir "$2/tmp/friend" || exit 77
cp "$3" "$2/tmp/friend/friend" || exit 77
root=$2; shift 3
exec chroot "$root" /tmp/friend/friend "$@"
"""


def command(program, *arguments, network="-n"):
    """What runs the program in the root; "-n": without a network."""
    if QEMU is None:
        pytest.skip("needs a static qemu-aarch64 (Debian package qemu-user-static, from 13 on qemu-user)")
    if ROOT is None:
        pytest.skip("POCKETLM_ARM64_ROOT names no root made as this file says")
    return ["unshare", "-U", "-r", "-m", *network.split(), "sh", "-c", _SCRIPT, "sh", entry(QEMU), ROOT, program, *arguments]


def environment(cpu="cortex-a72"):
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "QEMU_CPU": cpu}


def run(program, *arguments, stdin="", cpu="cortex-a72"):
    result = subprocess.run(
        command(program, *arguments), input=stdin, capture_output=True, text=True, encoding="utf-8", timeout=300,
        env=environment(cpu),
    )  # fmt: skip
    if result.returncode == 77:
        pytest.skip(f"this system lets nobody register programs of another processor: {result.stderr.strip()}")
    return result


def entries(program):
    """(kind, name, content) of everything in PyInstaller's archive."""
    start, length = program_place(program)
    data = program.read_bytes()[start : start + length]
    _, _, table, n, _, _ = struct.unpack_from("!8sIIII64s", data, length - 88)
    at = table
    while at < table + n:
        size, offset, stored, _, compressed, kind = struct.unpack_from("!IIIIBc", data, at)
        content = data[offset : offset + stored]
        yield kind, data[at + 18 : at + size].rstrip(b"\0").decode(), zlib.decompress(content) if compressed else content
        at += size


def test_it_is_at_most_thirteen_megabytes_larger_than_the_model(friend, model):
    assert friend.stat().st_size - model.stat().st_size < 13e6


def test_every_library_is_for_the_processor_and_for_large_pages(friend):
    """Kernels for Apple's and for some servers' processors have pages of 16 and 64 KB."""
    libraries = [(name, content) for kind, name, content in entries(friend) if kind == b"b"]
    assert len(libraries) > 10
    for name, data in [*libraries, ("boot loader", friend.read_bytes())]:
        assert (data[:4], struct.unpack_from("<H", data, 18)[0]) == (b"\x7fELF", 183), name
        at, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
        for i in range(count):
            kind, _, offset, address, *_, alignment = struct.unpack_from("<IIQQQQQQ", data, at + i * size)
            if kind == 1:
                assert (address - offset) % 0x10000 == 0, name
                assert alignment % 0x10000 == 0, name


@pytest.mark.parametrize(("cpu", "level"), [("cortex-a72", "neon"), ("cortex-a76", "dotprod")])
def test_it_checks_itself_in_a_bare_debian(friend, cpu, level):
    assert "whole" in run(friend, "--check", cpu=cpu).stdout
    result = run(friend, "--selftest", cpu=cpu)
    assert (result.returncode, result.stderr) == (0, "")
    verdict = result.stdout.splitlines()[-1]
    assert verdict.startswith("right: ")
    assert f" {level}," in verdict
    assert "numpy" in verdict


def test_it_writes_what_the_installed_package_writes(friend, model):
    result = run(friend, "generate", "-p", "the", "-n", "9", "--threads", "2")
    with pocketlm.load(model) as plain:
        assert result.stdout == "".join(p.text for p in plain.generate("the", max_tokens=9, temperature=0)) + "\n"


def test_it_talks_in_a_bare_debian(friend):
    result = run(friend, "--no-save", "--lines", stdin="hello\nand you?\n")
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) >= 2
    assert platform.machine() == "aarch64" or b"\xb7\x00" in friend.read_bytes()[:20]


def test_it_talks_in_the_browser(friend):
    program = command(friend, "--web", "--no-browser", network="")
    with web(program, XDG_DATA_HOME="/tmp/data", **environment()) as (url, token):
        assert b"<script>" in ask(url + "/")
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
        answer = json.loads(ask(url + "/v1/chat/completions", {"messages": messages}))["choices"][0]["message"]["content"]
        assert answer + "\n" == run(friend, "--no-save", stdin="hello\n").stdout
        saved = {"messages": [messages[1], {"role": "assistant", "content": answer}]}
        name = json.loads(ask(url + "/page/chats", saved, token))["name"]
        assert json.loads(ask(f"{url}/page/chats/{name}", token=token))["messages"][1]["content"] == answer


def test_it_brings_the_licences_of_all_that_is_inside(friend):
    text = run(friend, "--licences").stdout
    for word in ("PYTHON SOFTWARE FOUNDATION LICENSE", "\nnumpy\n", "\nregex\n", "\nlibffi8\n", "GCC Runtime", "\npocketlm\n"):
        assert word in text
