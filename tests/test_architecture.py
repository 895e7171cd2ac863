"""The import order of the packages, read from the source, so that nothing has to be importable or installed.

errors, files, logs, text < config < plan | model | data < engine < checkpoint < generate | export | monitor < report
< train | doctor < ranks < measure < preprocess, cli, launch. Imports inside functions count too: laziness is no licence to point upward.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Packages of one line stand beside each other and do not import one another.
LAYERS: tuple[set[str], ...] = (
    {"lumina_ds.errors", "lumina_ds.logs", "lumina_ds.files", "lumina_ds.text"},
    {"lumina_ds.config"},
    {"lumina_ds.plan", "lumina_ds.model", "lumina_ds.data"},
    {"lumina_ds.engine"},
    {"lumina_ds.checkpoint"},
    {"lumina_ds.generate", "lumina_ds.export", "lumina_ds.monitor"},
    {"lumina_ds.report"},
    {"lumina_ds.train", "lumina_ds.doctor"},
    {"lumina_ds.ranks"},
    {"lumina_ds.measure"},
    {"preprocess", "lumina_ds.cli", "launch"},
)
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
TOP = len(LAYERS) - 1
ENTRY_POINTS = {"lumina_ds", "lumina_ds.__main__"}

MAY_IMPORT_DEEPSPEED = ("lumina_ds.engine", "lumina_ds.checkpoint.format")
NEVER_IMPORT_TORCH = (
    "lumina_ds.errors",
    "lumina_ds.logs",
    "lumina_ds.files",
    "lumina_ds.text",
    "lumina_ds.config",
    "lumina_ds.plan",
)
SLOW_LIBRARIES = {"torch", "deepspeed", "pyarrow", "sentencepiece", "numpy", "transformers"}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def sources() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    files = [path for package in ("lumina_ds", "preprocess", "launch") for path in (ROOT / package).rglob("*.py")]
    return {module_name(path): path for path in sorted(files)}


def imported_modules(tree: ast.AST, module: str, is_package: bool = False) -> set[str]:
    """Dotted names that `tree` imports anywhere, relative imports resolved, plus what `from x import y` may name."""
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


def package_of(module: str) -> str | None:
    """The layered package that holds `module`, or None for anything else."""
    return next((package for package in LEVEL if module == package or module.startswith(package + ".")), None)


def upward_imports(module: str, imported: set[str]) -> list[str]:
    """Those of `imported` that `module` may not use: higher layers, and siblings below the top one."""
    own = package_of(module)
    if own is None:
        return []
    wrong = []
    for name in imported:
        other = package_of(name)
        if other is None or other == own:
            continue
        beside = LEVEL[other] == LEVEL[own] and LEVEL[own] not in (0, TOP)
        if LEVEL[other] > LEVEL[own] or beside:
            wrong.append(name)
    return sorted(wrong)


MODULES = sources()
IMPORTS = {
    name: imported_modules(ast.parse(path.read_text(encoding="utf-8")), name, path.name == "__init__.py")
    for name, path in MODULES.items()
}


def uses(module: str, library: str) -> bool:
    return any(name == library or name.startswith(library + ".") for name in IMPORTS[module])


@pytest.mark.parametrize(
    ("source", "module", "wrong"),
    [
        (
            "from lumina_ds.train.run import x",
            "lumina_ds.config.load",
            ["lumina_ds.train.run", "lumina_ds.train.run.x"],
        ),
        ("def f():\n    import lumina_ds.cli.main", "lumina_ds.train.run", ["lumina_ds.cli.main"]),
        ("from lumina_ds import model", "lumina_ds.data.shards.folder", ["lumina_ds.model"]),
        ("from ..engine import build", "lumina_ds.model.moe", ["lumina_ds.engine", "lumina_ds.engine.build"]),
        ("from lumina_ds.errors import X\nimport os\nfrom .shards import y", "lumina_ds.data.loader", []),
    ],
)
def test_the_checker_finds_upward_imports(source: str, module: str, wrong: list[str]) -> None:
    assert upward_imports(module, imported_modules(ast.parse(source), module)) == wrong


def test_every_module_belongs_to_a_layer() -> None:
    assert len(MODULES) > 30
    assert [name for name in MODULES if package_of(name) is None and name not in ENTRY_POINTS] == []


def test_imports_point_down() -> None:
    wrong = {name: upward_imports(name, imported) for name, imported in IMPORTS.items()}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_torch_stays_out_of_configuration_and_plan() -> None:
    assert [name for name in MODULES if name.startswith(NEVER_IMPORT_TORCH) and uses(name, "torch")] == []


def test_only_engine_and_checkpoints_import_deepspeed() -> None:
    users = [name for name in MODULES if uses(name, "deepspeed")]
    assert users, "nothing imports deepspeed: this test looks in the wrong place"
    assert [name for name in users if not name.startswith(MAY_IMPORT_DEEPSPEED)] == []


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["presets", "list", "--json"], ["plan", "--config", "debug", "--gpus", "2", "--json"]],
    ids=lambda arguments: arguments[0],
)
def test_quick_verbs_import_nothing_slow(arguments: list[str]) -> None:
    program = (
        "import sys; from lumina_ds.cli.main import cli, run_command; code = run_command(cli, sys.argv[1:]);"
        f"print(sorted(set(sys.modules) & {SLOW_LIBRARIES!r}), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_help_answers_at_once(processor_seconds: Callable[[], float]) -> None:
    def seconds() -> float:
        before = processor_seconds()
        subprocess.run([sys.executable, "-m", "lumina_ds", "--help"], check=True, capture_output=True, cwd=ROOT)
        return processor_seconds() - before

    # The best of several: caches are cold in the first.
    assert min(seconds() for _ in range(5)) < 0.3


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by their base names, without packages."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_pandas_is_not_needed() -> None:
    """It is none of our requirements, and before pyarrow 26 to_pandas_dtype() imports it."""
    calls = [
        f"{name}: {node.attr}"
        for name, path in sources().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr.startswith("to_pandas")
    ]
    assert not calls
