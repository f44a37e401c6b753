"""The page is opened in a browser, and the server answers whatever that does."""

import json
import os
import subprocess
import sys

import pytest
from packing import ask, web
from serving import tiny_chat

pytestmark = pytest.mark.skipif(os.name == "nt", reason="these browsers are scripts of a shell")
OPEN = "from pocketlm.serve.command import _open_page; _open_page('http://127.0.0.1:1/#x')"


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_server_answers_while_the_browser_runs(tmp_path):
    model, opened, held = tiny_chat(tmp_path), tmp_path / "opened", tmp_path / "held"
    for pipe in (opened, held):
        os.mkfifo(pipe)
    browser = script(tmp_path / "browser", f'echo "$1" >{opened}; read line <{held}')
    command = [sys.executable, "-m", "pocketlm", "serve", model, "--port", "0", "--browser"]
    with web(command, **{**os.environ, "BROWSER": browser}) as (url, _):
        assert opened.read_text().startswith(url + "/#")
        assert json.loads(ask(url + "/v1/models"))["data"]
        held.write_text("\n")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS always has a browser with windows")
@pytest.mark.parametrize(("variable", "opens"), [("PATH", False), ("BROWSER", True)])
def test_a_browser_for_the_terminal_is_not_opened_in_that_of_the_server(tmp_path, variable, opens):
    name = script(tmp_path / ("mine" if opens else "lynx"), f'echo "$1" >{tmp_path}/opened')
    environment = {"PATH": str(tmp_path), "TERM": "xterm", **({"BROWSER": name} if opens else {})}
    subprocess.run([sys.executable, "-c", OPEN], env=environment, check=True)
    assert (tmp_path / "opened").exists() is opens
