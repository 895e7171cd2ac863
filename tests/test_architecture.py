"""The walls of the house, read from the source, so that nothing has to be importable or installed.

errors, logs, files, text < config < plan | model | data < engine < checkpoint < generate | export | monitor < report
< train | doctor < ranks < measure < preprocess, cli, launch. Imports inside functions and for type hints count too:
laziness is no licence to point upward, or in a circle.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from source_tree import (
    ROOT,
    circles,
    definitions,
    files_imported,
    imported_modules,
    imports,
    modules,
    texts,
    tree,
)

# Packages of one line stand beside each other and do not import one another.
LAYERS: tuple[set[str], ...] = (
    {"lumina_ds.errors", "lumina_ds.logs", "lumina_ds.files", "lumina_ds.foreign_files", "lumina_ds.text"},
    {"lumina_ds.config"},
    {"lumina_ds.plan", "lumina_ds.model", "lumina_ds.data"},
    {"lumina_ds.engine"},
    {"lumina_ds.checkpoint"},
    {"lumina_ds.generate", "lumina_ds.export", "lumina_ds.monitor"},
    {"lumina_ds.report"},
    {"preprocess", "lumina_ds.train", "lumina_ds.doctor"},
    {"lumina_ds.ranks"},
    {"lumina_ds.measure"},
    {"lumina_ds.cli", "launch"},
)
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
TOP = len(LAYERS) - 1
ENTRY_POINTS = {"lumina_ds", "lumina_ds.__main__", "preprocess.__main__"}

MAY_IMPORT_DEEPSPEED = ("lumina_ds.engine", "lumina_ds.checkpoint")
NEVER_IMPORT_TORCH = (
    "lumina_ds.errors",
    "lumina_ds.logs",
    "lumina_ds.files",
    "lumina_ds.foreign_files",
    "lumina_ds.text",
    "lumina_ds.config",
    "lumina_ds.plan",
)
SLOW_LIBRARIES = {"torch", "deepspeed", "pyarrow", "sentencepiece", "numpy", "transformers"}

TOP_LEVEL = {
    "lumina_ds", "ds_configs", "launch", "preprocess", "tests", "docs", "setup.py", "pyproject.toml", "constraints.txt",
    "constraints", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md",
}  # fmt: skip
MOST_METHODS = 25
MOST_LINES_OF_A_FUNCTION = 80
MOST_LINES_OF_A_FILE = {"lumina_ds.train.run": 250, "lumina_ds.train.loop": 250} | {"lumina_ds.cli": 250}
# Not a verb, but what verbs have in common: finding one, options of a configuration and of data, finding a model.
SHARED_BY_VERBS = {"main", "completers", "config_options", "data_options", "model_source"}
# A name of a step folder, whole, as a pattern or as the fixed part of an f-string; a pointer below a folder.
STEP_FOLDER = re.compile(r"(^|/)step-($|\*|\\d|\[)")
MANIFEST = "manifest.json"
# A shard folder has a manifest of its own.
MANIFEST_OF_SHARDS = "lumina_ds.data.shards.manifest"


def package_of(module: str) -> str | None:
    """The layered package that holds `module`, or None for anything else."""
    if module in ENTRY_POINTS:
        return None
    return next((package for package in LEVEL if within(module, package)), None)


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


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


def uses(module: str, library: str) -> bool:
    return any(within(name, library) for name in imports()[module])


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


def test_the_checker_finds_circles() -> None:
    """Through a function, through a type hint, and through a package's own file; not to the folder of a neighbour."""
    sources = {
        "p": "from p.a import A",
        "p.a": "def f():\n    from p.b import B",
        "p.b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.c import C",
        "p.c": "from p import a",
        "p.d": "from p import A\nfrom p import e",
        "p.e": "import os",
        "p.f": "from p import e\nfrom p.g import G",
        "p.g": "import p.e",
    }
    imported = {name: imported_modules(ast.parse(source), name, name == "p") for name, source in sources.items()}
    graph = files_imported(imported)
    assert graph["p.d"] == {"p", "p.e"} and graph["p.c"] == {"p.a"} and graph["p.e"] == set()
    assert circles(graph) == [{"p.a", "p.b", "p.c"}]
    assert circles(graph | {"p.e": {"p.f"}}) == [{"p.a", "p.b", "p.c"}, {"p.e", "p.f", "p.g"}]


def test_every_module_belongs_to_a_layer() -> None:
    assert len(modules()) > 30
    assert [name for name in modules() if package_of(name) is None and name not in ENTRY_POINTS] == []


def test_imports_point_down() -> None:
    wrong = {name: {package_of(each) for each in upward_imports(name, found)} for name, found in imports().items()}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_no_circle_between_files() -> None:
    graph = files_imported(imports())
    assert sum(map(len, graph.values())) > len(graph), "hardly an import found: this test looks in the wrong place"
    found = circles(graph)
    assert found == []


def test_torch_stays_out_of_configuration_and_plan() -> None:
    assert [name for name in modules() if within(name, *NEVER_IMPORT_TORCH) and uses(name, "torch")] == []


def test_data_libraries_stay_out_of_engine_and_model() -> None:
    inside = [name for name in modules() if within(name, "lumina_ds.engine", "lumina_ds.model")]
    assert [name for name in inside if uses(name, "pyarrow") or uses(name, "numba")] == []


def test_only_engine_and_checkpoint_import_deepspeed() -> None:
    users = [name for name in modules() if uses(name, "deepspeed")]
    assert users, "nothing imports deepspeed: this test looks in the wrong place"
    assert [name for name in users if not within(name, *MAY_IMPORT_DEEPSPEED)] == []


def knows_step_folders(module: ast.Module) -> bool:
    """Whether the code spells names of step folders, of their manifests, or of the pointers to them."""
    found = dict.fromkeys(id(node) for text, node in texts(module) if STEP_FOLDER.search(text) or text == MANIFEST)
    pointers = (
        node
        for node in ast.walk(module)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant)
    )
    return bool(found) or any(node.right.value in ("latest", "best") for node in pointers)


@pytest.mark.parametrize(
    ("source", "knows"),
    [
        ('names = folder.glob("step-*")', True),
        ('path = folder / f"step-{step:08d}"', True),
        ('NAME = re.compile(r"step-\\d{8}")', True),
        ('path = run / "checkpoints" / "latest"', True),
        ('read(folder / "manifest.json")', True),
        ('"""The step-XXXXXXXX folders and their manifest.json."""', False),
        ('raise X("give a checkpoint (step-XXXXXXXX)")', False),
        ('"""A command."""\nexample = "lumina export runs/debug/checkpoints/step-00000400"', False),
        ('rows = {"latest": folder == pointer_target(folder, "latest")}\nword = "step-by-step"', False),
    ],
)
def test_the_checker_finds_step_folders(source: str, knows: bool) -> None:
    assert knows_step_folders(ast.parse(source)) is knows


def test_only_checkpoint_knows_a_step_folder() -> None:
    knowing = [name for name, path in modules().items() if knows_step_folders(tree(path))]
    assert "lumina_ds.checkpoint.format" in knowing and MANIFEST_OF_SHARDS in knowing
    elsewhere = [name for name in knowing if not within(name, "lumina_ds.checkpoint", MANIFEST_OF_SHARDS)]
    assert elsewhere == []


def test_classes_and_functions_are_small() -> None:
    classes, functions = [], []
    for name, path in modules().items():
        for node in definitions(tree(path), ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
            if len(methods) > MOST_METHODS:
                classes.append(f"{name}.{node.name}")
        for node in definitions(tree(path), ast.FunctionDef, ast.AsyncFunctionDef):
            if node.end_lineno - node.lineno >= MOST_LINES_OF_A_FUNCTION:
                functions.append(f"{name}.{node.name}")
    assert classes == []
    assert functions == []


def test_the_loop_and_the_verbs_are_short() -> None:
    long = []
    for name, path in modules().items():
        most = [lines for package, lines in MOST_LINES_OF_A_FILE.items() if within(name, package)]
        if most and len(path.read_text(encoding="utf-8").splitlines()) > min(most):
            long.append(name)
    assert long == []


def test_cli_holds_one_file_or_folder_for_each_verb() -> None:
    from lumina_ds.cli.main import VERBS

    held = {name.split(".")[2]: name for name in modules() if name.startswith("lumina_ds.cli.")}
    assert [verb for verb in VERBS if verb not in held] == []
    assert [name for part, name in held.items() if part not in {*VERBS, *SHARED_BY_VERBS}] == []


def test_the_top_level_holds_what_is_known() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip(f"git does not list the files here: {listed.stderr.strip()}")
    names = {path.split("/")[0] for path in listed.stdout.split("\0") if path}
    assert {"lumina_ds", "tests", "setup.py"} <= names
    assert sorted(name for name in names - TOP_LEVEL if not name.startswith(".")) == []


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


@pytest.mark.slow
def test_help_answers_at_once(processor_seconds: Callable[[], float]) -> None:
    def seconds() -> float:
        before = processor_seconds()
        subprocess.run([sys.executable, "-m", "lumina_ds", "--help"], check=True, capture_output=True, cwd=ROOT)
        return processor_seconds() - before

    # The best of several: caches are cold in the first.
    assert min(seconds() for _ in range(5)) < 0.3


def test_pandas_is_not_needed() -> None:
    """It is none of our requirements, and before pyarrow 26 to_pandas_dtype() imports it."""
    calls = [
        f"{name}: {node.attr}"
        for name, path in modules().items()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and node.attr.startswith("to_pandas")
    ]
    assert not calls
