"""Reading a nested DeepSpeed JSON: sections by dotted path, switches, and what is left "auto"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

AUTO = "auto"


def section_of(json: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The object at a dotted path, or an empty one where there is none."""
    section: Any = json
    for part in path.split("."):
        section = section.get(part) if isinstance(section, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def sections_at(json: Mapping[str, Any], pattern: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(path, object) of every object whose dotted path fits; `*` is any one key."""
    found: list[tuple[str, Any]] = [("", json)]
    for part in pattern.split("."):
        objects = [(path, value) for path, value in found if isinstance(value, Mapping)]
        found = [
            (f"{path}.{key}" if path else key, value[key])
            for path, value in objects
            for key in (value if part == "*" else [part])
            if key in value
        ]
    for path, value in found:
        if isinstance(value, Mapping):
            yield path, value


def value_at(json: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at a dotted path, or `default` where there is none."""
    section, _, key = path.rpartition(".")
    return (section_of(json, section) if section else json).get(key, default)


def is_enabled(json: Mapping[str, Any], path: str) -> bool:
    """Whether the section at `path` says `"enabled": true`."""
    return section_of(json, path).get("enabled") is True


def is_above(value: Any, limit: float) -> bool:
    """Whether `value` is a number above `limit`; "auto" and texts are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > limit


def auto_paths(json: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted paths of every "auto"; AutoEP gives the word a meaning of its own, so its section is passed over."""
    for key, value in json.items():
        if isinstance(value, Mapping) and key != "expert_parallel":
            yield from auto_paths(value, f"{prefix}{key}.")
        elif value == AUTO and key not in ("keep_in_fp32_modules", "select_strategy"):
            yield prefix + key
