"""The systemd unit that `pocketlm serve --install-service` prints: systemd reads it, and it says what was asked for."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import tiny_chat

from pocketlm.cli import main
from pocketlm.serve import service
from pocketlm.serve.command import _policy

of_systemd = pytest.mark.skipif(sys.platform != "linux", reason="systemd is Linux's")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_chat(tmp_path_factory.mktemp("a model 50%"))


def printed(capsys, monkeypatch, *words):
    """(lines of the unit by their names, all of it, what is said beside it)."""
    monkeypatch.setattr(sys, "argv", ["pocketlm", "serve", *words])
    assert main(["serve", *words]) == 0
    out, err = capsys.readouterr()
    lines: dict[str, list[str]] = {}
    for line in out.splitlines():
        if line and line[0] not in "#[":
            name, sign, value = line.partition("=")
            assert (name.isalpha(), sign) == (True, "="), line
            lines.setdefault(name, []).append(value)
    return lines, out, err


@of_systemd
def test_the_unit_says_what_was_asked_for(path, capsys, monkeypatch):
    words = (str(path), "--port", "80", "--title", 'My "$HOME" 50%\n[Service]', "--api-key", "secret", "--install-service")
    lines, text, said = printed(capsys, monkeypatch, *words)
    [command] = lines["ExecStart"]
    quoted = str(path.resolve()).replace("%", "%%")
    title = r'"My \"$$HOME\" 50%% [Service]"'
    assert command == f'{sys.executable} -m pocketlm serve "{quoted}" --port 80 --title {title}'
    assert "secret" not in text + said
    assert lines["EnvironmentFile"] == ["/etc/pocketlm.env"]
    assert "POCKETLM_API_KEY=…" in said
    assert lines["AmbientCapabilities"] == ["CAP_NET_BIND_SERVICE"]
    assert lines["IPAddressDeny"] == ["any"], "it listens on this computer alone"
    assert text.count("[Service]") == 2, "a title makes no section"


def test_the_address_of_the_page_can_stay(path, monkeypatch, capsys):
    arguments = argparse.Namespace(host="127.0.0.1", api_key="", open=False, cors=[])
    assert _policy(arguments).token != _policy(arguments).token
    monkeypatch.setenv("POCKETLM_PAGE_TOKEN", "a-token_of-16-letters")
    assert _policy(arguments).token == "a-token_of-16-letters"
    for wrong in ("short", "with spaces in it all", "ä" * 20):
        monkeypatch.setenv("POCKETLM_PAGE_TOKEN", wrong)
        assert main(["serve", str(path)]) == 2
        assert "POCKETLM_PAGE_TOKEN: expected" in capsys.readouterr().err


@of_systemd
def test_the_memory_is_that_of_the_slots(path, capsys, monkeypatch):
    few, many = (int(printed(capsys, monkeypatch, str(path), "--slots", n, "--install-service")[0]["MemoryMax"][0][:-1])
                 for n in ("1", "200"))  # fmt: skip
    assert few > service.BESIDE // service.MIB
    assert many > few


@of_systemd
def test_what_lies_in_a_home_is_shown_to_the_service():
    hidden = service._hidden(
        [Path("/home/pi/.venv"), Path("/home/pi/.venv/lib/x"), Path("/usr"), Path("/home/pi/.venv2"), Path("/tmp/m.gguf")]
    )
    assert hidden == [Path("/home/pi/.venv"), Path("/home/pi/.venv2"), Path("/tmp/m.gguf")]
    assert service._path(Path('/home/a b/"%')) == '"/home/a b/\\"%%"'


@of_systemd
def test_others_may_ask_only_with_a_key(path, capsys):
    assert main(["serve", str(path), "--host", "0.0.0.0", "--install-service"]) == 2
    assert "give a key" in capsys.readouterr().err


def test_other_systems_get_no_unit_with_their_own_paths(path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert main(["serve", str(path), "--install-service"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "Linux" in err


@of_systemd
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize(
    "words",
    [(), ("--host", "0.0.0.0", "--api-key", "k", "--title", 'My "$HOME" 50% \\ x'), ("--port", "80", "--browser")],
    ids=["alone", "network", "port"],
)
def test_systemd_reads_the_unit_and_finds_little_to_say_against_it(path, capsys, monkeypatch, tmp_path, words):
    _, text, _ = printed(capsys, monkeypatch, str(path), *words, "--install-service")
    unit = tmp_path / "pocketlm.service"
    unit.write_text(text, encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)], capture_output=True, text=True
    )
    assert rated.returncode == 0, rated.stdout.splitlines()[-1]
