"""What stubs are composed of is fetched once, whole, and only if it is what the tables say."""

import hashlib
import marshal
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pocketlm.build import bytecode, wheels
from pocketlm.build.compose import _compiler
from pocketlm.build.sources import host_platform
from pocketlm.build.wheels import PYTHONS, Pinned, Unreachable, fetch, pinned, version_for
from pocketlm.errors import FileError, PocketlmError
from pocketlm.runtime.native.aot import PLATFORMS

NEEDED = {"numpy", "regex", "markupsafe", "jinja2", "prompt_toolkit", "wcwidth", "starlette", "uvicorn", "h11", "anyio",
          "pyinstaller"}  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "wheels"


def wheel(folder: Path, name: str, text: str = "") -> Pinned:
    """A wheel of nothing, where pip finds it, and its row of the table."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", text)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return Pinned(name, "1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder where pip, as it is configured, finds everything, and nothing else anywhere."""
    folder = tmp_path / "index"
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("this Python has no pip")
    return folder


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_platform_has_one_file_of_everything(platform, python):
    found = pinned(platform, python)
    has_cpython = python in ((3, 11), (3, 13)) or not platform.startswith("linux")  # Debian has two versions of Python
    assert any(file.is_cpython for file in found) == has_cpython
    names = [file.name for file in found]
    assert len(set(names)) == len(names)
    assert set(names) >= NEEDED
    assert all(len(bytes.fromhex(file.sha256)) == 32 for file in found)


@pytest.mark.parametrize("host", PLATFORMS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_python_composes_for_every_platform(platform, host):
    """With its own version where that can be had; else with one that can be had for this system too, to compile for it."""
    for python in PYTHONS:
        version = version_for(platform, python, host)
        if platform.startswith("linux"):
            assert version == (python if python in ((3, 11), (3, 13)) else (3, 11))
            assert any(file.is_cpython for file in pinned(host, version))
        else:
            assert version == python
    if not platform.startswith("linux"):
        with pytest.raises(PocketlmError, match=r"Python 3\.10, 3\.11, 3\.12, 3\.13, 3\.14; this is 3\.9"):
            version_for(platform, (3, 9), host)


def test_the_second_time_works_without_a_network(cache, index, monkeypatch, capsys):
    wanted = [wheel(index, "anna"), wheel(index, "bert")]
    paths = fetch(wanted)
    assert {path.parent for path in paths.values()} == {cache}
    assert capsys.readouterr().err.splitlines() == [f"fetching {i} of 2: {file.file}" for i, file in enumerate(wanted, 1)]
    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "nowhere"))
    assert fetch(wanted) == paths
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in cache.iterdir()) == sorted(file.file for file in wanted)


def test_a_folder_of_the_users_takes_the_network_s_place(cache, index):
    wanted = [wheel(index, "anna")]
    assert fetch(wanted, index) == {"anna": index / wanted[0].file}
    assert not cache.exists()
    with pytest.raises(FileError, match="needed to compose"):
        fetch([wheel(index.parent / "other", "bert")], index)


def test_other_content_under_the_same_name_is_refused(cache, index):
    right = wheel(index, "anna")
    wheel(index, "anna", "print('other')")
    with pytest.raises(PocketlmError, match="could not fetch") as caught:
        fetch([right])
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []
    with pytest.raises(FileError, match="SHA-256 differs"):
        fetch([right], index)
    (cache / right.file).write_bytes(b"put there by somebody")
    with pytest.raises(FileError, match="SHA-256 differs"):
        fetch([right])


def test_what_was_interrupted_goes_on_where_it_was(cache, index, monkeypatch):
    wanted, plain, asked = [wheel(index, "anna"), wheel(index, "bert")], wheels._by_pip, []

    def interrupted(file, to):
        asked.append(file.name)
        plain(file, to)
        if file.name == "bert" and len(asked) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(wheels, "_by_pip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(wanted)
    assert [path.name for path in cache.iterdir()] == [wanted[0].file]
    assert fetch(wanted)["bert"].exists()
    assert asked == ["anna", "bert", "bert"]


def test_a_package_of_debian_comes_from_one_of_its_archives(cache, tmp_path, monkeypatch):
    content = b"!<arch>\n"
    folder = tmp_path / "archive" / "pool"
    folder.mkdir(parents=True)
    (folder / "libz_1_arm64.deb").write_bytes(content)
    monkeypatch.setattr(wheels, "_ARCHIVES", ((tmp_path / "gone").as_uri() + "/", (tmp_path / "archive").as_uri() + "/"))
    wanted = Pinned("libz", "1", "libz_1_arm64.deb", hashlib.sha256(content).hexdigest(), "bookworm/pool")
    assert fetch([wanted])["libz"].read_bytes() == content
    monkeypatch.setattr(wheels, "_ARCHIVES", ((tmp_path / "gone").as_uri() + "/",))
    (cache / wanted.file).unlink()
    with pytest.raises(PocketlmError, match="Debian's archive") as caught:
        fetch([wanted])
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets programs load Debian's libraries")
def test_the_version_of_debians_python_compiles_for_itself(request, tmp_path, monkeypatch):
    monkeypatch.setenv("POCKETLM_CACHE", str(request.config.cache.mkdir("pocketlm-stub")))
    library = "libpython3.11.so.1.0"
    try:
        fetched = fetch([file for file in pinned(host_platform(), (3, 11)) if file.is_cpython])
    except Unreachable as error:
        pytest.skip(f"there is nothing to compose a stub of: {error}")
    compiler, modules = _compiler(fetched, tmp_path, library), tmp_path / "compiler/usr/lib/python3.11"
    data = compiler.read_bytes()  # with a name of its own: this Python may be a library of that name itself
    compiler.write_bytes(data.replace(library.encode(), library.replace("3.11", "3.xx").encode()))
    (tmp_path / "m.py").write_text('def f(x):\n    """Doc."""\n    assert x\n    return [y for y in {"a", "b"} if y > x]\n')
    codes, magic = bytecode.compile_all({"m": tmp_path / "m.py"}, compiler, modules)
    assert magic == (3495).to_bytes(2, "little") + b"\r\n"  # of Python 3.11 (importlib/_bootstrap_external.py)
    assert codes["m"][0] & 0x7F == ord("c")  # marshalled code
    if sys.version_info[:2] == (3, 11):
        own, number = bytecode.compile_all({"m": tmp_path / "m.py"})
        assert (marshal.loads(codes["m"]), magic) == (marshal.loads(own["m"]), number)
