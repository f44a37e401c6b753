"""Sessions saved to files: they go on with the same bits; a file that is damaged, hostile or of another model is refused."""

from __future__ import annotations

import errno
import hashlib
import os
import pathlib

import numpy as np
import pytest
from tiny_models import write_model
from two_backends import OPTIONS, ids, model_fixture, path_fixture  # noqa: F401

import pocketlm
from pocketlm.errors import FileError
from pocketlm.runtime.atomic import write_file
from pocketlm.runtime.state_file import HEADER


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
def test_a_saved_session_goes_on_with_the_same_bits(model, tmp_path, n):
    prompt = list(range(3, 3 + n))
    session, file = model.session(), tmp_path / "a.state"
    list(session.generate(prompt, max_tokens=1))
    session.save(file)
    loaded = model.session(load=file)
    assert loaded.context_used == n
    expected, logits = (state.advance([*prompt, 9, 8, 7]) for state in (session.state, loaded.state))
    assert expected[1] == logits[1] == n
    np.testing.assert_array_equal(logits[0], expected[0])
    assert np.isfinite(expected[0]).all()


def test_a_session_saved_by_one_executor_goes_on_in_the_other(path, tmp_path):
    prompt, logits = list(range(3, 60)), {}
    for saves, loads in (("numpy", "native"), ("native", "numpy")):
        with pocketlm.load(path, backend=saves, threads=1) as model:
            list(model.session().generate(prompt, max_tokens=1))
            session = model.session()
            session.state.advance(prompt)
            session.save(tmp_path / saves)
        with pocketlm.load(path, backend=loads, threads=1) as model:
            session = model.session(load=tmp_path / saves)
            logits[loads], n_cached = session.state.advance([*prompt, 9])
            assert n_cached == len(prompt)
            assert np.abs(logits[loads] - model.logits([*prompt, 9])[-1]).max() < 0.02


def test_what_may_be_another_executors_is_not_saved_as_exact(path, tmp_path):
    prompt = list(range(3, 60))
    with pocketlm.load(path, backend="native", threads=1) as model:
        list(model.generate(prompt, max_tokens=1))
        model.own_session.save(tmp_path / "any")
        model.save_state(tmp_path / "exact")
        model.load_state(tmp_path / "exact")
        model.save_state(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "exact").read_bytes()
    with pocketlm.load(path, backend="numpy", threads=1) as model:
        session = model.session(load=tmp_path / "any")
        session.save(tmp_path / "exact", exactly=True)
        assert session.context_used == len(prompt)
        model.load_state(tmp_path / "exact")
        assert model.context_used == 0
        session.fork().save(tmp_path / "exact", exactly=True)
        model.load_state(tmp_path / "exact")
        assert model.context_used == 0


def test_an_empty_session_is_saved_and_loaded(model, tmp_path):
    model.session().save(tmp_path / "empty")
    assert model.session(load=tmp_path / "empty").context_used == 0


def resealed(content: bytes) -> bytes:
    return content[:-32] + hashlib.sha256(content[:-32]).digest()


def with_ids(content: bytes, id: int) -> bytes:
    at = HEADER.size
    return resealed(content[:at] + id.to_bytes(4, "little", signed=True) + content[at + 4 :])


def with_nan(content: bytes) -> bytes:
    return resealed(content[:-40] + b"\xff" * 8 + content[-32:])


def with_count(content: bytes) -> bytes:
    return content[:20] + (1 << 31).to_bytes(4, "little") + content[24:]


DAMAGES = {
    "empty": (lambda content: b"", "is not a saved session"),
    "another kind": (lambda content: b"GGUF" + content[4:], "is not a saved session"),
    "cut": (lambda content: content[:-100], "bytes instead of"),
    "longer": (lambda content: content + b"x", "bytes instead of"),
    "a bit": (lambda content: content[:-50] + bytes([content[-50] ^ 1]) + content[-49:], "checksum"),
    "version": (lambda content: content[:16] + b"\x07\0\0\0" + content[20:], "version 7"),
    "a count": (with_count, "tokens but the context holds 512"),
    "fingerprint": (lambda content: resealed(content[:50] + bytes([content[50] ^ 1]) + content[51:]), "another model"),
    "heads": (lambda content: resealed(content[:28] + b"\x09" + content[29:]), "another model"),
    "id too large": (lambda content: with_ids(content, 100_000), "not in the vocabulary"),
    "id negative": (lambda content: with_ids(content, -1), "not in the vocabulary"),
    "NaN": (with_nan, "not finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line_and_the_session_goes_on(model, tmp_path, damage):
    change, words = DAMAGES[damage]
    session, file = model.session(), tmp_path / "a.state"
    expected = ids(session.generate("in the thing", **OPTIONS, temperature=0))
    session.save(file)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(FileError, match=words) as error:
        session.load(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)
    assert (session.context_used == 0) == (damage == "NaN")  # only that is found while the cache is being filled
    assert ids(session.generate("in the thing", **OPTIONS, temperature=0)) == expected


def test_a_scale_that_makes_its_numbers_infinite_is_refused(path, tmp_path, recwarn):
    with pocketlm.load(path, backend="native", threads=1) as model:
        session, file = model.session(), tmp_path / "a.state"
        session.state.advance([1, 2, 3])
        session.save(file)
        content = file.read_bytes()
        file.write_bytes(resealed(content[:-36] + b"\xff\xff\x7f\x7f" + content[-32:]))  # the last one, of 16-bit words
        with pytest.raises(FileError, match="not finite"):
            session.load(file)
    assert list(recwarn) == []


def test_another_models_session_is_refused(model, tmp_path):
    session = model.session()
    session.state.advance([1, 2, 3])
    session.save(tmp_path / "a.state")
    other = write_model(tmp_path / "other.gguf", n_ctx=512, n_kv_head=2, head_dim=24, seed=1)  # other weights, nothing else
    with pocketlm.load(other, backend="numpy") as another, pytest.raises(FileError, match="another model"):
        another.session(load=tmp_path / "a.state")
    with pytest.raises(FileError, match="another model, backend or instruction set, or without `exactly`"):
        model.session().load(tmp_path / "a.state", exactly=True)
    session.save(tmp_path / "exact.state", exactly=True)
    with pytest.raises(FileError, match="or with `exactly`"):
        model.session().load(tmp_path / "exact.state")
    with pytest.raises(FileError, match="3 tokens but the context holds 2"):
        model.session(ctx=2, load=tmp_path / "a.state")
    with pytest.raises(FileError, match="cannot be read"):
        model.session(load=tmp_path / "missing")


def test_a_file_that_cannot_be_written_leaves_the_old_one(model, tmp_path, monkeypatch):
    session, file = model.session(), tmp_path / "a.state"
    session.state.advance([1, 2, 3])
    session.save(file)
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session.state.cache, "read_keys", full)
    with pytest.raises(FileError, match="No space left"):
        session.save(file)
    assert file.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.state"]


@pytest.mark.parametrize("use", ["save", "load"])
def test_a_name_that_no_file_can_have_is_refused_in_one_line(model, use):
    with pytest.raises(FileError, match="embedded null"):
        getattr(model.session(), use)("a\0b")
    with pytest.raises(FileError, match="cannot be"):
        getattr(model.session(), use)("x" * 300)


def test_a_folder_that_one_may_not_enter_is_refused_in_one_line(model, tmp_path, monkeypatch):
    def stat(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(getattr(pathlib, "_NormalAccessor", os), "stat", staticmethod(stat))  # Python 3.10 has it there
    with pytest.raises(FileError, match="cannot be written"):
        model.session().save(tmp_path / "locked" / "a.state")


def test_the_last_byte_of_a_file_stays_whatever_it_is(tmp_path):
    """Windows takes a Ctrl-Z from the end of a file that is opened as text, to be read and written."""
    for last in range(256):
        write_file(tmp_path / "any", content := bytes([1, last]))
        assert (tmp_path / "any").read_bytes() == content
