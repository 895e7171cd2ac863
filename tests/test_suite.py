"""The rules of the test suite itself: tests that can fail, under names of their own, quick where that is promised."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from weak_tests import can_fail, find_tests, functions, idle_assertions

HERE = Path(__file__).parent
FILES = sorted(HERE.rglob("test_*.py"))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("body", "fails"),
    [
        ("pass", False),
        ("run()", False),
        ("helper()", True),
        ("other()", True),
        ("assert f() == 1", True),
        ("with pytest.raises(ValueError):\n        f()", True),
        ("subprocess.run(words, check=True)", True),
        ("subprocess.run(words, check=False)", False),
    ],
)
def test_the_checker_finds_tests_that_check_nothing(body: str, fails: bool) -> None:
    source = (
        f"def helper():\n    assert f()\ndef other():\n    helper()\ndef idle():\n    idle()\ndef test_x():\n    {body}"
    )
    found = functions(ast.parse(source))
    assert can_fail(found["test_x"], found) is fails


@pytest.mark.parametrize(
    ("test", "idle"),
    [
        ("True", True),
        ("f() or True", True),
        ("(f() == 1, 'reason')", True),
        ("x.y == x.y", True),
        ("1 < a <= a", True),
        ("f(1) == f(1)", False),
        ("x or y", False),
        ("x == y", False),
    ],
)
def test_the_checker_finds_assertions_that_always_hold(test: str, idle: bool) -> None:
    [function] = functions(ast.parse(f"def test_x():\n    assert {test}")).values()
    assert bool(idle_assertions(function)) is idle


def test_every_test_can_fail() -> None:
    weak, idle = [], []
    for path in FILES:
        module = parsed(path)
        helpers = {name: each for name, each in functions(module).items() if not name.startswith("test")}
        weak += [f"{path.name}: {each.name}" for each in find_tests(module) if not can_fail(each, helpers)]
        idle += [f"{path.name}: {text}" for each in functions(module).values() for text in idle_assertions(each)]
    assert weak == []
    assert idle == []


def test_files_have_names_of_their_own() -> None:
    """pytest imports test files by their base names, without packages, and so do tests their helpers."""
    names = [path.name for path in HERE.rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_what_a_test_imports_lies_beside_it_or_in_tests() -> None:
    """Ranks find nothing else, and pytest would by chance alone: by the folders that it has seen before."""
    ours = {path.stem: path.parent for path in HERE.rglob("*.py") if path.name != "conftest.py"}
    stray = [
        f"{path.relative_to(HERE)}: {name}"
        for path in HERE.rglob("*.py")
        for name in imported(parsed(path))
        if name in ours and ours[name] not in (HERE, path.parent)
    ]
    assert stray == []
    assert [name for path in HERE.rglob("*.py") for name in imported(parsed(path)) if name == "conftest"] == []


def imported(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_quick_has_tests_of_every_folder_and_one_spawn_of_ranks(collected: list[tuple[Path, set[str]]]) -> None:
    if {path for path, _ in collected} != set(FILES):
        pytest.skip("not every test file was collected")
    chosen = {path.parent for path, marks in collected if not marks & {"slow", "faults"}}
    folders = {path.parent for path in FILES}
    assert len(folders) > 10
    assert folders - chosen == set()
    assert len([path for path, marks in collected if "quick" in marks]) == 1
