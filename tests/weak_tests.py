"""Finds tests that cannot fail, by their source: what they assert, and whether they assert at all."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

Function = ast.FunctionDef | ast.AsyncFunctionDef
# Calls that fail a test by themselves: pytest.raises, torch.testing.assert_close, subprocess.run(check=True), ...
FAILING_CALLS = {"raises", "fail", "warns", "check_call", "check_output", "validate"}


def functions(module: ast.Module) -> dict[str, Function]:
    """Functions of a module and of its classes by name; what stands inside a function is no test of its own."""
    found: dict[str, Function] = {}
    for node in module.body:
        for each in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(each, Function):
                found[each.name] = each
    return found


def find_tests(module: ast.Module) -> Iterator[Function]:
    return (function for name, function in functions(module).items() if name.startswith("test"))


def can_fail(function: Function, helpers: Mapping[str, Function], seen: frozenset[str] = frozenset()) -> bool:
    """Whether the function asserts, or one of the helpers and fixtures of its module that it uses does."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert | ast.Raise) or (isinstance(node, ast.Call) and _fails_by_itself(node)):
            return True
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    names |= {argument.arg for argument in function.args.args}
    return any(can_fail(helpers[name], helpers, seen | names) for name in names - seen if name in helpers)


def _fails_by_itself(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    checked = any(word.arg == "check" and getattr(word.value, "value", False) is True for word in call.keywords)
    return name in FAILING_CALLS or name.startswith(("assert_", "check_")) or checked


def idle_assertions(function: Function) -> list[str]:
    """Assertions that hold whatever the code does: of a constant, of a tuple, `or True`, a name against itself."""
    asserted = [node.test for node in ast.walk(function) if isinstance(node, ast.Assert)]
    return [ast.unparse(test) for test in asserted if _is_idle(test)]


def _is_idle(test: ast.expr) -> bool:
    if isinstance(test, ast.Constant | ast.JoinedStr | ast.Lambda | ast.GeneratorExp):
        return True
    if isinstance(test, ast.Tuple | ast.List | ast.Dict):
        return True
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or):
        return any(_is_idle(each) for each in test.values)
    if isinstance(test, ast.Compare):
        sides = [test.left, *test.comparators]
        # Two calls may differ; two equal names, attributes or elements cannot.
        calls = any(isinstance(node, ast.Call) for node in ast.walk(test))
        return not calls and len({ast.dump(side) for side in sides}) < len(sides)
    return False
