"""The product's source as tests see it: modules, what they import, circles. Nothing is imported or installed for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("lumina_ds", "preprocess", "launch")


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {module_name(path): path for path in sorted(files)}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports() -> dict[str, set[str]]:
    return {
        name: imported_modules(tree(path), name, path.name == "__init__.py") for name, path in modules().items()
    }  # fmt: skip


def imported_modules(tree: ast.AST, module: str, is_package: bool = False) -> set[str]:
    """Dotted names that `tree` imports anywhere, relative imports resolved, plus what `from x import y` may name.

    "Anywhere" is what makes it strict: in a function, or for type hints alone.
    """
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + is_package]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def files_imported(imported: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The graph between the modules that are keys of `imported`: each with the others that it imports.

    `from package import module` counts as `module` alone; the package's own file counts for the names it defines.
    """
    graph = {}
    for module, names in imported.items():
        found = {_holder(name, imported) for name in names}
        packages = {name.rpartition(".")[0] for name in names if name in imported}
        named = {name.rpartition(".")[0] for name in names if name not in imported}
        graph[module] = {each for each in found if each and (each not in packages or each in named)} - {module}
    return graph


def _holder(name: str, imported: Mapping[str, set[str]]) -> str | None:
    while name and name not in imported:
        name = name.rpartition(".")[0]
    return name or None


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Groups of modules that reach each other, by what each of them reaches."""
    reached = {module: _reach(module, graph) for module in graph}
    found: list[set[str]] = []
    for module in graph:
        group = {other for other in reached[module] if module in reached[other]}
        if module in group and group not in found:
            found.append(group)
    return found


def _reach(module: str, graph: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        new = graph[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


def definitions(module: ast.Module, *kinds: type[ast.stmt]) -> Iterator[ast.stmt]:
    """Classes or functions of a module, nested ones too."""
    return (node for node in ast.walk(module) if isinstance(node, kinds))


def texts(module: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Every string in the code with the node that holds it, docstrings left out; the fixed parts of f-strings too."""
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(module)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value, node
