"""The executable that a friend opens: it talks wherever it is put, alone, without a network, and says what is wrong."""

import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.error
from pathlib import Path

import pytest
from packing import TEMPLATE, ask, friend_fixture, model_fixture, web  # noqa: F401
from tiny_models import write_model

import pocketlm
from pocketlm.build import contents
from pocketlm.build.pack import open_stub, pack
from pocketlm.build.persona import Persona
from pocketlm.build.selftest import reference
from pocketlm.runtime import container
from pocketlm.runtime.gguf_reader import open_gguf

BARE = {"PATH": os.environ.get("PATH", ""), "TMPDIR": os.environ.get("TMPDIR", "/tmp")}

try:
    from PyInstaller.archive.readers import CArchiveReader
except ImportError:  # then there is no stub, and real_stub skips
    CArchiveReader = None

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="these tests drive a POSIX system")


def run(program, *arguments, stdin="", **environment):
    return subprocess.run(
        [str(program), *arguments], input=stdin, capture_output=True, text=True, encoding="utf-8", timeout=120,
        env={**BARE, **environment},
    )  # fmt: skip


def test_it_says_how_it_is_used(friend):
    result = run(friend, "--help")
    assert result.returncode == 0
    for word in ("generate", "--model", "--check", "--selftest", "--temp", "no network"):
        assert word in result.stdout


def test_it_writes_what_the_installed_package_writes(friend, model):
    result = run(friend, "generate", "-p", "the", "-n", "9")
    with pocketlm.load(model) as plain:
        assert result.stdout == "".join(p.text for p in plain.generate("the", max_tokens=9, temperature=0)) + "\n"


@pytest.mark.parametrize("name", ["a folder with spaces", "Ёлка и друзья", "ağaç ığdır"])
def test_it_talks_from_any_folder_even_a_read_only_one(friend, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(friend, folder / f"{name} friend")
    folder.chmod(0o555)
    result = run(folder / f"{name} friend", stdin="hello\n")
    folder.chmod(0o755)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip()
    assert [path.name for path in folder.iterdir()] == [f"{name} friend"]


def test_answers_do_not_depend_on_the_instruction_set(friend):
    lowest = "sse4" if platform.machine() in ("x86_64", "AMD64") else "neon"
    best, low = (run(friend, "generate", "-p", "the", "-n", "9", POCKETLM_ISA=isa) for isa in ("", lowest))
    assert best.returncode == low.returncode == 0
    assert best.stdout == low.stdout


def converse(child, n_turns, end):
    """Questions that are answered, and an end in order; `end` is pexpect's mark of it."""
    for _ in range(n_turns):
        child.expect(">")
        child.send("hello\r")
        child.expect("tokens/s")
    child.expect(">")
    child.send("/quit\r")
    child.expect(end)
    child.close()
    assert child.exitstatus == 0


def test_a_conversation_at_a_terminal(friend, tmp_path):
    pexpect = pytest.importorskip("pexpect", reason="pexpect drives the pseudo-terminal")
    for term in ("dumb", "xterm"):
        env = {**BARE, "TERM": term, "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_DATA_HOME": str(tmp_path), "LANG": "C"}
        child = pexpect.spawn(str(friend), env=env, encoding="utf-8", dimensions=(24, 80), timeout=60)
        child.expect("Ada Ağaç Ёлка")
        child.expect("To leave: /quit")
        converse(child, 1, pexpect.EOF)


def test_it_talks_in_the_browser(friend, tmp_path):
    """`--web`: the page, programs, conversations, all without TLS and whatever else is left out."""
    with web([friend, "--web", "--no-browser"], XDG_DATA_HOME=str(tmp_path), **BARE) as (url, token):
        assert b"<script>" in ask(url + "/")
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
        answer = json.loads(ask(url + "/v1/chat/completions", {"messages": messages}))["choices"][0]["message"]["content"]
        assert answer + "\n" == run(friend, "chat", stdin="hello\n").stdout
        assert json.loads(ask(url + "/page/facts", token=token))["title"] == "Ada Ağaç Ёлка"
        saved = {"messages": [messages[1], {"role": "assistant", "content": answer}]}
        name = json.loads(ask(url + "/page/chats", saved, token))["name"]
        assert (tmp_path / "pocketlm" / "chats" / f"{name}.json").exists()
        streamed = ask(url + "/v1/chat/completions", {"messages": messages, "stream": True})
        assert streamed.endswith(b"data: [DONE]\n\n")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask(url + "/nothing")


def test_packed_with_a_page_it_opens_that(model, friend, tmp_path):
    other = pack(model, open_stub(friend), tmp_path / "other", Persona(ui="web"))
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}.new && mv {opened}.new {opened}\n')
    browser.chmod(0o755)
    with web([other, "--threads", "1", "--kv=q8"], BROWSER=str(browser), XDG_DATA_HOME=str(tmp_path), **BARE) as (url, token):
        deadline = time.monotonic() + 30
        while not opened.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        address, _, code = opened.read_text().strip().partition("/#")
        assert address == url
        assert code != token, "others may see what a browser was started with"
        assert json.loads(ask(url + "/page/enter", {"code": code})) == {"token": token}
    answer = run(other, "hello", "--threads", "1", "--max-tokens=3", "--temp=0").stdout
    assert run(other, "--lines", "--max-tokens=3", "--temp=0", stdin="hello\n").stdout == answer != ""


def test_another_model_can_be_talked_to(friend, tmp_path):
    other = write_model(tmp_path / "other.gguf", n_layer=1, seed=5)
    result = run(friend, "generate", "--model", str(other), "-p", "the", "-n", "9", "--temp", "0")
    with pocketlm.load(other) as plain:
        assert result.stdout == "".join(p.text for p in plain.generate("the", max_tokens=9, temperature=0)) + "\n"


def test_it_talks_on_when_another_file_has_taken_its_name(friend, tmp_path):
    """An update, or a clean-up: what was not needed so far (here: for a mistyped command) is still found."""
    program, pipes = shutil.copy(friend, tmp_path / "friend"), dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([program, "--lines"], **pipes, bufsize=1, text=True, env=BARE) as child:
        child.stdin.write("/max_tokens 5\nHello\n")
        assert child.stdout.readline()
        os.replace(shutil.copy(sys.executable, tmp_path / "other"), program)
        notes = child.communicate("/hepl\n/backend numpy\n", timeout=60)[1]
    assert re.search("did you mean /help.*backend: numpy", notes, re.DOTALL), notes


def test_several_start_at_once(friend):
    command = [friend, "generate", "-p", "the", "-n", "5"]
    together = [subprocess.Popen(command, stdout=subprocess.PIPE, env=BARE) for _ in range(4)]
    assert len({process.communicate()[0] for process in together}) == 1
    assert {process.returncode for process in together} == {0}


def test_it_checks_itself(friend):
    assert "whole" in run(friend, "--check").stdout
    result = run(friend, "--selftest")
    assert (result.returncode, result.stderr) == (0, "")
    verdict = result.stdout.splitlines()[-1]
    assert verdict.startswith("right: tokenizer, template, ")
    assert verdict.endswith(", numpy, answer")


def test_the_selftest_notices_wrong_results(model, friend, tmp_path):
    other = write_model(tmp_path / "other.gguf", format="Q4_0", seed=9, metadata={"tokenizer.chat_template": TEMPLATE})
    with open_gguf(other) as wrong:
        stored = reference(wrong, ["Hello"])
    result = run(pack(model, open_stub(friend), tmp_path / "wrong", Persona(), stored), "--selftest")
    assert result.returncode == 1
    verdict = result.stdout.splitlines()[-1]
    assert verdict.startswith("WRONG: ")
    assert "numpy" in verdict
    assert not {"tokenizer", "template", "answer"} & {*verdict.removeprefix("WRONG: ").split(", ")}


def test_a_damaged_one_says_so_in_one_line_or_talks_as_before(friend, tmp_path):
    """POCKETLM_THOROUGH=1: 200 changed bits and 50 cuts, which takes minutes."""
    n_flips, n_cuts = (200, 50) if os.environ.get("POCKETLM_THOROUGH") else (6, 4)
    whole, sections, noise = friend.read_bytes(), container.find(friend).sections, random.Random(3)
    start, header = sections["program"].offset - container.SIZE, sections["header"]
    ranges = ((start, start + container.SIZE), (header.offset, header.end))
    answer, broken = run(friend, stdin="hello\n").stdout, tmp_path / "broken"
    damaged = []
    for i in range(n_flips):
        place = noise.randrange(*ranges[i % 2])
        damaged.append(lambda place=place: whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
    lengths = [noise.randrange(20_000, len(whole)) for _ in range(n_cuts)]
    damaged += [lambda length=length: whole[:length] for length in lengths]
    for make in damaged:
        broken.write_bytes(make())
        broken.chmod(0o755)
        result = run(broken, stdin="hello\n")
        if result.returncode == 0:
            assert result.stdout == answer
        else:
            assert (result.returncode > 0, result.stdout, result.stderr.count("\n")) == (True, "", 1)


def test_it_opens_no_network_socket(friend, tmp_path):
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    command = ["strace", "-f", "-e", "trace=%network", "-o", "/dev/stderr", str(friend)]
    home = {**BARE, "HOME": str(tmp_path)}  # without one, the C library asks a name service for the user's
    trace = subprocess.run(command, input="hello\n", capture_output=True, text=True, timeout=120, env=home)
    if trace.returncode and "ptrace" in trace.stderr:
        pytest.skip("this system does not let programs be traced")
    assert trace.stdout.strip()
    calls = [line for line in trace.stderr.splitlines() if "(" in line]
    assert not [line for line in calls if "socketpair(AF_UNIX" not in line]


WRONG = {  # what is asked of it, and how it ends
    "a flag that there is not": (["--no-such-flag"], 2),
    "a number that is none": (["--temp", "warm"], 2),
    "a number that makes no sense": (["generate", "-p", "x", "--temp", "-1"], 2),
    "a flag without its value": (["generate", "-p"], 2),
    "no such model": (["--model", "nowhere.gguf"], 1),
    "too long a context": (["generate", "-p", "x", "--ctx", "0"], 2),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_is_one_line_under_the_programs_own_name(friend, tmp_path, words):
    """Nobody who opens it knows what pocketlm is, or a MODEL that the command line of another program takes."""
    own = tmp_path / "my little friend"
    shutil.copy(friend, own)
    arguments, status = WRONG[words]
    for program in (friend, own):
        result = run(program, *arguments, stdin="hello\n")
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (status, "", 1)
        assert result.stderr.startswith(f"{program.name}: ")
        assert "pocketlm" not in result.stderr.replace(str(friend), "").replace(str(tmp_path), "")
        assert "MODEL" not in result.stderr


def test_it_speaks_under_its_own_name_and_title(friend, tmp_path):
    assert run(friend, "--version").stdout.startswith("friend, made with pocketlm ")
    assert "friend: /nothing is no command" in run(friend, "--lines", "--no-save", stdin="/nothing\n").stderr
    own = tmp_path / "my little friend"
    shutil.copy(friend, own)
    assert run(own, "--version").stdout.startswith("my little friend, ")
    assert run(own, "--check").stdout.startswith("my little friend: whole")
    assert "pocketlm" not in run(own, "--help").stdout


@pytest.mark.parametrize("part", ["a module of its own", "a module of NumPy", "a library", "the model's keys"])
def test_a_damaged_part_is_told_in_one_line_or_by_the_boot_loader(friend, tmp_path, part):
    """Whatever it is that cannot be read: no traceback, and the word that FRIEND.md explains."""
    packed, broken = container.find(friend), tmp_path / "broken"
    data, start = bytearray(friend.read_bytes()), packed.sections["program"].offset
    archive = CArchiveReader(str(friend))
    modules = archive.open_embedded_archive("PYZ.pyz").toc
    inside = start + archive.toc["PYZ.pyz"][0]
    place = {
        "a module of its own": inside + modules["pocketlm.chat.repl"][1] + 300,
        "a module of NumPy": inside + modules["numpy._core.numeric"][1] + 300,
        "a library": start + next(row[0] for name, row in archive.toc.items() if "_multiarray_umath" in name) + 300,
        "the model's keys": packed.sections["header"].offset + 300,
    }[part]
    data[place] ^= 4
    broken.write_bytes(data)
    broken.chmod(0o755)
    result = run(broken, stdin="hello\n")
    assert result.returncode != 0
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    if part == "a library":  # before any code of ours
        assert "Failed to extract" in result.stderr
        assert "return code -3" in result.stderr
    else:
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("broken: ")
        assert "was damaged or cut short on its way" in result.stderr
    said = (Path(pocketlm.__file__).parent / "build/FRIEND.md").read_text(encoding="utf-8")
    assert "Failed to extract … return code -3" in said
    assert "was damaged or cut short on its way" in said


def test_what_it_holds_is_what_the_table_says(friend):
    """So that the guard of the other tests refuses what really is not there, and no more is sent than is needed."""
    archive = CArchiveReader(str(friend))
    modules = {*archive.open_embedded_archive("PYZ.pyz").toc}
    assert {name for name in modules if contents.is_excluded(name)} == set()
    older = {"_bootsubprocess", "_compression"}  # Debian's Python, which goes in where this one is too large, has these
    standard = {*sys.stdlib_module_names, sysconfig._get_sysconfigdata_name(), *older}
    tops = {name.partition(".")[0] for name in modules} - standard
    newer = {"exceptiongroup": (3, 11), "typing_extensions": (3, 13)}  # versions of Python that do without
    libraries = (re.match(r"libpython(3)\.(\d+)\.", name) for name in archive.toc)
    python = next((tuple(map(int, found.groups())) for found in libraries if found), sys.version_info[:2])
    expected = {name for name in contents.FROZEN if name not in newer or python < newer[name]}
    assert tops == {*expected, "pocketlm"}
    root = Path(pocketlm.__file__).parent
    ours = {path.relative_to(root).as_posix() for package in contents.PACKAGES for path in (root / package).glob("*.py")}
    held = {name.partition(".")[2].replace(".", "/") for name in modules if name.partition(".")[0] == "pocketlm"}
    expected = {path.removesuffix(".py").removesuffix("__init__").rstrip("/") for path in ours if contents.is_held(path)}
    assert held == expected


def test_it_talks_in_a_bare_root(friend, tmp_path):
    """The C library, zlib (which dpkg needs) and nothing else, an unprivileged user, a read-only folder, no network."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("a root of its own needs Linux, unshare and an administrator")
    root, loader = tmp_path / "root", Path("/lib64/ld-linux-x86-64.so.2")
    names = ("c.so.6", "m.so.6", "dl.so.2", "pthread.so.0", "rt.so.1", "util.so.1", "z.so.1")
    libraries = [Path("/lib/x86_64-linux-gnu", f"lib{name}") for name in names]  # of Debian's required packages
    if not all(path.exists() for path in (loader, *libraries)):
        pytest.skip("the C library is not where Debian has it")
    for path in (loader, *libraries):
        copy = root / path.relative_to("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path.resolve(), copy)
    for name in ("proc", "dev", "tmp", "friend"):
        (root / name).mkdir()
    (root / "tmp").chmod(0o1777)
    shutil.copy(friend, root / "friend")
    (root / "friend").chmod(0o555)
    for folder in (root, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    script = f"mount -t proc proc {root}/proc && exec chroot --userspec=65534:65534 {root} /friend/friend --no-save"
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "sh", "-c", script]
    result = subprocess.run(
        command, input="hello\n", capture_output=True, text=True, timeout=120, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    )
    if "Operation not permitted" in result.stderr:
        pytest.skip("this system does not allow namespaces")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip()


def in_own_mounts(script, *arguments, **environment):
    """Run a shell script as an administrator of its own mounts; skips where that is not possible."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("mounts of its own need Linux, unshare and an administrator")
    command = ["unshare", "--mount", "sh", "-c", f"mount --make-rprivate / && {script}", "sh", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**BARE, "TMPDIR": "/tmp", **environment})
    if "permitted" in result.stderr or "denied" in result.stderr:
        pytest.skip("this system does not allow mounts")
    return result


@pytest.mark.parametrize(
    ("options", "message"),
    [("noexec,size=100m", "failed to map segment from shared object"), ("size=5m", "return code -1")],
    ids=["noexec", "full"],
)
def test_a_folder_for_temporary_files_that_cannot_be_used(friend, tmp_path, options, message):
    """The boot loader ends with a message that FRIEND.md explains, and another folder helps."""
    assert message in (Path(pocketlm.__file__).parent / "build/FRIEND.md").read_text(encoding="utf-8")
    copy = tmp_path / "friend"
    if copy.is_relative_to("/tmp"):  # which is about to be covered
        copy = Path("/var/tmp", f"pocketlm-test-{os.getpid()}")
    shutil.copy(friend, copy)
    try:
        script = f'mount -t tmpfs -o {options} none /tmp && exec "$1" generate -p the -n 3'
        result = in_own_mounts(script, copy)
        assert result.returncode != 0
        assert result.stdout == ""
        assert message in result.stderr
        assert in_own_mounts(script, copy, TMPDIR="/var/tmp").returncode == 0
        read_only = in_own_mounts('mount -t tmpfs -o ro none /tmp && exec "$1" generate -p the -n 3', copy)
        assert read_only.returncode == 0  # the boot loader looks for another one itself
    finally:
        copy.unlink()


def test_a_conversation_in_a_bare_debian(friend):
    """An unprivileged user, a read-only folder, no network, a pseudo-terminal; no Python, no packages."""
    pexpect = pytest.importorskip("pexpect", reason="pexpect drives the pseudo-terminal")
    root = os.environ.get("POCKETLM_DEBIAN_ROOT")
    if root is None:
        pytest.skip("POCKETLM_DEBIAN_ROOT names no root made by debootstrap --variant=minbase bookworm ROOT")
    in_own_mounts("true")
    script = (
        "mount --make-rprivate / && mount -t tmpfs none $1/mnt && cp $2 $1/mnt/friend && mount -o remount,ro $1/mnt && "
        "mount -t proc proc $1/proc && mount -t tmpfs -o mode=1777 none $1/tmp && "
        "exec chroot --userspec=65534:65534 $1 /mnt/friend"
    )
    command = ["--net", "--mount", "--pid", "--fork", "sh", "-c", script, "sh", root, str(friend)]
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = pexpect.spawn("unshare", command, env=env, encoding="utf-8", dimensions=(24, 80), timeout=60)
    converse(child, 2, pexpect.EOF)
