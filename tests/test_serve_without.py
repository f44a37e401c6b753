"""The server needs nothing that a packed program leaves out: it runs in a process where all of that cannot be imported."""

import json
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from serving import tiny_chat

from pocketlm.build.contents import STOOD_IN, is_excluded
from pocketlm.serve.left_out import LEFT_OUT

BARE = """
import sys
from pocketlm.build.contents import FROZEN, is_excluded

class Nothing:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if is_excluded(name) or top not in {*FROZEN, *sys.stdlib_module_names, "pocketlm", "llvmlite"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import os, pathlib
for name in [name for name in sys.modules if is_excluded(name)]:
    del sys.modules[name]
sys.meta_path.insert(0, Nothing())
import inspect

def no_source(of):
    raise OSError("there is no source in a packed program")

inspect.getsource = no_source
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if is_excluded(name) else found(name, package)
from pocketlm.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_it_runs_without_what_a_packed_program_leaves_out(tmp_path):
    path = tiny_chat(tmp_path)
    command = [sys.executable, "-c", BARE, "serve", str(path), "--port", "0", "--backend", "numpy", "--slots", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        said = process.stderr.readline()
        try:
            assert said.startswith("page "), said + process.stderr.read()
            url = said.split()[1].partition("/#")[0]
            body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}).encode()
            request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as reply:
                assert json.load(reply)["usage"]["completion_tokens"] == 3
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{url}/nothing", timeout=60)
        finally:
            process.terminate()


def test_a_file_of_prompts_is_answered_without_it_too(tmp_path):
    path, prompts, answers = tiny_chat(tmp_path), tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "the", "max_tokens": 3}\n')
    command = ["generate", path, "--backend", "numpy", "--input", prompts, "--output", answers]
    subprocess.run([sys.executable, "-c", BARE, *map(str, command)], check=True, stderr=subprocess.PIPE)
    assert json.loads(answers.read_text())["usage"]["completion_tokens"] == 3


def test_something_stands_in_for_all_that_is_left_out_and_imported():
    assert set(LEFT_OUT) == set(STOOD_IN)
    assert all(is_excluded(part) for part, _ in LEFT_OUT.values())


def test_who_wants_all_of_uvicorn_gets_it_afterwards():
    code = "import pocketlm.serve.server, uvicorn, ssl; assert uvicorn.run and ssl.SSLContext and uvicorn.main"
    subprocess.run([sys.executable, "-c", code], check=True)
