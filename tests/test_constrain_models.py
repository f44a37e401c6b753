"""Answers that have a form, from models: in Python, in commands, beside drafts, with the tokenizers that there are."""

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from constraining import allowed
from test_drafts import Eager
from tiny_models import write_model

import pocketlm
from pocketlm.cli import main
from pocketlm.constrain.guides import Guides
from pocketlm.errors import UsageError
from pocketlm.tokenizer import load as load_tokenizer

VECTORS = Path(__file__).parent / "vectors"

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "n": {"type": "integer", "minimum": 3, "maximum": 40},
        "kind": {"enum": ["a", "bc"]},
        "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "n", "kind", "list"],
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("forms") / "tiny.gguf", n_ctx=512)


@pytest.fixture(scope="module")
def model(path):
    with pocketlm.load(path, threads=1) as model:
        yield model


def check(value):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema says what is valid")
    jsonschema.validate(value, SCHEMA)


def answer(model, **options):
    *pieces, last = model.generate("the", **{"max_tokens": 200, **options})
    return "".join(piece.text for piece in pieces) + last.text, [piece.id for piece in pieces], last


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 2.0, "top_k": 0, "top_p": 1, "min_p": 0}])
def test_forms(model, options):
    for seed in range(5):
        text, _, last = answer(model, json_schema=SCHEMA, seed=seed, **options)
        assert last.finish_reason == "stop"
        check(json.loads(text))
        assert answer(model, json_schema=json.dumps(SCHEMA), seed=seed, **options)[0] == text
        assert answer(model, choices=["yes", "no", "maybe"], seed=seed, **options)[0] in ("yes", "no", "maybe")
        assert re.fullmatch(r"[a-c]{3}-\d{2,4}", answer(model, regex=r"[a-c]{3}-\d{2,4}", seed=seed, **options)[0])


FORMS = {"schema": {"json_schema": SCHEMA}, "few": {"choices": ["yes", "no", "maybe"]}, "mask": {"regex": "[^x]{30}"}}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.5}, {"top_k": 0}, {"repeat_penalty": 1.3}], ids=str)
def test_tokens_are_drawn_inside_the_passes(model, monkeypatch, form, options):
    """All but the first, and the same that NumPy draws."""
    drawn, step = [], model.executor.step

    def noted(work, samplers=(), *rest):
        drawn.append(samplers)
        return step(work, samplers, *rest)

    monkeypatch.setattr(model.executor, "step", noted)
    text, ids, last = answer(model, seed=3, draft=False, **form, **options)
    assert sum(any(samplers) for samplers in drawn) == last.generated_tokens - 1
    drawn.clear()
    monkeypatch.setattr(type(model.executor), "new_selection", lambda self: None)
    assert answer(model, seed=3, draft=False, **form, **options)[:2] == (text, ids)
    assert not any(any(samplers) for samplers in drawn)


def test_an_answer_that_is_cut_off_is_the_beginning_of_one(model):
    text, _, last = answer(model, json_schema={"type": "string", "minLength": 9}, max_tokens=5)
    assert last.finish_reason == "length"
    assert text.startswith('"')


@pytest.mark.parametrize(
    ("form", "reason"), [({"regex": "[ab]"}, "stop"), ({"regex": "a{1,2}"}, "length"), ({"regex": "a{2}"}, "length")]
)
def test_a_whole_answer_was_not_cut_off_by_a_limit_that_it_just_reaches(model, form, reason):
    assert answer(model, max_tokens=1, temperature=0, **form)[2].finish_reason == reason


def test_no_pass_is_made_for_what_cannot_go_on(model):
    """The answer is over with the last token that it may have: no end token is waited for."""
    _, ids, last = answer(model, choices=["no"], reuse_cache=False)
    assert last.generated_tokens == len(ids)
    assert model.context_used == len(model.tokenizer.encode("the")) + len(ids) - 1


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.9, "seed": 4}])
def test_drafts_change_nothing(model, options):
    """Several tokens are drawn in a pass, each under the mask of the one before it."""
    form = {"regex": "(abc|abd){20,60}e", **options}
    prompt = "abc" * 30
    plain = [piece.id for piece in model.generate(prompt, max_tokens=60, draft=False, **form)]
    model.own_session.state.odds = Eager()
    *drafted, last = model.generate(prompt, max_tokens=60, **form)
    assert last.accepted_tokens > 4
    assert [piece.id for piece in drafted] == plain[:-1]


def test_the_callers_own_step_comes_before_the_mask(model):
    def liked(logits, ids):
        logits[model.tokenizer.encode("n")[-1]] += 100

    assert answer(model, choices=["yes", "no"], process=liked, temperature=0)[0] == "no"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"json_object": True, "regex": "a"}, "one form"),
        ({"regex": "("}, "missing"),
        ({"choices": []}, "choices must"),
        ({"choices": "ab"}, "choices must"),
        ({"choices": ["a", ""]}, "at least one character"),
        ({"json_schema": {"not": {}}}, "not is not supported"),
        ({"json_schema": "{"}, "no JSON"),
        ({"json_object": 1}, "json_object"),
        ({"regex": 3}, "regex is 3"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"json_schema": {1, 2}}, "no JSON"),
        ({"json_schema": {"const": math.inf}}, "no JSON"),
        ({"json_schema": False}, "no text can be what json_schema asks for"),
        ({"json_schema": "false"}, "no text can be what json_schema asks for"),
        ({"regex": False}, "regex is False"),
        ({"json_schema": '{"enum": [1, 1e999]}'}, "no JSON"),
    ],
)
def test_what_cannot_be_had_is_said_at_once(model, options, word):
    with pytest.raises(UsageError, match=word):
        model.generate("the", **options)


class Few:
    """A tokenizer without most characters."""

    def all_bytes(self):
        return [b"a", b"b", b"ab", b"<end>", b"\xff"]

    def special_ids(self):
        return [3]

    def is_control(self, id):
        return id == 3

    def starts_anew_after(self, id):
        return False


def test_a_vocabulary_that_lacks_a_character_is_said_to():
    guides = Guides(Few(), frozenset({3}), 6)
    assert not guides.guide(("regex", "(a|b)+")).is_over()
    with pytest.raises(UsageError, match="lacks the characters"):
        guides.guide(("regex", "c"))


VOCABULARIES = [*sorted(VECTORS.glob("gguf-*.gguf")), VECTORS / "sentencepiece-bytes.model"]


@pytest.mark.parametrize("file", VOCABULARIES, ids=lambda path: path.name)
def test_every_kind_of_tokenizer(file):
    """Byte pairs, SentencePiece with byte tokens and spaces in front of words: a text in tokens by chance, each
    allowed; and what the decoder of a stream makes of them is the text.
    """
    rng, tokenizer = random.Random(0), load_tokenizer(file)
    ends = tokenizer.end_ids or frozenset({0})
    masks = Guides(tokenizer, ends, tokenizer.n_vocab).guide(("json_object", ""))._masks
    tokens = masks.vocabulary.tokens
    assert not any(tokens[id] for id in range(tokenizer.n_vocab) if tokenizer.is_control(id) or id in ends)
    by_first = {}
    for id, data in enumerate(tokens):
        by_first.setdefault(data[:1], []).append(id)
    text = json.dumps({"the name": ["Grüße aus  Köln", "日本語 🙂\n", 12.5, True, {}]}, ensure_ascii=False)
    for _ in range(5):
        data, at, state, decoder, shown = text.encode(), 0, masks.start, tokenizer.stream_decoder(continues=True), ""
        while at < len(data):
            fitting = [id for id in by_first.get(data[at : at + 1], ()) if data.startswith(tokens[id], at)]
            id = rng.choice(fitting)
            assert allowed(masks, state)[id]
            state = masks.advance(state, tokens[id])
            at += len(tokens[id])
            shown += decoder.push(id)
        assert shown + decoder.flush() == text
        assert set(allowed(masks, state).nonzero()[0].tolist()) == set(ends)


def test_a_friends_program_has_all_that_forms_need():
    """A packed program goes without much of Python's library."""
    from pocketlm.build.contents import EXCLUDED, is_held

    code = (
        "import numpy, json, sys\n"
        f"sys.modules.update(dict.fromkeys({EXCLUDED!r}))\n"
        "from pocketlm.constrain.guides import check_form\n"
        "check_form({'json_schema': {'type': 'number', 'minimum': 0.5}}); check_form({'regex': 'a+'})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert all(is_held(f"constrain/{file.name}") for file in (VECTORS.parents[1] / "constrain").glob("*.py"))


def run(capsys, *words):
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def test_commands(path, tmp_path, capsys):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA), encoding="utf-8-sig")  # as editors of Windows write it
    status, out, _ = run(capsys, "generate", path, "-p", "the", "--json-schema", schema, "--seed", 1, "-n", 400)
    assert status == 0
    check(json.loads(out))
    status, out, _ = run(capsys, "generate", path, "-p", "the", "--json", "--choice", "yes", "--choice", "no")
    assert json.loads(out)["text"] in ("yes", "no")
    status, out, _ = run(capsys, "chat", path, "hello", "--regex", r"\d{4}", "--no-save", "--template", "alpaca")
    assert re.fullmatch(r"\d{4}", out.strip())
    status, out, _ = run(capsys, "generate", path, "-p", "the", "--json-object", "-n", 300, "--temp", 0)
    assert out.startswith("{")


def test_many_prompts(path, tmp_path, capsys):
    """The command's form is that of lines that have none of their own."""
    lines, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    own = {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [1, 2]}}}}
    bad = {"json_schema": {"not": {}}}
    prompts = [{"prompt": "the"}, {"prompt": "in", **own}, {"prompt": "a", **bad}]
    lines.write_text("\n".join(map(json.dumps, prompts)))
    run(capsys, "generate", path, "--input", lines, "--output", answers, "--regex", "[a-c]{4}", "--slots", 2)
    found = sorted((json.loads(line) for line in answers.read_text().splitlines()), key=lambda answer: answer["line"])
    assert re.fullmatch("[a-c]{4}", found[0]["choices"][0]["text"])
    assert found[1]["choices"][0]["text"] in ("1", "2")
    assert "not is not supported" in found[2]["error"]["message"]


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        ('{"not": {}}', (), "schema.json: json_schema: not is not supported"),
        ("{", (), "it is no JSON"),
        (None, (), "cannot be read"),
        ("{}", ("--regex", "a"), "not allowed with"),
        ("{}", ("--choice", "a"), "not allowed with"),
    ],
)
def test_a_command_says_what_is_wrong_with_a_schema(path, tmp_path, capsys, content, words, said):
    schema = tmp_path / "schema.json"
    if content is not None:
        schema.write_text(content)
    status, out, err = run(capsys, "generate", path, "-p", "the", "--json-schema", schema, *words)
    assert status
    assert out == ""
    assert said in err


def test_smollm2_fills_in_a_schema(smollm2_path):
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 40},
            "country": {"type": "string", "maxLength": 40},
            "capital": {"type": "boolean"},
        },
        "required": ["city", "country", "capital"],
    }
    with pocketlm.load(smollm2_path, threads=1, ctx=512) as model:
        question = [{"role": "user", "content": "Tell me about Paris as JSON with city, country and whether it is a capital."}]
        *pieces, last = model.chat(question, json_schema=schema, temperature=0, max_tokens=100)
        found = json.loads("".join(piece.text for piece in pieces) + last.text)
        assert found["city"].startswith("Paris")
        assert set(found) == {"city", "country", "capital"}
        # every token of the whole vocabulary, from states that a long text comes through
        guide, rng = model.guide({"json_schema": schema}), random.Random(0)
        masks, state = guide._masks, guide._masks.start
        text = '{"city": "São Paulo", "country": "Brasil 🙂", "capital": false}'
        for id in model.tokenizer.encode(text):
            mask, tokens = masks.mask(state), masks.vocabulary.tokens
            allowed = set(range(len(tokens))) - set(mask.nonzero()[0].tolist()) if mask.dtype == bool else set(mask.tolist())
            for tried in rng.sample(range(len(tokens)), 300):
                assert (tried in allowed) == bool(tokens[tried] and masks.advance(state, tokens[tried]))
            assert id in allowed
            state = masks.advance(state, tokens[id])
        assert masks.mask(state).tolist() == sorted(model._end_ids)
