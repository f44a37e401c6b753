"""Whatever happens to the cache folder, compiled code is there: from the folder if it can be trusted, else made again."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pocketlm.errors import PocketlmError
from pocketlm.runtime.native import code_cache
from pocketlm.runtime.native.code_cache import KEPT, cache_folder, cached, kept_folder

CODE = bytes(range(256)) * 20
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="owners and modes of POSIX")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An own cache folder for each test."""
    path = tmp_path / "cache"
    monkeypatch.setenv("POCKETLM_CACHE", str(path))
    return path


class Maker:
    """Makes CODE, and counts how often."""

    def __init__(self):
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return CODE


def times_made(rounds: int, key: str = "key") -> int:
    """How often code was made when it was asked for so many times."""
    make = Maker()
    for _ in range(rounds):
        assert cached(key, make) == CODE
    return make.calls


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_code_is_made_once_for_each_key(folder):
    assert times_made(3, "one") == 1
    assert times_made(3, "two") == 1
    assert times_made(1, "one") == 0
    assert len(list(folder.iterdir())) == 2


def test_who_only_looks_leaves_no_folder(folder):
    assert code_cache.kept("a") is None
    assert not folder.exists()
    code_cache.keep("a", b"code")
    assert code_cache.kept("a") == b"code"


@posix_only
def test_folder_and_files_are_for_their_owner_only(folder):
    previous = os.umask(0)
    try:
        times_made(1)
    finally:
        os.umask(previous)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert only_file(folder).stat().st_mode & 0o777 == 0o600


def test_a_damaged_file_is_replaced(folder):
    times_made(1)
    whole = only_file(folder).read_bytes()
    changed = whole[:100] + b"!" + whole[101:]
    for damaged in (b"", whole[:31], whole[:32], whole[:-1], whole + b"\0", changed, bytes(len(whole))):
        only_file(folder).write_bytes(damaged)
        assert times_made(2) == 1
        assert only_file(folder).read_bytes() == whole


def test_a_file_under_another_keys_name_is_not_taken_for_it(folder):
    times_made(1, "one")
    one = only_file(folder)
    times_made(1, "two")
    two = next(path for path in folder.iterdir() if path != one)
    two.write_bytes(one.read_bytes())
    assert times_made(1, "two") == 1


@posix_only
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_may_write_is_not_used(folder, mode):
    times_made(1)
    folder.chmod(mode)
    assert times_made(2) == 2


@posix_only
@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_may_write_is_not_used(folder, mode):
    times_made(1)
    only_file(folder).chmod(mode)
    assert times_made(2) == 1  # replaced by one of ours
    assert only_file(folder).stat().st_mode & 0o777 == 0o600


@posix_only
@pytest.mark.parametrize("whose", ["folder", "file"])
def test_what_belongs_to_another_user_is_not_used(folder, monkeypatch, whose):
    times_made(1)
    real = code_cache._is_ours
    kind = {"folder": code_cache.stat.S_ISDIR, "file": code_cache.stat.S_ISREG}[whose]

    def seen_by_a_stranger(status, is_kind):
        changed = list(status)
        if is_kind is kind:
            changed[4] += 1  # st_uid
        return real(os.stat_result(changed), is_kind)

    monkeypatch.setattr(code_cache, "_is_ours", seen_by_a_stranger)
    assert times_made(2) == 2


@pytest.mark.parametrize(
    ("step", "number"), [("open", errno.ENOSPC), ("write", errno.ENOSPC), ("replace", errno.EACCES), ("open", errno.EROFS)]
)
def test_a_full_or_read_only_disk_is_no_error_and_leaves_nothing(folder, monkeypatch, step, number):
    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    class Full:
        def __init__(self, descriptor, _):
            self.descriptor = descriptor

        def __enter__(self):
            return self

        def __exit__(self, *_):
            os.close(self.descriptor)

        write = full

    if step == "write":
        monkeypatch.setattr(code_cache, "open", Full, raising=False)
    else:
        monkeypatch.setattr(code_cache.os, step, full)
    assert times_made(2) == 2
    monkeypatch.undo()
    assert list(folder.iterdir()) == []


def test_a_file_where_the_folder_belongs_is_no_error(folder, monkeypatch):
    folder.write_bytes(b"")
    assert times_made(2) == 2
    monkeypatch.setenv("POCKETLM_CACHE", str(folder / "deeper"))
    assert times_made(2) == 2


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="modes do not bind Windows or root")
@pytest.mark.parametrize("what", ["read-only folder", "read-only parent", "unreadable folder"])
def test_a_folder_that_cannot_be_used_is_no_error(folder, what):
    if what == "read-only parent":
        folder.parent.chmod(0o500)
    else:
        folder.mkdir(mode=0o500 if what == "read-only folder" else 0o000)
    try:
        assert times_made(2) == 2
    finally:
        folder.parent.chmod(0o700)
        if folder.is_dir():
            folder.chmod(0o700)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the XDG folders of other systems")
def test_the_folder_follows_the_users_environment(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("POCKETLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/somewhere")
    assert cache_folder() == Path("/var/somewhere/pocketlm")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/pocketlm")


def test_a_user_without_a_home_is_no_error(monkeypatch):
    for name in ("POCKETLM_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(code_cache.os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(code_cache.Path, "mkdir", lambda *_, **__: pytest.fail("made a folder"))
    assert cache_folder() is None
    assert times_made(2) == 2


def test_old_entries_go_and_those_in_use_stay(folder):
    for k in range(KEPT):
        times_made(1, f"key {k}")
    for age, path in enumerate(sorted(folder.iterdir())):
        os.utime(path, (1000 + age, 1000 + age))
    oldest = min(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    other = folder / "notes.txt"
    other.write_text("not ours")
    used = next(k for k in range(KEPT) if code_cache.hashlib.sha256(f"key {k}".encode()).hexdigest() == oldest.stem)
    assert times_made(1, f"key {used}") == 0  # the oldest becomes the newest
    for k in range(3):
        times_made(1, f"another {k}")
    assert len(list(folder.glob("*.code"))) == KEPT
    assert times_made(1, f"key {used}") == 0
    assert other.exists()


def test_an_entry_that_cannot_be_removed_keeps_no_other(folder):
    times_made(1)
    for age in range(KEPT + 10):
        path = folder / f"{age}.code"
        path.mkdir() if age == 8 else path.touch()
        os.utime(path, (1000 + age, 1000 + age))
    times_made(1, "another")
    assert [path.name for path in folder.glob("?.code")] == ["8.code"]


def test_errors_of_making_are_the_callers(folder):
    def fail() -> bytes:
        raise KeyError("defect")

    with pytest.raises(KeyError):
        cached("key", fail)
    assert not folder.exists()


PROCESS = """
import sys
from pocketlm.runtime.native.code_cache import cached
for k in range(200):
    content = bytes([k % 7]) * 50000
    assert cached(f"key {k % 7}", lambda: content) == content
    if k % 5 == 0:
        from pathlib import Path; import os
        for path in Path(os.environ["POCKETLM_CACHE"]).glob("*.code"):
            try: path.unlink()
            except OSError: pass
"""


def test_processes_at_once_see_whole_files_only(folder):
    pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", PROCESS], **pipes) for _ in range(3)]
    assert [(process.communicate(timeout=300)[1], process.returncode) for process in processes] == 3 * [("", 0)]
    assert list(folder.glob("*.tmp")) == []


@posix_only
def test_a_folder_beside_the_code_leaves_that_usable_and_is_nobody_elses(folder):
    before = os.umask(0o002)
    try:
        assert kept_folder("stubs") == folder / "stubs"
    finally:
        os.umask(before)
    assert times_made(2) == 1
    folder.chmod(0o777)
    with pytest.raises(PocketlmError, match="others may write to it: no place for stubs"):
        kept_folder("stubs")
