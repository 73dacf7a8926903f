"""Run untrusted chat templates in Jinja's sandbox, with bounds on work and size."""

import contextlib
import contextvars
import datetime
import json
import math
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from importlib.metadata import version
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

if tuple(map(int, re.findall(r"\d+", version("jinja2"))[:3])) < (3, 1, 6):
    raise ImportError(
        f"chat templates need jinja2 3.1.6 or newer, because older versions have sandbox escapes, got {version('jinja2')}: "
        "upgrade it with pip install -U jinja2"
    )

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from effscale.rlhf.data.chat.errors import TemplateError

WORK = 2_000_000
"""Work limit of one rendering: one unit is a loop iteration, an element, or 16 characters."""

CALL = 4
"""Additional cost of a call."""

WIDTH = 10_000
"""The largest allowed width of a text or count of repetitions."""

BITS = 4096
"""The largest allowed size of an integer, in bits."""

GROWING = frozenset(
    (
        "center",
        "expandtabs",
        "format",
        "format_map",
        "indent",
        "join",
        "ljust",
        "replace",
        "rjust",
        "wordwrap",
        "xmlattr",
        "zfill",
    )
)
"""Filters and methods whose output can be as long as the product of their inputs."""

_work: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("work", default=None)
# A width in a format string, in either of Python's notations.
_WIDE = re.compile(r"\d{5,}|%[^a-zA-Z%]*\*")


class SandboxError(jinja2.exceptions.SecurityError):
    """A template reaches outside its sandbox or does too much work."""


@contextlib.contextmanager
def bounded() -> Generator[None]:
    """Context with the work budget of one rendering."""
    token = _work.set([WORK])
    try:
        yield
    finally:
        _work.reset(token)


def spend(units: int) -> None:
    """Count work.

    Raises:
        SandboxError: The limit is exceeded.
    """
    left = _work.get()
    if left is None:  # a constant of the template, during compilation
        left = [WORK]
    left[0] -= units
    if left[0] < 0:
        raise SandboxError(f"it exceeds {WORK:,} loop iterations, calls and elements")


def measured(value: Any) -> Any:
    """Return the value after counting its elements, recursively."""
    if isinstance(value, str | bytes):
        spend(1 + len(value) // 16)
    elif isinstance(value, bool) or value is None:
        spend(1)
    elif isinstance(value, int):
        if value.bit_length() > BITS:
            raise SandboxError(f"an integer of {value.bit_length()} bits")
        spend(1)
    elif isinstance(value, dict):
        spend(1)
        for item in value.items():
            measured(item)
    elif isinstance(value, list | tuple | set | frozenset):
        spend(1)
        for item in value:
            measured(item)
    else:
        spend(1)
    return value


def counted(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the same values and count each; loops of templates iterate over this."""
    for value in values:
        spend(1)
        yield value


def joined(values: Iterable[Any]) -> str:
    """Implement the operator ``~``."""
    return measured("".join(str(measured(value)) for value in values))


def _before(name: str, values: list[Any]) -> None:
    """Count the inputs of a filter or method, and the possible output if that can be large."""
    measured(values)
    if name in GROWING:
        spend(math.prod(map(_extent, values)) // 16)
    if name in ("format", "format_map"):
        _check_format(values[0])


def _extent(value: Any) -> int:
    if isinstance(value, int):
        return max(1, abs(value))
    return max(1, len(value)) if hasattr(value, "__len__") else 1


def _check_widths(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > WIDTH:
            raise SandboxError(f"a width or count of {measured(value):,} (at most {WIDTH:,})")


def _check_format(text: Any) -> None:
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    if isinstance(text, str) and _WIDE.search(text):
        raise SandboxError(f"a width in the format {text[:60]!r}")


class _Counting(NodeTransformer):
    """Routes loops and the operator ``~`` through ``counted`` and ``joined``, and all output through ``finalize``."""

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Const:
        return nodes.Const(node.data, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = self._through("_counted", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return self._through("_joined", nodes.List(node.nodes, lineno=node.lineno))

    def _through(self, name: str, node: Any) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Generation(jinja2.ext.Extension):
    """The tag ``generation``, with which templates mark the model's output; it renders as its content."""

    tags = {"generation"}  # noqa: RUF012 - as in Jinja

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment in which transformers renders chat templates, with limits, and with errors instead of silent
    failures.

    A template can access only the text it is given: no Python attributes, no files, no imports. All its work is
    counted, so every template terminates. The limit is a count and not a time, so it is the same on every machine.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=_written,
        )
        self.filters = {name: _bounded_filter(name, f) for name, f in self.filters.items()}
        self.filters |= {"tojson": _bounded_filter("tojson", _tojson)}
        self.filters |= {"_counted": counted, "_joined": joined}
        names: dict[str, Any] = dict(self.globals)
        del names["lipsum"]
        self.globals = names | {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counting().visit(super()._parse(source, name, filename))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Raise for an attribute that templates cannot access; Jinja's default is silent until it is used."""
        raise SandboxError(f"the attribute {attribute!r} of a {type(obj).__name__}")

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Count every call that a template makes."""
        spend(CALL)
        given = [*args, *kwargs.values()]
        if isinstance(called, jinja2.runtime.Macro):
            measured(given)
        else:
            _check_widths(given)
            # The sandbox wraps str.format.
            method = getattr(called, "__wrapped__", called)
            _before(getattr(method, "__name__", ""), [getattr(method, "__self__", None), *given])
        return measured(super().call(context, called, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Count every operation whose result can be much larger than its operands."""
        measured([left, right])
        if operator == "*":
            if not (isinstance(left, int) and isinstance(right, int)):
                spend(_extent(left) * _extent(right))
        elif operator == "**":
            numbers = isinstance(left, int) and isinstance(right, int)
            if numbers and left.bit_length() * right > BITS:
                raise SandboxError(f"an integer of more than {BITS} bits")
        elif operator == "%" and isinstance(left, str | bytes):
            _before("format", [left, right])
        return measured(super().call_binop(context, operator, left, right))


@jinja2.pass_context
def _written(context: Any, value: Any) -> Any:
    # With the context, so that Jinja does not evaluate it for constants at compile time.
    del context
    return measured(value)


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = int(
        hasattr(function, "jinja_pass_arg")
    )  # the first argument is the context or the environment

    def run(*args: Any, **kwargs: Any) -> Any:
        given = [*args[passed:], *kwargs.values()]
        if name in GROWING and given and isinstance(given[0], Iterator):
            given[0] = list(counted(given[0]))
            args = (*args[:passed], given[0], *args[passed + 1 :])
        _check_widths(given[1:])
        _before(name, given)
        return measured(function(*args, **kwargs))

    if passed:
        run.jinja_pass_arg = function.jinja_pass_arg  # pyrefly: ignore[missing-attribute]
    return run


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(f"the chat template rejects these messages: {message}")


def _strftime_now(form: str) -> str:
    _check_format(form)
    return datetime.datetime.now().strftime(form)
