"""How many slots a server has where memory is short."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import write_model

import pocketlm
from pocketlm.cli import main
from pocketlm.runtime import memory
from pocketlm.serve import asking
from pocketlm.serve.server import Server


@pytest.mark.parametrize(("room", "asked", "made"), [(3.5, 8, 3), (3.5, 2, 2), (1.5, 8, 1), (0.5, 8, 1)])
def test_there_are_as_many_slots_as_there_is_memory_for_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: float, asked: int, made: int
) -> None:
    """The last: the cache of one was promised when the model was opened."""
    write_model(tmp_path / "model.gguf", n_ctx=256)  # caches have their rows in blocks of 256
    with pocketlm.load(tmp_path / "model.gguf", threads=1) as model:
        free = int(room * model.session_bytes(model.n_ctx))
        monkeypatch.setattr(memory, "available_bytes", lambda: free)
        sessions = asking.sessions(model, asked)
        assert len(sessions) == len(set(sessions)) == made
        assert all(list(session.generate("a b", max_tokens=1)) for session in sessions)


@pytest.mark.parametrize("asked", [1, 8])
def test_a_server_says_that_its_slots_are_fewer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: int
) -> None:
    monkeypatch.setattr(asking, "sessions", lambda model, n: [model.own_session])
    monkeypatch.setattr(Server, "serve_until_stopped", lambda self, begun: None)
    assert main(["serve", str(write_model(tmp_path / "model.gguf")), "--port", "0", "--slots", str(asked)]) == 0
    told = "" if asked == 1 else f"pocketlm: there is memory for 1 of {asked} slots; --ctx makes them smaller\n"
    assert capsys.readouterr().err == f"{told}pocketlm: stopped\n"
