"""tests/arm64/run.py leaves nothing behind that runs or lies about, however it is ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("only Linux has namespaces", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent / "arm64"))
import emulated

# Programs like those that it starts in a root of its own, one from each of two threads: each starts another in a session of its
# own. Whoever is left writes to the pipe after five minutes
PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(emulated.__file__).parent)!r})
import emulated
started = "exec >{{0}}; setsid sh -c 'sleep 300; echo left' & echo started; wait; echo left"

def use(folder):
    (folder / "file").write_text("")
    program = [*emulated.ALONE, started.format(sys.argv[1])]
    emulated.side_by_side(2, [lambda: emulated.PROCESSES.run(*program)] * 2)

emulated.with_folder(use)
"""


@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda ended_by: ended_by.name)
def test_nothing_is_left_of_a_run_that_is_ended(ended_by, tmp_path):
    if subprocess.run([*emulated.ALONE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system does not allow namespaces")
    os.mkfifo(pipe := tmp_path / "pipe")
    (folders := tmp_path / "folders").mkdir()
    command, text = [sys.executable, "-c", PROGRAM, str(pipe)], b""
    with (
        subprocess.Popen(command, env={**os.environ, "TMPDIR": str(folders)}, stderr=subprocess.DEVNULL) as process,
        open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as said,
    ):
        while text.count(b"\n") < 2:
            assert process.poll() is None
            time.sleep(0.01)
            text += said.read() or b""
        process.send_signal(ended_by)
        os.set_blocking(said.fileno(), True)
        text += said.read()  # to its end: there is nobody any more who could write
        assert text == b"started\n" * 2
        assert process.wait() not in (0, 1)
    if ended_by != signal.SIGKILL:
        assert list(folders.iterdir()) == []
