"""`export --verify` looks at what the user's executor computes from the file, and leaves nothing behind."""

import sys
import threading

import numpy as np
import pytest
from canonical_models import make_hyper, make_model

from pocketlm.errors import PocketlmError
from pocketlm.export import verify as verify_module
from pocketlm.export.export import export
from pocketlm.export.verify import verify
from pocketlm.runtime.native.executor import NativeExecutor, NativeUnavailable
from pocketlm.runtime.numpy_executor import NumpyExecutor

TEXT = "the quick brown fox jumps over the lazy dog\n" * 3


@pytest.fixture
def exported(tmp_path):
    model = make_model(make_hyper("llama"))
    export(model, "c", tmp_path / "m.gguf", quant="f32")
    return model, tmp_path / "m.gguf"


def test_the_file_runs_where_its_users_will_run_it_and_the_weights_on_the_reference(exported, monkeypatch):
    used = []
    for kind in (NativeExecutor, NumpyExecutor):

        def forward(self, ids, rows="last", kind=kind, before=kind.forward):
            used.append((kind, self.n_ctx))
            return before(self, ids, rows)

        monkeypatch.setattr(kind, "forward", forward)
    verify(*exported, TEXT)
    assert {kind for kind, _ in used} == {NativeExecutor, NumpyExecutor}


def test_an_error_of_the_native_executor_is_seen(exported, monkeypatch):
    before, good = NativeExecutor.forward, verify(*exported, TEXT)

    def broken(self, ids, rows="last"):
        logits = before(self, ids, rows)
        return logits + np.random.default_rng(0).standard_normal(logits.shape).astype(np.float32) * logits.std()

    monkeypatch.setattr(NativeExecutor, "forward", broken)
    bad = verify(*exported, TEXT)
    assert good.worst_cosine > 0.9999
    assert bad.cosine < 0.95
    assert bad.exact_perplexity == good.exact_perplexity


def test_where_code_cannot_run_the_file_is_verified_on_numpy(exported, monkeypatch, capsys):
    def refused(*_):
        raise NativeUnavailable("no executable memory")

    monkeypatch.setattr(NativeExecutor, "__init__", refused)
    result = verify(*exported, TEXT)
    assert result.worst_cosine > 0.999999
    assert "running on NumPy" in capsys.readouterr().err


@pytest.mark.parametrize("text", [TEXT, ""])
def test_verifying_leaves_no_threads_and_no_open_file_behind(exported, text, monkeypatch):
    monkeypatch.setattr(verify_module, "default_threads", lambda: 3)
    model, path = exported
    if text:
        verify(model, path, text)
    else:  # it ends in an error half way
        monkeypatch.setattr(verify_module, "cosines", lambda *_: (_ for _ in ()).throw(PocketlmError("stop")))
        with pytest.raises(PocketlmError, match="stop"):
            verify(model, path, TEXT)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("pocketlm")] == []
    if sys.platform == "linux" and text:
        with open("/proc/self/maps") as maps:
            assert str(path) not in maps.read()
