"""The generated pages equal what docs/references.py writes from the schema and the subcommands."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType

import pytest
from documents import DOCS

from lumina_ds.cli.main import VERBS
from lumina_ds.config.config_file import SCHEMA_FILE, json_schema
from lumina_ds.config.fields import type_text
from lumina_ds.config.load import dotted_fields
from lumina_ds.config.schema import RunConfig


@pytest.fixture(scope="module")
def references() -> ModuleType:
    spec = importlib.util.spec_from_file_location("references", DOCS / "references.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["configuration", "commands"])
def test_the_committed_page_is_what_the_code_gives(references: ModuleType, page: str) -> None:
    name, drawn = {
        "configuration": ("configuration-reference.md", references.configuration_page),
        "commands": ("command-reference.md", references.commands_page),
    }[page]
    assert (DOCS / name).read_text(encoding="utf-8") == drawn(), f"docs/{name} is old; run python docs/references.py"


def test_every_field_and_every_command_is_there(references: ModuleType) -> None:
    fields, commands = references.configuration_page(), references.commands_page()
    assert [name for name in dotted_fields(RunConfig) if f"| `{name}`" not in fields] == []
    assert [verb for verb in VERBS if f"\n## lumina {verb}\n" not in commands] == []
    assert "### lumina checkpoint reshard\n" in commands and "`--world-size INTEGER RANGE`" in commands


def test_a_type_without_words_is_an_error() -> None:
    with pytest.raises(TypeError, match="no words yet"):
        type_text(bytes)


def test_the_committed_schema_is_what_the_code_gives() -> None:
    assert json.loads((DOCS / SCHEMA_FILE).read_text()) == json_schema(), "run python docs/references.py"
