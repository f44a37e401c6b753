"""Chat templates are programs of strangers: they reach nothing, come to an end, and print what plain Jinja prints."""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from chat_data import PAYLOADS, RUNAWAYS
from random_templates import templates

from pocketlm.chat.budget import TemplateError, TemplateRaised
from pocketlm.chat.sandbox import SandboxedTemplate

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Bye"}]


INSIDE = re.compile(
    r"<(class|function|module|built-in|bound|pocketlm|jinja2|generator|list_|frame|Namespace|Macro)|0x[0-9a-f]{6}"
)


def render(source: str, **variables: object) -> str:
    known = {"messages": MESSAGES, "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    return SandboxedTemplate(source).render({**known, **variables}, 100)


def test_the_corpus_has_200_different_payloads():
    assert len(set(PAYLOADS)) == len(PAYLOADS) >= 200


@pytest.mark.parametrize("payload", PAYLOADS)
def test_an_escape_is_refused(payload):
    with pytest.raises(TemplateError) as error:
        render(payload)
    assert "\n" not in str(error.value)
    assert not INSIDE.search(str(error.value))


def refused(payload: str) -> bool:
    try:
        render(payload)
    except TemplateError:
        return True
    return False


def test_no_payload_opens_imports_or_runs_anything():
    """Python's own audit events, recorded while every payload is compiled and rendered."""
    events, watched = [], threading.get_ident()
    active = False

    def record(event: str, arguments: tuple) -> None:
        if active and threading.get_ident() == watched:
            events.append(f"{event} {arguments[1]}" if event == "object.__getattr__" else event)

    sys.addaudithook(record)  # cannot be taken away again, so it is switched off
    for active in (False, True):  # the first time, Python imports the codecs that Jinja's lexer uses  # noqa: B007
        assert all(map(refused, PAYLOADS))
    active = False
    # how Jinja makes a function of a template, and a traceback of a syntax error
    harmless = {"compile", "exec", "code.__new__", "object.__getattr__ tb_frame", "object.__getattr__ f_code"}
    assert set(events) <= harmless


@pytest.mark.parametrize("name", RUNAWAYS)
def test_a_runaway_ends_within_a_second_with_one_line(name):
    started = time.thread_time()  # of this thread: other programs may use the processor too
    with pytest.raises(TemplateError) as error:
        render(RUNAWAYS[name])
    assert time.thread_time() - started < 1
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 200


def test_all_runaways_together_stay_within_64_mb():
    pytest.importorskip("resource", reason="peak memory is read from getrusage")
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_chat_sandbox import RUNAWAYS, TemplateError, render\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "render('{{ messages }}'); before = peak()\n"
        "for source in RUNAWAYS.values():\n"
        "    try: render(source)\n"
        "    except TemplateError: pass\n"
        "print((peak() - before) * (1 if sys.platform == 'darwin' else 1024))"
    )
    child = [sys.executable, "-c", code, str(Path(__file__).parent)]
    grown = int(subprocess.run(child, capture_output=True, text=True, check=True, timeout=300).stdout)
    assert grown < 64 << 20


def test_a_runaway_ends_in_any_thread():
    caught = []

    def work():
        try:
            render(RUNAWAYS["range of ranges"])
        except TemplateError as error:
            caught.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert caught == ["it does not come to an end"]


def test_random_programs_neither_run_away_nor_show_the_inside_of_python():
    for source in templates(seed=1, n=500):
        started = time.thread_time()
        try:
            text = render(source)
        except TemplateError as error:
            text = str(error)
        assert not INSIDE.search(text), source
        assert time.thread_time() - started < 1, source


def test_a_template_can_refuse_a_conversation_in_one_line():
    with pytest.raises(TemplateRaised, match=r"^no system prompts$"):
        render("{{ raise_exception('no system\n prompts') }}")


def test_rendering_leaves_the_messages_alone():
    before = [dict(message) for message in MESSAGES]
    render("{% for m in messages %}{{ m.content|upper }}{% endfor %}")
    assert before == MESSAGES


def test_a_long_conversation_is_no_runaway():
    messages = [{"role": ("user", "assistant")[n % 2], "content": "word " * 400} for n in range(501)]
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'user' and loop.index0 < messages|length %}"
        "{% set ns.n = ns.n + 1 %}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content']|trim + '<|im_end|>' }}{% endfor %}"
    )
    size = sum(len(message["content"]) for message in messages)
    text = SandboxedTemplate(source).render({"messages": messages}, size)
    assert text.count("<|im_start|>") == 501
