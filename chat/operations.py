"""The operations a chat template may use: operators, methods, filters, tests and functions, each a row of a table.

In: values of the rendering and its `Budget`. Out: values that the budget has admitted. What is not in a table does
not exist for a template; a row whose result can be large has a guard, which computes the size beforehand.
Filters and tests compute with Jinja's own functions, so their results are Jinja's.
"""

import json
import operator
import os
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.filters import make_attrgetter
from jinja2.runtime import LoopContext, Undefined
from jinja2.tests import TESTS as JINJA_TESTS
from jinja2.utils import Namespace, pass_context

from pocketlm.chat.budget import Budget, TemplateError, TemplateRaised

Guard = Callable[..., None]

MAX_RANGE = 100_000
SHORT = 256  # characters that an argument may have where the time grows with text × argument

# ---- guards: (budget, the method's or filter's own arguments) --------------------------------------------------------


def _short_argument(budget: Budget, text: str, *arguments: Any, **named: Any) -> None:
    for argument in (*arguments, *named.values()):
        if isinstance(argument, str) and len(argument) > SHORT:
            raise TemplateError("it searches for a text that is too long")


def _replace(budget: Budget, text: str, old: Any = "", new: Any = "", count: Any = -1) -> None:
    if type(old) is not str or type(new) is not str:  # the filter would make texts of them
        raise TemplateError("it replaces something that is no text")
    budget.check_text(len(text) + text.count(old) * len(new))


def _join(budget: Budget, values: Any, separator: Any = "") -> None:
    n_values = len(values) if isinstance(values, (str, list, tuple, dict, range)) else 0
    budget.check_text(budget.weigh(values) + n_values * (len(budget.text(separator)) + 20))


def _indent(budget: Budget, text: str, width: Any = 4, first: Any = False, blank: Any = False) -> None:
    step = len(width) if isinstance(width, str) else width
    if not isinstance(step, int) or step > SHORT:
        raise TemplateError("it indents by too much")
    budget.check_text(len(text) + (len(text.splitlines()) + 1) * step)


_DIRECTIVE = re.compile(r"%(?:%|[#0 +-]{0,5}\d{0,3}(?:\.\d{0,3})?[sdifgeXxrc])")


def _percent(budget: Budget, text: str, *arguments: Any, **named: Any) -> None:
    """`%` and `format` with plain directives only: no names, no `*`, widths below 1000."""
    if named or "%" in _DIRECTIVE.sub("", text):
        raise TemplateError("it formats with a directive that is not for templates")
    budget.check_text(len(text) + 999 * len(_DIRECTIVE.findall(text)) + budget.weigh(arguments))


def _number(budget: Budget, value: Any, *arguments: Any) -> None:
    """Guard of the tests that compute `%`, which would format a text."""
    if not isinstance(value, (int, float)):
        raise TemplateError("it asks of something that is no number whether it is even")


def _number_text(budget: Budget, value: Any, *arguments: Any, **named: Any) -> None:
    if isinstance(value, str) and len(value) > SHORT:
        raise TemplateError("it reads a number that is too long")


# ---- methods of plain values ------------------------------------------------------------------------------------------

METHODS: dict[type, dict[str, Guard | None]] = {
    str: {
        **dict.fromkeys(
            ("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal",
             "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "lower", "partition", "removeprefix",
             "removesuffix", "split", "splitlines", "startswith", "swapcase", "title", "upper")
        ),
        **dict.fromkeys(("lstrip", "rstrip", "strip", "rfind", "rindex", "rsplit", "rpartition"), _short_argument),
        "replace": _replace,
        "join": lambda budget, separator, values=(): _join(budget, values, separator),
    },
    dict: dict.fromkeys(("get", "items", "keys", "values", "copy")),
    list: dict.fromkeys(("count", "index", "copy")),
    tuple: dict.fromkeys(("count", "index")),
    LoopContext: dict.fromkeys(("cycle", "changed")),
}  # fmt: skip

FIELDS: dict[type, frozenset[str]] = {
    LoopContext: frozenset(
        ("index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0", "previtem", "nextitem")
    ),
}


class Method:
    """A bound method: what `text.strip` is before it is called."""

    __slots__ = ("_function", "_guard", "_value")

    def __init__(self, value: Any, name: str):
        self._value, self._function, self._guard = value, getattr(value, name), METHODS[type(value)][name]

    def call(self, budget: Budget, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args = tuple(map(_run_out, args))
        budget.weigh([*args, *kwargs.values()])
        if self._guard:
            self._guard(budget, self._value, *args, **kwargs)
        return settle(budget, self._function(*args, **kwargs))


def _run_out(value: Any) -> Any:
    """The rest of an iterator as a list, so that it can be measured; other values unchanged."""
    return list(value) if type(value) is type(iter([])) else value


def settle(budget: Budget, result: Any) -> Any:
    """A result as the template gets it, admitted by the budget. Iterators are run to their end here, to count every step."""
    if isinstance(result, (type({}.keys()), type({}.values()), type({}.items()))):
        return budget.admit(list(result))
    if hasattr(result, "__next__"):
        found = []
        for value in result:
            budget.tick()
            budget.charge(8)
            found.append(value)
        return iter(budget.admit(found))  # still used up by one pass and true when empty, as the lazy one is
    return budget.admit(result)


# ---- operators -----------------------------------------------------------------------------------------------------------


def _power(budget: Budget, base: Any, exponent: Any) -> Any:
    if not (isinstance(exponent, (int, float)) and abs(exponent) <= 64 and isinstance(base, (int, float))):
        raise TemplateError("it raises to a power that is too large")
    return base**exponent


def _add(budget: Budget, left: Any, right: Any) -> Any:
    both = (left, right)
    if all(isinstance(value, (str, list, tuple)) for value in both):
        budget.check_text(sum(map(len, both)))
    return left + right


def _multiply(budget: Budget, left: Any, right: Any) -> Any:
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
            budget.check_text(len(sequence) * max(times, 0))
    return left * right


def _modulo(budget: Budget, left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _percent(budget, left, right)
    return left % right


OPERATORS: dict[str, Callable[[Budget, Any, Any], Any]] = {
    "+": _add,
    "-": lambda budget, left, right: operator.sub(left, right),
    "*": _multiply,
    "/": lambda budget, left, right: operator.truediv(left, right),
    "//": lambda budget, left, right: operator.floordiv(left, right),
    "%": _modulo,
    "**": _power,
}

# ---- functions ------------------------------------------------------------------------------------------------------------


def _range(*limits: int) -> range:
    numbers = range(*limits)
    if len(numbers) > MAX_RANGE:
        raise TemplateError(f"it counts further than {MAX_RANGE}")
    return numbers


def _raise_exception(message: str = "") -> None:
    raise TemplateRaised(" ".join(str(message)[:200].split()) if isinstance(message, str) else "no reason given")


def _strftime_now(form: str) -> str:
    if not isinstance(form, str) or len(form) > SHORT or "%" in re.sub(r"%-?[A-Za-z%]", "", form):
        raise TemplateError("it asks for the date in a form that is not for templates")
    return datetime.now().strftime(form.replace("%-", "%#") if os.name == "nt" else form)  # a day without its zero


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "range": _range,
    "namespace": Namespace,
    "dict": dict,
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}

# ---- filters and tests ------------------------------------------------------------------------------------------------

# Every name has two columns: whether the filter turns its value into text first, and its guard.
_FILTERS: dict[str, tuple[bool, Guard | None]] = {
    **dict.fromkeys(("upper", "lower", "capitalize", "title", "string"), (True, None)),
    **dict.fromkeys(("float", "int"), (False, _number_text)),
    **dict.fromkeys(
        ("count", "d", "default", "dictsort", "first", "items", "last", "length", "list", "map", "reject", "rejectattr",
         "reverse", "select", "selectattr", "sort", "unique"),
        (False, None),
    ),
    "trim": (True, _short_argument),
    "replace": (True, _replace),
    "indent": (True, _indent),
    "format": (True, _percent),
}  # fmt: skip

_TESTS: dict[str, Guard | None] = {
    **dict.fromkeys(
        ("boolean", "callable", "defined", "eq", "equalto", "false", "float", "ge", "greaterthan", "gt", "in", "integer",
         "iterable", "le", "lessthan", "lt", "mapping", "ne", "none", "number", "sameas", "sequence", "string", "true",
         "undefined", "==", "!=", ">", ">=", "<", "<=")
    ),
    **dict.fromkeys(("divisibleby", "even", "odd"), _number),
    **dict.fromkeys(("lower", "upper"), lambda budget, value: budget.text(value)),
}  # fmt: skip


def _passed(function: Any, context: Any) -> tuple[Any, ...]:
    """The arguments that Jinja passes to this filter or test before its value."""
    wanted = getattr(function, "jinja_pass_arg", None)
    return {"context": (context,), "eval_context": (context.eval_ctx,), "environment": (context.environment,)}.get(
        getattr(wanted, "name", ""), ()
    )


def _filter(name: str, textual: bool, guard: Guard | None) -> Callable[..., Any]:
    function = JINJA_FILTERS[name]

    @pass_context  # also keeps Jinja from computing it while compiling, outside any budget
    def guarded(context: Any, value: Any = None, *args: Any, **kwargs: Any) -> Any:
        budget = context.environment.budget
        budget.tick()
        if textual:
            value = budget.text(value)
        if name != "first":  # which takes no more than one
            value = _run_out(value)
        budget.weigh([*args, *kwargs.values()])
        if guard:
            guard(budget, value, *args, **kwargs)
        return settle(budget, function(*_passed(function, context), value, *args, **kwargs))

    return guarded


def _test(name: str, guard: Guard | None) -> Callable[..., Any]:
    function = JINJA_TESTS[name]

    @pass_context
    def counted(context: Any, value: Any = None, *args: Any, **kwargs: Any) -> Any:
        budget = context.environment.budget
        budget.tick()
        if guard:
            guard(budget, value, *args, **kwargs)
        return function(*_passed(function, context), value, *args, **kwargs)

    return counted


@pass_context
def _join_filter(context: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
    """Jinja's `join`; attributes are fetched first, so that what they give is measured before it becomes text."""
    budget: Budget = context.environment.budget
    values = _run_out(value) if attribute is None else list(map(make_attrgetter(context.environment, attribute), value))
    _join(budget, values, d)
    return budget.admit(budget.text(d).join(map(str, values)))


@pass_context
def _safe(context: Any, value: Any) -> str:
    """Jinja's `safe`: as nothing is escaped here, it only makes a text of the value."""
    return context.environment.budget.text(value)


@pass_context
def _tojson(
    context: Any,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates expect it: not escaped for HTML, letters of all languages as they are."""
    budget: Budget = context.environment.budget
    if isinstance(value, Undefined) or not (indent is None or (isinstance(indent, int) and 0 <= indent <= 16)):
        raise TemplateError("it asks for JSON of an undefined value or with a strange indent")
    for separator in separators or ():
        _short_argument(budget, "", separator)
    budget.charge(budget.weigh(value) * (8 + (indent or 0)))
    return budget.admit(json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys))


FILTERS: dict[str, Callable[..., Any]] = {
    **{name: _filter(name, *row) for name, row in _FILTERS.items()},
    "join": _join_filter,
    "safe": _safe,
    "tojson": _tojson,
}
TESTS: dict[str, Callable[..., Any]] = {name: _test(name, guard) for name, guard in _TESTS.items()}
