"""The sections of a report on configuration and environment: what differs from a preset or between two runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lumina_ds.config.load import load_config, preset_names
from lumina_ds.config.schema import RunConfig
from lumina_ds.config.yaml_file import yaml_text
from lumina_ds.report.page import details, escape, scrolling, table
from lumina_ds.report.runs.run import RunRecord
from lumina_ds.text import counted

Difference = tuple[str, str, str]


def configuration(runs: Sequence[RunRecord]) -> Iterator[str]:
    """The parts of the section on configurations."""
    if len(runs) > 1:
        found = differences(runs[0].config, runs[1].config)
        yield (
            table(("field", runs[0].name, runs[1].name), found, "What differs between the two", num_text_columns=3)
            if found
            else "<p>The configurations are equal.</p>"
        )
    for run in runs:
        if not run.config:
            continue
        origin, begun = starting_point(run.config)
        found = differences(begun, run.config)
        caption = f"{run.name}: what differs from {origin}"
        yield table(("field", origin, "this run"), found, caption, num_text_columns=3)
        yield details(f"The whole configuration of {escape(run.name)}", _code(yaml_text(run.config)))
        if run.deepspeed:
            yield details(f"DeepSpeed JSON of {escape(run.name)}", _code(json.dumps(run.deepspeed, indent=2)))


def _code(text: str) -> str:
    return scrolling(f"<pre><code>{escape(text)}</code></pre>")


def environment(runs: Sequence[RunRecord]) -> str:
    """What each run says of its latest life, its layout as the newest checkpoint names it, and versions side by side."""
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for one in facts for name in one))
    rows = [(name, *(one.get(name, "unknown") for one in facts)) for name in names]
    if not rows:
        return '<p class="muted">The run says nothing about where it trained.</p>'
    return table(("fact", *(run.name for run in runs)), rows, num_text_columns=1 + len(runs))


def _facts(run: RunRecord) -> dict[str, str]:
    environment = run.environment
    facts = {name.replace("_", " "): str(value) for name, value in run.topology.items()}
    hosts = environment.get("hosts")
    if isinstance(hosts, dict):
        facts["hosts"] = ", ".join(f"{host} ({counted(ranks, 'rank')})" for host, ranks in hosts.items())
    devices, command = environment.get("devices"), environment.get("command")
    if isinstance(devices, list):
        facts["devices"] = ", ".join(map(str, devices))
    for name in ("started", "platform"):
        if name in environment:
            facts[name] = str(environment[name])
    if isinstance(command, list):
        facts["command"] = " ".join(map(str, command))
    versions = environment.get("versions")
    return facts | ({name: str(value) for name, value in versions.items()} if isinstance(versions, dict) else {})


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names and values; empty sections disappear."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[Difference]:
    """(field, left, right) of all fields that are not equal, in the order in which they stand.

    A field that a configuration of an older version lacks equals one that is unset.
    """
    ours, theirs = flatten(left), flatten(right)
    return [
        (name, show(ours.get(name, "absent")), show(theirs.get(name, "absent")))
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
    ]


def starting_point(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """What a run's configuration began as: its preset, or the defaults where it names none that is shipped."""
    preset = config.get("preset")
    if isinstance(preset, str) and preset in preset_names():
        return f"preset {preset}", load_config(preset).config.model_dump()
    return "the defaults", RunConfig().model_dump()


def show(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)
