# ruff: noqa: SIM905 - words in a string read better than a list of them
"""Random templates for the tests of the sandbox: every operation, method, filter and test on every kind of value."""

import random
from collections.abc import Iterator

from pocketlm.chat.operations import FILTERS, METHODS, TESTS

NAMES = "messages messages[0] x y ns ns.a loop self range dict namespace m caller nothing bos_token raise_exception m()".split()
VALUES = (
    "1 0 -1 2.5 'a' '' '%s%999d' '{0}' none true [1,2] [] {'a':1} (1,2) 10**9 99999 'a'*200000 'a,'*90000 [0]*90000 "
    "range(99999) 'x\\ny' '__class__'"
).split()
ATTRIBUTES = [name for methods in METHODS.values() for name in methods] + ["index", "length", "format", "__class__", "gi_frame"]
WORDS = [name for name in TESTS if name.isalpha()]
OPERATORS = "+ - * / // % ** ~ < == in and or".split()


def templates(seed: int, n: int) -> Iterator[str]:
    """`n` sources, the same for the same seed."""
    draw = random.Random(seed)

    def expression(depth: int) -> str:
        if depth <= 0:
            return draw.choice(NAMES + VALUES)
        inner, other = expression(depth - 1), expression(depth - 2)
        named = draw.choice(
            ["", other, f"attribute={other}", f"attribute='{draw.choice(ATTRIBUTES)}'", repr(draw.choice(WORDS))]
        )
        return draw.choice(
            [
                f"({inner} {draw.choice(OPERATORS)} {other})",
                f"({inner}|{draw.choice(list(FILTERS))}({named}))",
                f"({inner}|{draw.choice(list(FILTERS))}({other}, {named or 1}))",
                f"({inner}).{draw.choice(ATTRIBUTES)}({other})",
                f"({inner}).{draw.choice(ATTRIBUTES)}",
                f"({inner})[{other}]",
                f"({inner})[{other}:]",
                f"({inner} is {draw.choice(WORDS)})",
                f"[{inner}, {other}]",
                f"{{{inner}: {other}}}",
                f"({inner})({other})",
            ]
        )

    for _ in range(n):
        a, b, c = (expression(draw.randint(0, 2)) for _ in range(3))
        body = draw.choice(
            [
                f"{{{{ {a} }}}}{{{{ {b} }}}}",
                f"{{% set ns.a = {a} %}}{{{{ ns.a }}}}{{{{ ({b}) == ns.a }}}}",
                f"{{% for y in {a} %}}{{{{ {b} }}}}{{{{ loop.{draw.choice(ATTRIBUTES)} }}}}{{% endfor %}}",
                f"{{% set y | {draw.choice(list(FILTERS))} %}}{{{{ {a} }}}}{{% endset %}}{{{{ y }}}}",
                f"{{% macro m(x={a}) %}}{{{{ {b} }}}}{{% endmacro %}}{{{{ m({c}) }}}}",
                f"{{% if {a} %}}{{{{ {b} }}}}{{% else %}}{{{{ {c} }}}}{{% endif %}}",
            ]
        )
        yield "{% set ns = namespace(a=1, b='x') %}{% set x = 'q' %}" + body
