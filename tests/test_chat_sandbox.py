"""Chat templates are programs of strangers: they reach nothing, come to an end, and print what plain Jinja prints."""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pocketlm.chat.budget import TemplateError, TemplateRaised
from pocketlm.chat.sandbox import SandboxedTemplate

PAYLOADS = Path(__file__).with_name("escape_payloads.txt").read_text(encoding="utf-8").splitlines()
MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Bye"}]


def render(source: str, **variables: object) -> str:
    known = {"messages": MESSAGES, "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    return SandboxedTemplate(source).render({**known, **variables}, 100)


def test_the_corpus_has_200_different_payloads():
    assert len(set(PAYLOADS)) == len(PAYLOADS) >= 200


@pytest.mark.parametrize("payload", PAYLOADS)
def test_an_escape_is_refused(payload):
    with pytest.raises(TemplateError) as error:
        render(payload)
    line = str(error.value)
    assert "\n" not in line
    assert not re.search(r"<(class|function|module|built-in|bound)|0x[0-9a-f]{6}", line), line


def test_no_payload_opens_imports_or_runs_anything():
    """Python's own audit events, recorded while every payload is compiled and rendered."""
    events, watching = [], threading.get_ident()
    active = True

    def record(event: str, arguments: tuple) -> None:
        if active and threading.get_ident() == watching:
            events.append((event, arguments))

    render("{{ strftime_now('%Y') }}")  # whatever is imported once is imported
    sys.addaudithook(record)  # cannot be taken away again, so it is switched off
    for payload in PAYLOADS:
        with pytest.raises(TemplateError):
            render(payload)
    active = False
    harmless = {"compile", "exec", "object.__getattr__"}  # how Jinja turns a template into a function
    assert [event for event in events if event[0] not in harmless] == []
    attributes = {arguments[1] for event, arguments in events if event == "object.__getattr__"}
    assert not attributes & {"gi_frame", "gi_code", "cr_frame", "f_back", "f_globals", "tb_frame"}


BIG = "'" + "a" * 1000 + "'"
RUNAWAYS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "range of ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "five loops": "{% for a in m %}{% for b in m %}{% for c in m %}{% for d in m %}{% for e in m %}x{% endfor %}"
    "{% endfor %}{% endfor %}{% endfor %}{% endfor %}".replace("in m", "in range(1000)"),
    "loop filter": "{% for i in range(99999) if i in range(99999)|list %}{% endfor %}",
    "text times number": "{{ 'a' * 10**9 }}",
    "number times text": "{{ 10**9 * 'a' }}",
    "list times number": "{{ [0] * 10**9 }}",
    "tuple times number": "{{ ((0,) * 10**9)|length }}",
    "repeated multiplication": "{% set ns = namespace(v='a') %}{% for i in range(9999) %}{% set ns.v = ns.v * 9 %}{% endfor %}",
    "doubling by +": "{% set ns = namespace(v='a') %}{% for i in range(9999) %}{% set ns.v = ns.v + ns.v %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(v='a') %}{% for i in range(9999) %}{% set ns.v = ns.v ~ ns.v %}{% endfor %}",
    "doubling by join": "{% set ns = namespace(v='a') %}{% for i in range(999) %}{% set ns.v = [ns.v, ns.v]|join %}{% endfor %}",
    "doubling by .join": "{% set ns = namespace(v='a') %}{% for i in range(999) %}{% set ns.v = ''.join([ns.v]*9) %}{% endfor %}",
    "doubling by set": "{% set x = 'aaaaaaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubling by list": "{% set ns = namespace(v=[0]) %}{% for i in range(9999) %}{% set ns.v = ns.v + ns.v %}{% endfor %}",
    "shared lists printed": "{% set ns = namespace(v=[0]) %}{% for i in range(60) %}{% set ns.v = [ns.v, ns.v] %}{% endfor %}{{ ns.v }}",
    "shared lists compared": "{% set a = namespace(v=[0]) %}{% set b = namespace(v=[0]) %}{% for i in range(22) %}"
    "{% set a.v = [a.v, a.v] %}{% set b.v = [b.v, b.v] %}{% endfor %}{% for i in range(99999) %}{{ a.v == b.v }}{% endfor %}",
    "shared dicts": "{% set ns = namespace(v={}) %}{% for i in range(60) %}{% set ns.v = {'a': ns.v, 'b': ns.v} %}{% endfor %}{{ ns.v|tojson }}",
    "deep list": "{% set ns = namespace(v=[]) %}{% for i in range(9999) %}{% set ns.v = [ns.v] %}{% endfor %}{{ ns.v }}",
    "namespace in itself": "{% set ns = namespace() %}{% set ns.a = [ns, ns] %}{{ ns.a }}",
    "power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "power of ten": "{{ 10 ** 10000000 }}",
    "negative power": "{{ 10 ** -99999999 }}",
    "squaring": "{% set ns = namespace(v=9) %}{% for i in range(99) %}{% set ns.v = ns.v * ns.v %}{% endfor %}",
    "power by power": "{% set ns = namespace(v=9) %}{% for i in range(99) %}{% set ns.v = ns.v ** 9 %}{% endfor %}",
    "long number": "{{ ('9' * 99999)|int }}",
    "long constant": "{{ " + "9" * 4000 + " }}",
    "longer constant": "{{ " + "9" * 60000 + " }}",
    "recursive macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "two macros": "{% macro a() %}{{ b() }}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{{ a() }}{% endmacro %}{{ a() }}",
    "branching macro": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(20) }}",
    "printing macro": "{% macro m(n) %}x{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(23) }}",
    "recursive caller": "{% macro m() %}{{ caller() }}{% endmacro %}{% macro n() %}{% call m() %}{{ n() }}{% endcall %}{% endmacro %}{{ n() }}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "center": "{{ 'a'|center(10**9) }}",
    "center method": "{{ 'a'.center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ '1'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "indent": "{{ 'a\nb'|indent(10**9) }}",
    "indent with text": "{{ ('a\n' * 1000)|indent('x' * 100000) }}",
    "wordwrap": "{{ 'a b'|wordwrap(1, wrapstring='x' * 1000000) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "slice": "{{ [1]|slice(10**9)|list }}",
    "replace": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "replace method": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace nothing": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "join": "{{ range(99999)|join('x' * 100000) }}",
    "join method": "{{ ('x' * 100000).join('a' * 100000) }}",
    "join of an iterator": "{{ ('x' * 100000).join(range(99999)|map('string')) }}",
    "join by attribute": "{{ ([{'a': 'x' * 100000}] * 9999)|join(attribute='a') }}",
    "format width": "{{ '%999999999d' % 1 }}",
    "format filter": "{{ '%999999999d'|format(1) }}",
    "format precision": "{{ '%.999999999f' % 1.5 }}",
    "format star": "{{ '%*d' % (999999999, 1) }}",
    "format name": "{{ '%(a(b)c)999999999d' % {'a(b)c': 1} }}",
    "many formats": "{{ ('%999d' * 9999) % ((1,) * 9999) }}",
    "format method": "{{ '{:999999999}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 999999999) }}",
    "json indent": "{{ [[[[[1]]]]]|tojson(indent=999999999) }}",
    "json text": "{{ ('\x01' * 260000)|tojson }}" * 9,
    "date": "{{ strftime_now('%999999999d') }}",
    "long date": "{{ strftime_now('%c' * 99999) }}",
    "round": "{{ 5|round(-999999999) }}",
    "split": "{% for i in range(999) %}{% set x = ('a,' * 100000).split(',') %}{% endfor %}",
    "rsplit": "{{ ('a' * 200000).rsplit('b' + 'a' * 100000) }}",
    "rfind": "{{ ('a' * 200000).rfind('b' + 'a' * 100000) }}",
    "strip": "{{ ('ab' * 100000).strip('bbbbbbbbb' * 10000 ~ 'a') }}",
    "list of text": "{% set x = namespace(l=[]) %}{% for i in range(999) %}{% set x.l = x.l + [('é' * 200000)|list] %}{% endfor %}",
    "many texts": "{% set x = namespace(l=[]) %}{% for i in range(99999) %}{% set x.l = x.l + ['a' * (100000 + i)] %}{% endfor %}",
    "slices": "{% set x = namespace(l=[]) %}{% for i in range(99999) %}{% set x.l = x.l + [('a' * 200000)[i:]] %}{% endfor %}",
    "unrolled copies": "{% set x = 'a' * 250000 %}" + "".join(f"{{% set x{i} = x ~ '{i}' %}}" for i in range(900)),
    "much text": "{% for i in range(99999) %}" + "x" * 60000 + "{% endfor %}",
    "much text kept": "{% set x %}{% for i in range(99999) %}" + "x" * 60000 + "{% endfor %}{% endset %}",
    "text in a macro": "{% macro m() %}{% for i in range(99999) %}" + "x" * 60000 + "{% endfor %}{% endmacro %}{{ m() }}",
    "filter block": "{% filter upper %}{% for i in range(99999) %}" + "x" * 60000 + "{% endfor %}{% endfilter %}",
    "wide letters": "{% for i in range(99999) %}" + "x" * 60000 + "{% endfor %}😀",
    "sort": "{% for i in range(99999) %}{% set x = range(99999)|sort(reverse=i % 2 == 0) %}{% endfor %}",
    "unique": "{% for i in range(99999) %}{% set x = range(99999)|unique|list %}{% endfor %}",
    "map of map": "{% set ns = namespace(v=range(9999)) %}{% for i in range(9999) %}{% set ns.v = ns.v|map('string') %}{% endfor %}",
    "select of select": "{% set ns = namespace(v=[1]) %}{% for i in range(99999) %}{% set ns.v = ns.v|select %}{% endfor %}{{ ns.v|list }}",
    "membership": "{% set l = range(99999)|list %}{% for i in range(99999) %}{% if 'x' in l %}{% endif %}{% endfor %}",
    "straight membership": "{% set l = range(99999)|list %}" + "{% if 'x' in l %}{% endif %}" * 900,
    "long search": f"{{% set s = {BIG} * 250 %}}" + "{% if 'ab' in s %}{% endif %}" * 900 + "{% for i in range(99999) %}{{ 'ab' in s }}{% endfor %}",
    "loop over text": "{% for i in 'a' * 250000 %}{% for j in 'a' * 250000 %}{% endfor %}{% endfor %}",
    "brackets": "{{ " + "(" * 30000 + ")" * 30000 + " }}",
    "lists": "{{ " + "[" * 30000 + "]" * 30000 + " }}",
    "not": "{{ " + "not " * 15000 + "1 }}",
    "minus": "{{ " + "-" * 60000 + "1 }}",
    "long sum": "{{ 1" + "+1" * 30000 + " }}",
    "long comparison": "{{ 1" + "<1" * 30000 + " }}",
    "long chain": "{{ a" + ".b" * 30000 + " }}",
    "filters": "{{ a" + "|e" * 30000 + " }}",
    "conditions": "{{ " + "1 if a else " * 5000 + "2 }}",
    "many variables": "".join(f"{{{{ a{i} }}}}" for i in range(6000)),
    "many ifs": "{% if a %}{% endif %}" * 3000,
    "deep ifs": "{% if messages %}" * 3000 + "{% endif %}" * 3000,
    "deep loops": "{% for i in messages %}" * 30 + "x" + "{% endfor %}" * 30,
    "many macros": "{% macro m() %}{% endmacro %}" * 2000,
    "open brackets": "{{" * 30000,
    "open quotes": "{{ " + "'" * 60001,
    "backslashes": "{{ '" + "\\" * 60001 + "' }}",
    "open comments": "{#" * 30000,
    "too long": "x" * 70000,
}  # fmt: skip


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


def test_a_template_can_refuse_a_conversation_in_one_line():
    with pytest.raises(TemplateRaised, match="^no system prompts$"):
        render("{{ raise_exception('no system\n prompts') }}")


def test_rendering_leaves_the_messages_alone():
    before = [dict(message) for message in MESSAGES]
    render("{% for m in messages %}{{ m.content|upper }}{% endfor %}")
    assert before == MESSAGES


def test_a_long_conversation_is_no_runaway():
    messages = [{"role": ("user", "assistant")[n % 2], "content": "word " * 400} for n in range(501)]
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'user' and loop.index0 < messages|length %}"
        "{% set ns.n = ns.n + 1 %}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content']|trim + '<|im_end|>' }}{% endfor %}"
    )
    size = sum(len(message["content"]) for message in messages)
    text = SandboxedTemplate(source).render({"messages": messages}, size)
    assert text.count("<|im_start|>") == 501
