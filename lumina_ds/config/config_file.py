"""A run's YAML file to start from, and the JSON Schema by which editors complete and check one."""

from __future__ import annotations

import json
from typing import Any

from lumina_ds.config.fields import FieldText, doc_of, fields_of, sections
from lumina_ds.config.load import IN_STEPS, load_config
from lumina_ds.config.schema import RunConfig
from lumina_ds.config.yaml_file import yaml_text

SCHEMA_FILE = "lumina.schema.json"


def json_schema() -> dict[str, Any]:
    """JSON Schema of what a run's file may hold, `preset` included. Checks across fields are not in it, and texts that
    stand for numbers are not either."""
    found = RunConfig.model_json_schema()
    for other, name in IN_STEPS.items():
        properties = found["$defs"]["TrainConfig"]["properties"]
        properties[other.partition(".")[2]] = properties[name.partition(".")[2]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **found,
        "title": "Lumina DS run",
        "$defs": {name: _or_empty(each) for name, each in found["$defs"].items()},
    }


def commented_yaml(preset: str) -> str:
    """The file that is `preset: NAME` and nothing else, with every field of every section as a comment."""
    values = load_config(preset).config
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# A run that starts from the preset {preset}. Take the # from a field to change it.",
        "",
        f"preset: {preset}",
    ]
    for name, section in sections():
        if not name:
            continue
        own = values
        for part in name.split("."):
            own = getattr(own, part)
        indent = "  " * (name.count(".") + 1)
        lines += ["", *_wrapped(doc_of(section), indent[2:]), f"{indent[2:]}{name.rpartition('.')[2]}:"]
        for field in fields_of(section, name):
            lines += [*_wrapped(_about(field), indent), *_commented(field.key, getattr(own, field.key), indent)]
    return "\n".join(lines) + "\n"


def _or_empty(section: dict[str, Any]) -> dict[str, Any]:
    """A section of comments alone is empty in YAML."""
    if section.get("type") != "object":
        return section
    return {**section, "type": ["object", "null"]}


def _about(field: FieldText) -> str:
    return f"{field.meaning} ({field.kind})"


def _commented(key: str, value: Any, indent: str) -> list[str]:
    text = yaml_text({key: json.loads(json.dumps(value, default=lambda other: other.model_dump()))})
    return [f"{indent}# {line}" for line in text.rstrip("\n").splitlines()]


def _wrapped(text: str, indent: str) -> list[str]:
    """Comments of at most 110 characters."""
    lines, line = [], f"{indent}#"
    for word in text.split():
        if len(line) + len(word) >= 110:
            lines.append(line)
            line = f"{indent}#"
        line += f" {word}"
    return [*lines, line] if text else []
