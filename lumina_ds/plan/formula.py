"""A formula of `lumina plan --explain`: its symbols, the same with a run's numbers, and the value that these give.

The value is worked out of the text that is shown, so that the two cannot differ.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"max": max, "round": round}


@dataclass(frozen=True)
class Formula:
    """`filled` is arithmetic of numbers with +, -, x, brackets, max and round."""

    symbols: str
    filled: str

    @property
    def value(self) -> int:
        """What `filled` gives. ValueError where it is no such arithmetic."""
        plain = re.sub(r"(?<=\d),(?=\d)", "", self.filled).replace(" x ", " * ")
        return int(_value(ast.parse(plain, mode="eval").body))


def number(value: int) -> str:
    """As formulas show numbers: 7,055,632,384."""
    return f"{value:,}"


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            return _OPERATORS[type(sign)](_value(left), _value(right))
        case ast.Call(func=ast.Name(id=name), args=arguments) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*map(_value, arguments))
    raise ValueError(f"{ast.unparse(node)} is no arithmetic of a formula")
