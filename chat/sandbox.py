"""Chat templates that arrive with a model: Jinja programs of strangers, rendered where they can do no harm.

In: the source of a template, then conversations. Out: the text, equal to what plain Jinja renders, or a
`TemplateError` of one line. Jinja's immutable sandbox forbids what is known to be dangerous; this one permits only
what chat templates need: a list of syntax nodes, and the tables of `operations`. Every loop step, operator, call and
printed value goes through the `Budget` of the rendering, so a template can neither run nor grow without end.
Knows no tokenizer and no roles.
"""

from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import nodes
from jinja2.environment import Template
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.runtime import Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context

from pocketlm import locks
from pocketlm.chat.budget import Budget, TemplateError
from pocketlm.chat.operations import FIELDS, FILTERS, FUNCTIONS, METHODS, OPERATORS, TESTS, Method

# Within these, compiling takes less than a quarter of a second. Published templates have a token per 3 to 7 characters,
# and up to some 17,000 characters.
SOURCE_LIMIT = 64 * 1024
TOKEN_LIMIT = 8_000
SYNTAX_DEPTH = 60

# ---- the program: what may stand in it, and where it is metered ------------------------------------------------------


class ChatSyntax(Extension):
    """`{% generation %}…{% endgeneration %}` marks an answer for trainers; for us only its contents count."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def filter_stream(self, stream: Any) -> Iterator[Any]:
        """Jinja's hook for the tokens on their way to the parser. Raises TemplateError for more than TOKEN_LIMIT."""
        for n, token in enumerate(stream):
            if n == TOKEN_LIMIT:
                raise TemplateError("it is too large a program")
            yield token

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


_PERMITTED = frozenset(
    {
        nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Assign, nodes.AssignBlock, nodes.Macro,
        nodes.CallBlock, nodes.FilterBlock, nodes.With, nodes.Scope, nodes.Break, nodes.Continue, nodes.NSRef, nodes.Name,
        nodes.Const, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.CondExpr, nodes.Filter, nodes.Test,
        nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice, nodes.Concat, nodes.Compare, nodes.Operand, nodes.And, nodes.Or,
        nodes.Not, nodes.Neg, nodes.Pos, nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow,
    }
)  # fmt: skip


def _through(name: str, value: nodes.Node, *arguments: nodes.Expr) -> nodes.Filter:
    """`value` piped through one of the filters of _PLACES, whose names no template can spell."""
    return nodes.Filter(value, name, list(arguments), [], None, None, lineno=value.lineno)


def _slice(node: nodes.Getitem) -> nodes.Node:
    if not isinstance(node.arg, nodes.Slice):
        return node
    bounds = [part or nodes.Const(None) for part in (node.arg.start, node.arg.stop, node.arg.step)]
    return _through(" slice", node.node, *bounds)


def _loop(node: nodes.For) -> nodes.Node:
    if node.recursive:
        raise TemplateError("it uses a recursive loop")
    node.iter = _through(" each", node.iter)
    return node


def _compare(node: nodes.Compare) -> nodes.Node:
    node.expr = _through(" tick", node.expr)
    return node


def _constant(node: nodes.Const) -> nodes.Node:
    Budget().admit(node.value)
    return node


def _block(node: Any) -> nodes.Node:
    """Pass the text that a block gathers through ` admit`, like any other value, before the block's filters."""
    text = nodes.Filter(None, " admit", [], [], None, None, lineno=node.lineno)
    if node.filter is None:
        node.filter = text
        return node
    innermost = node.filter
    while innermost.node is not None:
        innermost = innermost.node
    innermost.node = text
    return node


_REWRITE: dict[type, Callable[[Any], nodes.Node]] = {
    nodes.TemplateData: lambda node: nodes.Const(node.data, lineno=node.lineno),  # printed as a value, so it is counted
    nodes.Concat: lambda node: _through(" concat", nodes.List(node.nodes, lineno=node.lineno)),
    nodes.List: lambda node: _through(" admit", node),
    nodes.Dict: lambda node: _through(" admit", node),
    nodes.Tuple: lambda node: _through(" admit", node) if node.ctx == "load" else node,
    nodes.Getitem: _slice,
    nodes.For: _loop,
    nodes.AssignBlock: _block,
    nodes.FilterBlock: _block,
    nodes.Compare: _compare,
    nodes.Const: _constant,
}


def _rewrite(node: Any, depth: int = 0) -> Any:
    if type(node) not in _PERMITTED:
        raise TemplateError(f"it uses '{type(node).__name__.lower()}', which is not for chat templates")
    if depth > SYNTAX_DEPTH:
        raise TemplateError("it is nested too deeply")
    for field, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_rewrite(part, depth + 1) if isinstance(part, nodes.Node) else part for part in value]
        elif isinstance(value, nodes.Node):
            setattr(node, field, _rewrite(value, depth + 1))
    return _REWRITE.get(type(node), lambda same: same)(node)


# ---- the rewritten places at run time ------------------------------------------------------------------------------------


class _Each:
    """The values of a `for`, each step counted. It has a length if the values have one, for `loop.length`."""

    def __init__(self, budget: Budget, values: Any):
        if type(values) not in (str, list, tuple, dict, range, Undefined, type(iter([]))):
            raise TemplateError(f"it loops over an object of type {type(values).__name__}")
        self._budget, self._values = budget, values

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            self._budget.tick()
            yield value

    def __len__(self) -> int:
        return len(self._values)


@pass_context
def _concat(context: Any, values: list[Any]) -> str:
    budget: Budget = context.environment.budget
    texts = [budget.text(value) for value in values]
    budget.check_text(sum(map(len, texts)))
    return budget.admit("".join(texts))


@pass_context
def _cut(context: Any, value: Any, start: Any, stop: Any, step: Any) -> Any:
    if type(value) not in (str, list, tuple, range):
        raise TemplateError(f"it cuts a piece from a value of type {type(value).__name__}")
    context.environment.budget.tick()
    return context.environment.budget.admit(value[start:stop:step])


@pass_context
def _tick(context: Any, value: Any) -> Any:
    context.environment.budget.tick()
    return value


_PLACES: dict[str, Callable[..., Any]] = {
    " concat": _concat,
    " slice": _cut,
    " tick": _tick,
    " admit": pass_context(lambda context, value: context.environment.budget.admit(_tick(context, value))),
    " each": pass_context(lambda context, values: _Each(context.environment.budget, values)),
}


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, reduced to what is in the tables. For one rendering at a time."""

    intercepted_binops = frozenset(OPERATORS)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # the optimizer would compute constant expressions while compiling, outside any budget
            finalize=pass_context(lambda context, value: context.environment.budget.text(value)),
            extensions=[LoopControlExtension, ChatSyntax],
        )
        self.budget = Budget()
        self.filters = {**FILTERS, **_PLACES}
        self.tests = dict(TESTS)
        self.globals = dict(FUNCTIONS)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.tick()
        return self.budget.admit(OPERATORS[operator](self.budget, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.name`: a method or field of the tables, or the item of that name."""
        self.budget.tick()
        kind = type(obj)
        if attribute.startswith("_"):
            raise _refusal(obj, attribute)
        if kind is Undefined:
            return getattr(obj, attribute)  # raises Jinja's error, which says what was undefined
        if attribute in METHODS.get(kind, ()):
            return Method(obj, attribute)
        if attribute in FIELDS.get(kind, ()):
            return getattr(obj, attribute)
        if kind is Namespace:
            return getattr(obj, attribute, self.undefined(obj=obj, name=attribute))
        if kind is dict and attribute in obj:
            return obj[attribute]
        if kind in (str, list, tuple, dict, int, float, bool, type(None)) and not hasattr(kind, attribute):
            return self.undefined(obj=obj, name=attribute)
        raise _refusal(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`: an item, or else the attribute of that name."""
        self.budget.tick()
        self.budget.weigh(argument)
        if type(obj) in (str, list, tuple, dict, range):
            try:
                return obj[argument]
            except (TypeError, LookupError):
                pass
        return self.getattr(obj, argument) if type(argument) is str else self.undefined(obj=obj, name=argument)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A call in the template: of a macro, a method or a function of the tables."""
        self.budget.tick()
        given = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
        if type(obj) is Method:
            return obj.call(self.budget, args, given)
        if type(obj) is Macro:
            if obj.catch_varargs or obj.catch_kwargs:
                self.budget.weigh([*args, *(value for name, value in given.items() if name != "caller")])
            self.budget.enter()
            try:
                return self.budget.admit(context.call(obj, *args, **given))
            finally:
                self.budget.depth -= 1
        if any(obj is function for function in FUNCTIONS.values()):
            return self.budget.admit(obj(*args, **given))
        if type(obj) is Undefined:
            return obj()  # raises Jinja's error, which says what was undefined
        raise TemplateError(f"it calls an object of type {type(obj).__name__}")


def _refusal(obj: Any, attribute: str) -> TemplateError:
    return TemplateError(f"it asks for '{attribute[:40]}' of an object of type {type(obj).__name__}")


# ---- the face --------------------------------------------------------------------------------------------------------------


class SandboxedTemplate:
    """A compiled template. Raises TemplateError, from here and from `render`, and nothing else."""

    def __init__(self, source: str):
        if len(source) > SOURCE_LIMIT:
            raise TemplateError(f"it is longer than {SOURCE_LIMIT} characters")
        self._lock = locks.ForkedLock()
        self._environment = ChatEnvironment()
        self._template = _guarded(self._compile, source)

    def _compile(self, source: str) -> Template:
        code = self._environment.compile(_rewrite(self._environment.parse(source)))
        return Template.from_code(self._environment, code, self._environment.globals)

    def render(self, variables: dict[str, Any], input_chars: int) -> str:
        """The text for these variables, which hold plain data only; `input_chars` is the conversation's length."""
        with self._lock.here:
            self._environment.budget = Budget(input_chars)
            context = self._template.new_context(variables)
            return _guarded("".join, self._template.root_render_func(context))


def _guarded(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work`, and turn whatever it raises into a TemplateError of one line: a template is a stranger's program."""
    try:
        return work(*arguments)
    except TemplateError:
        raise
    except JinjaError as error:
        problem = error.message or type(error).__name__
    except RecursionError:
        problem = "it is nested too deeply"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    raise TemplateError(" ".join(problem.split())[:200]) from None
