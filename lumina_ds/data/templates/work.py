"""The jinja2 sandbox of chat templates, and a count of the work that one rendering does.

jinja2's own sandbox keeps a template from files and from Python, not from looping, computing or writing without end. Here
every step of a loop, every call, filter, comparison and joined text costs about what it takes, a unit being some ten
nanoseconds. What would make something large of small parts ('x' * 10**9) is priced before it happens. No clock is read:
a rendering ends in the same way on every machine.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView
from typing import Any

from jinja2 import nodes
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

MOST_WORK = 100_000_000
# Of a conversation's own characters: templates search, strip and copy each of them a few dozen times.
WORK_PER_CHARACTER = 200
_STEP, _CALL, _ITEM, _PLACE = 100, 1000, 100, 8
_MOST_BITS, _MOST_DIGITS = 10_000, 300

# Names that no template can write.
_STEPS, _WEIGHED, _GLANCED, _SEARCHED = "counted steps", "weighed value", "counted items", "searched value"
# Filters that look at the items of a list and not into them.
_SHALLOW = frozenset(
    [
        "attr",
        "batch",
        "count",
        "d",
        "default",
        "first",
        "items",
        "last",
        "length",
        "list",
        "map",
        "reject",
        "rejectattr",
        "reverse",
        "select",
        "selectattr",
        "slice",
    ]
)
# Of these the work, or what they make, grows with the product of what they get.
_PRODUCTS = frozenset(
    ["center", "expandtabs", "indent", "join", "ljust", "lstrip", "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "strip", "translate", "trim", "zfill"]
)  # fmt: skip
_SQUARES = frozenset({"pprint", "striptags", "urlize", "wordwrap"})
_MANY_PIECES = frozenset({"list", "split", "splitlines"})
_COMPARISONS = frozenset(
    [
        "!=",
        "<",
        "<=",
        "==",
        ">",
        ">=",
        "eq",
        "equalto",
        "ge",
        "greaterthan",
        "gt",
        "in",
        "le",
        "lessthan",
        "lower",
        "lt",
        "ne",
        "upper",
    ]
)
_WIDE_FIELD = re.compile(r"%[^%a-zA-Z]*\d{5}|\{[^{}]*:[^{}]*\d{5}")
_WIDTH_FROM_VALUE = re.compile(r"%[^%a-zA-Z]*\*|\{[^{}]*\{")
_LARGE = re.compile(r"\d{5}")


class TooMuchWork(Exception):
    """A template computes or writes more than a conversation can need."""


class Work:
    """What is left to a rendering; `spend` raises TooMuchWork where nothing is."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, num_characters: int) -> None:
        """A rendering of so many characters of messages and tools begins."""
        self.most = self.left = MOST_WORK + WORK_PER_CHARACTER * num_characters

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise TooMuchWork(f"does not end within {self.most:,} units of work; it loops, computes or writes too much")

    def steps(self, items: Iterable[Any]) -> Iterable[Any]:
        """`items`, each of which is paid when it is taken; len() where they have one."""
        return (_SizedSteps if hasattr(items, "__len__") else _Steps)(self, items)

    def weigh(self, value: Any) -> int:
        """Units for all that `value` holds, at every depth; they are spent. An iterator is paid by its own steps."""
        kind = type(value)
        if kind is str:
            size = len(value) + _ITEM
        elif value is None or kind is bool or kind is float:
            size = _ITEM
        elif isinstance(value, int):
            size = value.bit_length() // 8 + _ITEM
            if value.bit_length() > _MOST_BITS:
                raise TooMuchWork("computes with a number of thousands of digits")
        elif isinstance(value, range):
            size = _ITEM * len(value)
        elif isinstance(value, str | Mapping | MappingView | list | tuple | set | frozenset):
            return self._weigh_all(value)
        else:
            size = _CALL
        self.spend(size)
        return size

    def _weigh_all(self, value: Any) -> int:
        if isinstance(value, str):
            return self.weigh(str(value))
        parts = value if not isinstance(value, Mapping) else [part for pair in value.items() for part in pair]
        self.spend(_ITEM)
        return _ITEM + sum(map(self.weigh, parts))

    def glance(self, value: Any) -> int:
        """Units for the items of `value`, without what they hold; they are spent."""
        if isinstance(value, str) or not hasattr(value, "__len__"):
            return self.weigh(value)
        size = _PLACE * len(value) + 1
        self.spend(size)
        return size


class _Steps:
    """Not a generator: LoopContext and filters ask for no more than this."""

    def __init__(self, work: Work, items: Iterable[Any]) -> None:
        self._work, self._items = work, iter(items)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._work.spend(_STEP)
        return next(self._items)


class _SizedSteps:
    def __init__(self, work: Work, items: Any) -> None:
        self._work, self._items = work, items

    def __iter__(self) -> Iterator[Any]:
        return _Steps(self._work, self._items)

    def __len__(self) -> int:
        return len(self._items)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment; `lock` is held while one of its templates is rendered, and `work` begins anew."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        self.lock, self.work = threading.RLock(), Work()
        super().__init__(finalize=_finalized, **options)
        self.globals["namespace"] = _Namespace
        self.concat = self._concat  # type: ignore[method-assign, assignment]

    def count_all(self) -> None:
        """Let filters and tests spend too: those that are there, so call it when all are."""
        self.filters = {name: _priced(self, name, function) for name, function in self.filters.items()}
        tests: dict[str, Any] = self.tests
        tests |= {name: _priced(self, name, tests[name]) for name in _COMPARISONS}
        self.filters |= {_STEPS: self.work.steps, _SEARCHED: self._searched}
        self.filters |= {_WEIGHED: _after(self.work.weigh), _GLANCED: _after(self.work.glance)}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return template

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator of `intercepted_binops`, priced before where it may grow."""
        work = self.work
        if type(left) is str and type(right) is str and operator == "+":
            work.spend(len(left) + len(right))
        elif operator == "**":
            bits = left.bit_length() if isinstance(left, int) else 1
            if isinstance(right, int) and bits * abs(right) > _MOST_BITS:
                raise TooMuchWork("computes with a number of thousands of digits")
        elif operator == "%" and isinstance(left, str):
            self._before_format(left, [right])
        elif operator == "*" and not (isinstance(left, int) and isinstance(right, int)):
            for value, times in ((left, right), (right, left)):
                if hasattr(value, "__len__") and isinstance(times, int):
                    work.spend((1 if isinstance(value, str) else _PLACE) * len(value) * max(0, times))
        else:
            work.glance(left), work.glance(right)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int):
            work.weigh(result)
        return result

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call within a template: of a macro or a loop, or of a method, which is priced by what it gets."""
        work = __self.work
        work.spend(_CALL)
        if isinstance(__obj, LoopContext) and args:
            args = (work.steps(args[0]), *args[1:])
        elif not isinstance(__obj, Macro):
            args = tuple(list(work.steps(arg)) if hasattr(arg, "__next__") else arg for arg in args)
            owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
            __self.before(getattr(__obj, "__name__", ""), owner, [*args, *kwargs.values()])
        result = super().call(__context, __obj, *args, **kwargs)
        return __self.after(result)

    def before(self, name: str, value: Any, others: list[Any]) -> None:
        """Pay for `value.name(*others)`, or `value | name(*others)`."""
        work = self.work
        size = work.glance(value) if name in _SHALLOW or isinstance(value, Mapping) else work.weigh(value)
        weights = sum(map(work.weigh, others))
        if name in _PRODUCTS and others:
            widths = [abs(other) for other in others if isinstance(other, int)]
            places = size if isinstance(value, list | tuple) else _num_places(name, value, others)
            work.spend(places * (weights + sum(widths)))
        elif name in _SQUARES:
            work.spend(size * size)
        elif name in _MANY_PIECES and isinstance(value, str):
            work.spend(_ITEM * size)
        elif name in ("format", "format_map") and isinstance(value, str):
            self._before_format(value, others)
        elif name in ("batch", "slice"):
            work.spend(sum(_ITEM * abs(other) for other in others if isinstance(other, int)))
        elif name == "tojson" and others:
            work.spend(size * sum(map(_width, others)) * _depth(value) // _ITEM)
        elif name == "round" and any(isinstance(other, int) and abs(other) > _MOST_DIGITS for other in others):
            raise TooMuchWork("rounds to hundreds of digits")
        elif name == "sum" and any(hasattr(other, "__len__") and not isinstance(other, str) for other in others):
            raise TooMuchWork("adds lists up with the filter sum")

    def after(self, result: Any) -> Any:
        """Pay for what a call or a filter has made."""
        if isinstance(result, str | list | tuple | dict | int):
            self.work.glance(result)
        return result

    def _before_format(self, form: str, values: list[Any]) -> None:
        weight = sum(map(self.work.weigh, values))
        if _WIDE_FIELD.search(form) or (_WIDTH_FROM_VALUE.search(form) and _LARGE.search(str(values))):
            raise TooMuchWork("formats a text with a width of its own making")
        self.work.spend(len(form) + (form.count("%") + form.count("{")) * weight)

    def _concat(self, parts: Iterable[str]) -> str:
        spend, kept = self.work.spend, []
        for part in parts:
            spend(len(part) + 1)
            kept.append(part)
        return "".join(kept)

    def _searched(self, value: Any) -> Any:
        """What stands behind `in`."""
        if not hasattr(value, "__len__"):
            return self.work.steps(value) if hasattr(value, "__next__") else value
        if not isinstance(value, Mapping):
            self.work.weigh(value)
        return value


class _Counting(NodeTransformer):
    """Puts the filters that count into a template: around what it loops over, compares, joins, cuts and makes."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _STEPS)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, _WEIGHED)
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, _SEARCHED if operand.op in ("in", "notin") else _WEIGHED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        node.nodes = [_filtered(part, _WEIGHED) for part in node.nodes]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, _GLANCED) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return node if all(isinstance(item, nodes.Const) for item in node.items) else _filtered(node, _WEIGHED)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return node if node.ctx != "load" else _filtered(node, _WEIGHED)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, _WEIGHED)


class _Namespace(Namespace):
    """Values may be put into one when it is part of others: so what it holds is never written out."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _filtered(node: Any, name: str) -> Any:
    if isinstance(node, nodes.Const):
        return node
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _priced(environment: Sandbox, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that spends. jinja2 passes a context and the like before the value."""
    num_before = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def spending(*args: Any, **kwargs: Any) -> Any:
        environment.work.spend(_CALL)
        before, value, others = args[:num_before], args[num_before], args[num_before + 1 :]
        if hasattr(value, "__next__"):
            value = environment.work.steps(value)
            value = list(value) if name == "join" else value
        environment.before(name, value, [*others, *kwargs.values()])
        result = function(*before, value, *others, **kwargs)
        return environment.after(result)

    return spending


@pass_context
def _finalized(context: Any, value: Any) -> Any:
    """What {{ }} writes; the context keeps jinja2 from computing it when it compiles."""
    if type(value) is not str:
        context.environment.work.weigh(value)
    return value


def _num_places(name: str, value: Any, others: list[Any]) -> int:
    """How often what is given may stand in what is made of the text `value`."""
    text = str(value)
    if name == "expandtabs":
        return text.count("\t") + 1
    if name == "indent":
        return text.count("\n") + 1
    if name == "replace" and others and isinstance(others[0], str):
        return text.count(others[0]) + 1
    return 1 if name in ("center", "ljust", "rjust", "zfill") else len(text) + 1


def _after(pay: Callable[[Any], int]) -> Callable[[Any], Any]:
    def paid(value: Any) -> Any:
        pay(value)
        return value

    return paid


def _depth(value: Any) -> int:
    """How deep the lists and objects of `value` are nested."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return 1 + max(map(_depth, parts), default=0)


def _width(value: Any) -> int:
    if isinstance(value, int):
        return abs(value)
    return sum(map(len, value)) if isinstance(value, tuple | list) else len(value) if isinstance(value, str) else 0
