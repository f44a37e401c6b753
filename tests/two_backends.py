"""A tiny model on both backends, for the tests of sessions: `path` and `model` are fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import write_model

import pocketlm
from pocketlm.model import Model

OPTIONS = {"max_tokens": 25, "ignore_eos": True}


@pytest.fixture(name="path", scope="module")
def path_fixture(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("sessions") / "tiny.gguf", n_ctx=512, n_kv_head=2, head_dim=24)


@pytest.fixture(name="model", params=["numpy", "native"])
def model_fixture(request, path) -> Iterator[Model]:
    with pocketlm.load(path, backend=request.param, threads=2) as model:
        yield model


def ids(pieces) -> list[int]:
    return [piece.id for piece in pieces]
