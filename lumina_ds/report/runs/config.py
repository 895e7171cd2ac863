"""Configurations as flat tables, and what differs between two of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lumina_ds.config.load import load_config, preset_names
from lumina_ds.config.schema import RunConfig

Difference = tuple[str, str, str]


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
