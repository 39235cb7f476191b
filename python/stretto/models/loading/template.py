"""Chat templates: Jinja programs that come with a model file, run as the hostile programs they may be.

The immutable sandbox keeps a template away from Python's internals, not from exhausting time and memory: ``x ~ x`` in a loop
doubles, a list of lists of lists prints exponentially, ``"%999999999d"`` allocates at once. So every value a template makes is
weighed when it is made (characters, elements and digits, counted with repetition), as is the sum of all values made, every loop turn
and call looks at a clock of the thread's own CPU time, all text written is counted, and the operations that multiply sizes check
before they run.
Behaviour for well-meant templates follows transformers: trim_blocks, lstrip_blocks, loop controls, ``raise_exception``,
``strftime_now``, ``tojson`` without escaping, ``{% generation %}`` as a no-op.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import do_round
from jinja2.lexer import Token
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from stretto.errors import ModelFileError

MAX_SOURCE_CHARS = 128 << 10  # the largest known template has about 20,000
MAX_CHARS = 1 << 20  # of any value, and of all text written; grows with the messages
MAX_ELEMENTS = 200_000
_MADE = 32  # times MAX_CHARS: characters of all values made together, since each may be kept under a name of its own
MAX_SECONDS = 0.25  # of the thread's CPU time; real templates take well below a millisecond
_MAX_BITS = 4096

_FILTERS = frozenset(
    [
        "abs",
        "attr",
        "capitalize",
        "count",
        "d",
        "default",
        "dictsort",
        "e",
        "escape",
        "first",
        "float",
        "forceescape",
        "groupby",
        "indent",
        "int",
        "items",
        "join",
        "last",
        "length",
        "list",
        "lower",
        "map",
        "max",
        "min",
        "reject",
        "rejectattr",
        "replace",
        "reverse",
        "round",
        "safe",
        "select",
        "selectattr",
        "sort",
        "string",
        "striptags",
        "sum",
        "title",
        "tojson",
        "trim",
        "truncate",
        "unique",
        "upper",
        "urlencode",
        "wordcount",
    ]
)
_STR_METHODS = frozenset(
    [
        "capitalize",
        "casefold",
        "count",
        "endswith",
        "find",
        "index",
        "isalnum",
        "isalpha",
        "isascii",
        "isdecimal",
        "isdigit",
        "isidentifier",
        "islower",
        "isnumeric",
        "isprintable",
        "isspace",
        "istitle",
        "isupper",
        "join",
        "lower",
        "lstrip",
        "partition",
        "removeprefix",
        "removesuffix",
        "replace",
        "rfind",
        "rindex",
        "rpartition",
        "rsplit",
        "rstrip",
        "split",
        "splitlines",
        "startswith",
        "strip",
        "swapcase",
        "title",
        "upper",
    ]
)
_METHODS: Mapping[type, frozenset[str]] = {
    str: _STR_METHODS, dict: frozenset({"get", "items", "keys", "values"}), list: frozenset({"index", "count"}),
    tuple: frozenset({"index", "count"}), int: frozenset(), float: frozenset(), bool: frozenset(), type(None): frozenset(),
}  # fmt: skip
_DATE_FORMAT = re.compile(r"(?:[^%]|%[-_0^#]?[A-Za-z%])*")  # no widths: %999999999Y allocates


class _Refused(SecurityError):
    """The template did something a chat template has no need for."""


class _Asked(TemplateError):
    """The template called raise_exception: the messages are at fault."""


class _Budget:
    def __init__(self, input_chars: int) -> None:
        self.max_chars = MAX_CHARS + 4 * input_chars
        self.written = self.made = 0
        self.deadline = time.thread_time() + MAX_SECONDS

    def tick(self) -> None:
        if time.thread_time() > self.deadline:
            raise _Refused(f"takes more than {MAX_SECONDS} s")

    def size(self, chars: int) -> None:
        if chars > self.max_chars:
            raise _Refused(f"makes a value of {chars} characters, more than {self.max_chars}")

    def weigh(self, value: Any) -> Any:
        """Refuse a value whose text would exceed the budget; returns it."""
        if isinstance(value, str):
            self.size(len(value))
        elif isinstance(value, list | tuple | dict | set | frozenset):
            self._weigh_container(value)
        elif isinstance(value, int):
            self.bits(value.bit_length())
        elif isinstance(value, Namespace):  # its text holds its attributes, which may be namespaces again
            raise _Refused("uses a namespace as a value")
        return value

    def bits(self, bits: int) -> None:
        if bits > _MAX_BITS:
            raise _Refused(f"makes an integer of more than {_MAX_BITS} bits")

    def make(self, value: Any) -> Any:
        """`weigh` a new value, and count it towards what all values may weigh together; returns it."""
        self.weigh(value)
        if isinstance(value, str):
            self.made += len(value)
        elif isinstance(value, list | tuple | dict | set | frozenset):
            self.made += self._weigh_container(value) + 16 * len(value)
        if self.made > _MADE * self.max_chars:
            raise _Refused(f"makes values of {self.made} characters together, more than {_MADE * self.max_chars}")
        return value

    def _weigh_container(self, value: Any) -> int:
        chars = elements = 0
        pending: list[Any] = [value]
        while pending:
            item = pending.pop()
            elements += 1
            if isinstance(item, str):
                chars += len(item)
            elif isinstance(item, dict):
                pending += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set | frozenset):
                pending += item
            elif isinstance(item, Namespace):
                raise _Refused("puts a namespace into a container")
            if elements + len(pending) > MAX_ELEMENTS:
                raise _Refused(f"makes a value of more than {MAX_ELEMENTS} elements")
        self.size(chars)
        return chars

    def write(self, value: Any) -> Any:
        self.tick()
        self.weigh(value)
        self.written += len(value) if isinstance(value, str) else 1
        if isinstance(value, list | tuple | dict | set | frozenset):
            self.written += self._weigh_container(value)
        self.size(self.written)
        return value


_budget: ContextVar[_Budget] = ContextVar("_budget")


class _Steps:
    """An iterable whose every turn looks at the clock. Keeps ``len`` for ``loop.length``."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Any]:
        budget = _budget.get()
        for value in self.values:
            budget.tick()
            yield value


class _Guard(NodeTransformer):
    """Routes loops, made values and constant text through the budget. The filter names cannot be written in a template."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "bounded loop", [], [], None, None, lineno=node.lineno)
        return node

    def _weighed(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # the target of an assignment
            return node
        return nodes.Filter(node, "bounded value", [], [], None, None, lineno=node.lineno)

    visit_Concat = visit_List = visit_Tuple = visit_Dict = _weighed

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Const:
        return nodes.Const(node.data, lineno=node.lineno)  # so that it passes through finalize as well


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's part for training; here its body is all that matters."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        token: Token = next(parser.stream)
        del token
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _replaced_chars(text: str, old: str, new: str) -> int:
    times = len(text) + 1 if not old else len(text) // len(old)
    return len(text) + times * len(new)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "+", "%", "//"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=_finalize, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        own: dict[str, Callable[..., Any]] = {
            "replace": _replace, "join": _join, "indent": _indent, "tojson": _tojson, "sum": _sum, "round": _round
        }  # fmt: skip
        kept = {name: own.get(name, self.filters.get(name)) for name in _FILTERS}
        self.filters = {name: _guarded(function) for name, function in kept.items() if function is not None}
        self.filters |= {"bounded loop": _Steps, "bounded value": lambda value: _budget.get().make(value)}
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = next((names for kind, names in _METHODS.items() if isinstance(obj, kind)), None)
        return super().is_safe_attribute(obj, attr, value) and (allowed is None or attr in allowed)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.tick()
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if name in ("format", "format_map"):
            raise _Refused("formats with str.format")
        if isinstance(owner, str) and name == "replace" and len(args) >= 2:
            budget.size(_replaced_chars(owner, *args[:2]))
        elif isinstance(owner, str) and name == "join" and args:
            parts = budget.weigh(list(args[0]))  # a generator has no length
            budget.size(len(owner) * len(parts))
            args = (parts, *args[1:])
        result = super().call(context, obj, *args, **kwargs)
        return result if isinstance(result, Namespace) else budget.make(result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        budget.tick()
        if operator == "%" and isinstance(left, str):
            raise _Refused("formats with %")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    budget.size(len(value) * max(times, 0))
        if isinstance(left, int) and isinstance(right, int):
            budget.bits(left.bit_length() * (max(right, 0) if operator == "**" else 1) + right.bit_length())
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, list | tuple):  # its parts were counted when they were made
            budget.made += 16 * len(result)
            return budget.weigh(result)
        return budget.make(result)


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps the mark that tells Jinja which first argument to pass
    def checked(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.tick()
        for value in args:
            budget.weigh(value)
        return budget.make(function(*args, **kwargs))

    return checked


@pass_context  # the mark also keeps the compiler from calling it while it compiles
def _finalize(context: Context, value: Any) -> Any:
    return _budget.get().write(value)


def _replace(value: Any, old: str, new: str, count: int = -1) -> str:
    text = str(value)
    _budget.get().size(_replaced_chars(text, old, new))
    replaced: str = text.replace(old, new, -1 if count is None else count)
    return replaced


def _join(values: Any, separator: str = "", attribute: str | int | None = None) -> str:
    parts = [str(value if attribute is None else _item(value, attribute)) for value in values]
    _budget.get().size(sum(map(len, parts)) + len(separator) * len(parts))
    return str(separator).join(parts)


def _sum(values: Any, attribute: str | int | None = None) -> int | float:
    total: int | float = 0
    for value in values:
        number = value if attribute is None else _item(value, attribute)
        if not isinstance(number, int | float):
            raise _Refused("sums what is no number")
        total += number
    return total


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    if abs(precision) > 30:
        raise _Refused(f"rounds to {precision} digits")
    rounded: float = do_round(value, precision, method)  # type: ignore[arg-type]  # refuses an unknown method itself
    return rounded


def _item(value: Any, name: str | int) -> Any:
    for part in str(name).split("."):
        key: Any = int(part) if part.isdigit() else part
        value = value[key] if isinstance(value, dict | list | tuple) else ""
    return value


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    margin = width[:64] if isinstance(width, str) else " " * min(max(width, 0), 64)
    text = str(text)
    _budget.get().size(len(text) + len(margin) * (text.count("\n") + 1))
    lines = text.split("\n")
    kept = [margin + line if (first or index > 0) and (line or blank) else line for index, line in enumerate(lines)]
    return "\n".join(kept)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None:
        if not 0 <= indent <= 16:
            raise _Refused(f"indents JSON by {indent}")
        _budget.get().size(indent * _levels(value))
    pair = None if separators is None else (str(separators[0])[:16], str(separators[1])[:16])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)


def _levels(value: Any) -> int:
    """Sum of the depths of all elements: what each step of indentation costs."""
    total, pending = 0, [(value, 0)]
    while pending:
        item, depth = pending.pop()
        total += depth
        if isinstance(item, list | tuple | dict):
            pending += [(inner, depth + 1) for inner in (item.values() if isinstance(item, dict) else item)]
    return total


def _raise_exception(message: object) -> None:
    raise _Asked(str(message)[:500])


def _strftime_now(layout: str) -> str:
    if not isinstance(layout, str) or len(layout) > 64 or not _DATE_FORMAT.fullmatch(layout):
        raise _Refused(f"asks for the date as {str(layout)[:80]!r}")
    return datetime.now().strftime(layout)


def _checked_messages(messages: object) -> tuple[list[dict[str, Any]], int]:
    """A plain copy of the messages and its characters. ValueError unless they are JSON-like objects with a role."""
    op = "apply_chat_template: messages"
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise ValueError(f"{op}: {type(messages).__name__} of no messages, expected a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{op}[{index}]: {type(message).__name__} without a role, expected {{'role': ..., 'content': ...}}")
    try:
        text = json.dumps(list(messages), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{op}: {error}, expected text, numbers, lists and objects only") from None
    copy: list[dict[str, Any]] = json.loads(text)
    return copy, len(text)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja source.
        where: named in messages, such as "model.gguf: tokenizer.chat_template".
        variables: further names the template sees, such as bos_token.
    Raises: ModelFileError if the source does not compile or is too long.
    """

    def __init__(self, source: str, where: str, variables: Mapping[str, str]) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise ModelFileError(f"{where}: {len(source)} characters, expected at most {MAX_SOURCE_CHARS}")
        self.where, self.variables = where, dict(variables)
        environment = _Environment()
        try:
            self._template = environment.from_string(_Guard().visit(environment.parse(source)))
        except Exception as error:  # it is a program: whatever it raises is its own fault
            raise ModelFileError(f"{where}: not a usable template: {str(error)[:200]}") from None

    def render(self, messages: object, *, add_generation_prompt: bool = True) -> str:
        """Text of the conversation.

        Raises: ValueError if the messages are malformed or the template refuses them, ModelFileError if the template is at fault.
        """
        copy, chars = _checked_messages(messages)
        token = _budget.set(_Budget(chars))
        try:
            return self._template.render(**self.variables, messages=copy, add_generation_prompt=add_generation_prompt, tools=None, documents=None)
        except _Asked as error:
            raise ValueError(f"apply_chat_template: messages: {error}") from None
        except Exception as error:  # as above
            raise ModelFileError(f"{self.where}: {type(error).__name__.strip('_')}: {str(error)[:200]}") from None
        finally:
            _budget.reset(token)
