"""Every row of the matrix of 38 faults has a test that carries its number, that pytest collects, and that can fail."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from weak_tests import Function, can_fail, find_tests, functions

HERE = Path(__file__).parent
NUM_ROWS = 38
NUMBERED = re.compile(r"test_rows?_((?:\d+_(?:and_)?)+)")


def rows_of(name: str) -> set[int]:
    found = NUMBERED.match(name)
    return {int(number) for number in re.findall(r"\d+", found[1])} if found else set()


def numbered(path: Path) -> Iterator[tuple[Function, ast.Module]]:
    module = ast.parse(path.read_text(encoding="utf-8"))
    return ((function, module) for function in find_tests(module) if rows_of(function.name))


def is_skipped(function: Function, module: ast.Module) -> bool:
    """Whether it never runs: a mark `skip` on the test or the file, or a skip as the first thing that it does."""
    marks = [ast.unparse(mark) for mark in function.decorator_list]
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            marks.append(ast.unparse(node.value))
    first = function.body[ast.get_docstring(function) is not None :][:1]
    return any(re.search(r"\bskip\b|\bxfail\b", mark) for mark in marks) or any(
        re.match(r"pytest\.(skip|xfail)\b|return\b", ast.unparse(node)) for node in first
    )


@pytest.mark.parametrize(
    ("source", "skipped"),
    [
        ("def test_row_1_x():\n    assert f()", False),
        ("@pytest.mark.faults\ndef test_row_1_x():\n    assert f()", False),
        ("@pytest.mark.skip\ndef test_row_1_x():\n    assert f()", True),
        ("pytestmark = pytest.mark.skip('later')\ndef test_row_1_x():\n    assert f()", True),
        ("def test_row_1_x():\n    '''What.'''\n    pytest.skip('later')\n    assert f()", True),
    ],
)
def test_the_checker_finds_tests_that_never_run(source: str, skipped: bool) -> None:
    module = ast.parse(source)
    [function] = find_tests(module)
    assert is_skipped(function, module) is skipped


def test_names_are_read() -> None:
    assert rows_of("test_row_02_03_04_a_kill") == {2, 3, 4} and rows_of("test_rows_1_and_2_kills") == {1, 2}
    assert rows_of("test_rowing_1_boat") == rows_of("test_a_row_1") == set()


def test_each_row_has_a_test_that_runs_and_can_fail() -> None:
    rows: set[int] = set()
    for path in HERE.rglob("test_*.py"):
        for function, module in numbered(path):
            if path != Path(__file__) and not is_skipped(function, module):
                helpers = {name: each for name, each in functions(module).items() if not name.startswith("test")}
                rows |= rows_of(function.name) if can_fail(function, helpers) else set()
    assert rows == set(range(1, NUM_ROWS + 1))


@pytest.mark.slow
def test_pytest_collects_the_test_of_each_row() -> None:
    """Those of the mark `faults` too, which only runs on demand."""
    files = [str(path) for path in HERE.rglob("test_*.py") if path != Path(__file__) and any(numbered(path))]
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", ""]
    collected = subprocess.run([*words, *files], cwd=HERE.parent, capture_output=True, text=True)
    assert collected.returncode == 0, collected.stdout + collected.stderr
    names = {line.rpartition("::")[2] for line in collected.stdout.splitlines() if "::" in line}
    assert set().union(*map(rows_of, names)) == set(range(1, NUM_ROWS + 1))
