"""Whatever somebody who writes Python with a model gets wrong ends in one line that says so, and the model goes on."""

import ast
import copy
import os
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny_models import write_model

import pocketlm
from pocketlm.errors import PocketlmError, UsageError


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("mistakes") / "tiny.gguf", n_ctx=128)


@pytest.fixture
def model(path):
    with pocketlm.load(path, threads=1) as model:
        yield model


def say(session, prompt="the", n=6):
    return [piece.id for piece in session.generate(prompt, max_tokens=n, temperature=0)]


def refused(call, *arguments, **options):
    with pytest.raises(UsageError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("use", [pickle.dumps, copy.copy, copy.deepcopy])
def test_models_and_sessions_are_neither_pickled_nor_copied(model, use):
    assert "load" in refused(use, model)
    session = model.session()
    expected = say(session)
    assert "fork" in refused(use, session)
    assert use is copy.copy or refused(use, {"a": [session]})
    assert say(session) == expected


@pytest.mark.parametrize("n", ["x", [1], b"x", -1, 1.5])
def test_a_number_of_tokens_that_is_none_is_refused(model, n):
    messages = [{"role": "user", "content": "the"}]
    for stream in (model.generate("the", max_tokens=n), model.chat(messages, max_tokens=n)):
        assert refused(next, stream).startswith("max_tokens is ")


@pytest.mark.parametrize("name", [None, 1.5, True, [], sys.stdout])
@pytest.mark.parametrize("use", ["save", "load"])
def test_what_names_no_file_is_refused(model, use, name):
    assert "is not the name of a file" in refused(getattr(model.session(), use), name)


def test_a_number_does_not_close_the_file_of_that_number(model, tmp_path):
    with open(tmp_path / "mine", "w") as file:
        for use in ("save", "load"):
            refused(getattr(model.session(), use), file.fileno())
        refused(model.session, load=file.fileno())
        os.fstat(file.fileno())  # it is still open
        file.write("mine")


def test_a_name_in_bytes_is_a_name(model, tmp_path):
    session = model.session()
    expected = say(session)
    session.save(os.fsencode(tmp_path / "a"))
    assert say(model.session(load=os.fsencode(tmp_path / "a"))) == expected


@pytest.mark.parametrize("number", ["5", 5.5, True, [], 0, -1, 10**30])
def test_what_is_no_whole_number_is_refused(path, model, number):
    assert "expected 1 to" in refused(model.session, ctx=number)
    assert "expected 1 to" in refused(pocketlm.load, path, ctx=number)
    assert "expected 1 to" in refused(pocketlm.load, path, threads=number)
    assert "expected 1 to" in refused(model.set_threads, number)
    assert model.session(ctx=np.int64(16)).n_ctx == 16


@pytest.mark.parametrize(
    "option",
    [{"stop": 5}, {"stop": [5]}, {"stop": [""]}, {"cancel": True}, {"cancel": 5}, {"draft": "off"}, {"ignore_eos": "no"},
     {"reuse_cache": None}],
)  # fmt: skip
@pytest.mark.parametrize("chat", [False, True])
def test_options_of_the_wrong_kind_are_refused(model, option, chat):
    def use():
        return list(model.chat([{"role": "user", "content": "a"}], **option) if chat else model.generate("a", **option))

    assert next(iter(option)) in refused(use)


@pytest.mark.parametrize("messages", [None, 5, 1.5])
def test_what_is_no_list_of_messages_is_refused(model, messages):
    assert "the messages are" in refused(model.chat, messages)


def test_forks_of_forks_say_the_same_and_outlive_what_they_came_from(model):
    session = model.session()
    expected = say(session)
    for _ in range(40):
        other = session.fork()
        session.close()
        session = other
    assert say(session) == expected


def test_threads_that_use_one_session_at_the_same_time_get_an_answer_or_one_line(model, tmp_path):
    session, expected, wrong = model.session(), say(model.session()), []
    for name in "ab":
        session.save(tmp_path / name)

    def use(seed):
        rng = random.Random(seed)
        things = [
            lambda: say(session) == expected,
            lambda: say(session.fork()) == expected,
            lambda: session.save(tmp_path / rng.choice("ab")) or True,
            lambda: session.load(tmp_path / rng.choice("ab")) or True,
            lambda: len(session.logits([1, 2, 3])) == 3,
            lambda: session.context_used >= 0,
            lambda: next(session.generate("a", max_tokens=4)) and True,
        ]
        for _ in range(40):
            try:
                if not rng.choice(things)():
                    wrong.append("another answer")
            except PocketlmError as error:
                if "\n" in str(error):
                    wrong.append(error)
            except BaseException as error:
                wrong.append(error)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
    assert not wrong
    assert say(session) == expected


def test_an_id_alone_is_no_list_of_ids(model):
    with pytest.raises(UsageError, match="takes a list of ids, not int"):
        model.tokenizer.decode(5)


def test_what_a_notebook_shows_of_a_model_and_a_session(path):
    with pocketlm.load(path, backend="numpy", threads=1) as model:
        session = model.session()
        assert repr(model) == f"<Model {model.name!r}: numpy, threads 1, context {model.n_ctx}>"
        assert repr(session) == f"<Conversation with {model.name!r}: 0 of {model.n_ctx} tokens>"
    assert model.name in repr(model)
    assert model.name in repr(session)


def test_tab_offers_what_is_imported_on_first_use():
    """In a process of its own: here all of it has long been used."""
    asks = [sys.executable, "-c", "import pocketlm; print(dir(pocketlm))"]
    shown = subprocess.run(asks, capture_output=True, text=True, check=True)
    assert {"load", "Model", "PocketlmError", "tokenizer", "__version__"} <= set(ast.literal_eval(shown.stdout))


def test_who_catches_an_error_finds_it_beside_load():
    with pytest.raises(pocketlm.FileError, match="no such file"):
        pocketlm.load("missing.gguf")
    with pytest.raises(pocketlm.UsageError, match="empty"):
        pocketlm.load("")
    assert (PocketlmError, UsageError) == (pocketlm.PocketlmError, pocketlm.UsageError)


@pytest.mark.parametrize("bias", [[1], "5", 7, {5: "1"}])
def test_a_bias_that_maps_nothing_is_refused(model, bias):
    assert "logit_bias" in refused(model.generate, "the", logit_bias=bias)
