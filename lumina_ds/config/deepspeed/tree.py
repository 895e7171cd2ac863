"""A nested DeepSpeed JSON: read from a file, its sections by dotted path, and where the run's settings go into it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lumina_ds.config.deepspeed.keys import table
from lumina_ds.config.yaml_file import read_text
from lumina_ds.errors import ConfigError
from lumina_ds.text import nearest, shortened, with_article

AUTO = "auto"
# Installed inside the package, or beside it in a checkout.
_FOLDERS = (Path(__file__).parents[2] / "ds_configs", Path(__file__).parents[3] / "ds_configs")
_MAX_DEPTH = 32
_MAX_KEYS = 4_000
_LARGEST = (1 << 63) - 1


def load_deepspeed_json(name_or_path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON: the name of a shipped one (`zero2`) or a path. Nothing is checked but its syntax.

    DeepSpeed reads Hjson, so comments, trailing commas and unquoted words are taken too, and the names of ZeRO-3
    without `stage3_`, which are written out.
    """
    path = _find(name_or_path)
    try:
        loaded = _parse(read_text(path))
    except RecursionError as error:
        raise ConfigError(f"{path} is nested deeper than {_MAX_DEPTH} levels") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds {with_article(type(loaded).__name__)}, not an object")
    if fault := _fault_of_values(loaded):
        raise ConfigError(f"{path}: {fault}")
    _write_out_names(loaded, path)
    return loaded


def deepspeed_config_names() -> list[str]:
    """Names of the shipped DeepSpeed configurations, in alphabetical order."""
    return sorted({path.stem for folder in _FOLDERS for path in folder.glob("*.json")})


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


class Merger:
    """Writes the run's settings over a user's file and notes where the two contradict."""

    def __init__(self, merged: dict[str, Any], source: str) -> None:
        self.merged = merged
        self.source = source
        self.faults: list[str] = []

    def impose(self, path: str, value: Any, owner: str) -> None:
        """Set what belongs to the run; a different value in the file is a fault that names the run's `owner`."""
        section, key = self._place(path)
        found = section.get(key, AUTO)
        if found not in (AUTO, None) and found != value:
            self.faults.append(
                f"{self.source}: {path} is {found!r}, but the run has {value!r} ({owner}); "
                'change one of them, or set the file\'s to "auto"'
            )
        section[key] = value

    def propose(self, path: str, value: Any) -> None:
        """Set what the file leaves open."""
        section, key = self._place(path)
        if section.get(key, AUTO) == AUTO:
            section[key] = value

    def _place(self, path: str) -> tuple[dict[str, Any], str]:
        *parents, key = path.split(".")
        section = self.merged
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            section = section[parent]
        return section, key


def _parse(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_int=_as_int)
    except ValueError as error:
        # DeepSpeed's own reader, one of its requirements.
        import hjson

        try:
            loaded = hjson.loads(text, object_pairs_hook=_unique_keys, parse_int=_as_int)
        except ValueError:
            loaded = None
        # To Hjson an empty file is an empty object.
        if not loaded:
            raise error
        return loaded


def _as_int(digits: str) -> int:
    if len(digits) > 400:
        raise ValueError(f"a number of {len(digits)} digits is beyond any use")
    return int(digits)


def _fault_of_values(loaded: dict[str, Any]) -> str | None:
    """What no reader of the values below could bear: too many of them, too deep, or numbers without a use."""
    level: list[tuple[str, Any]] = [("", loaded)]
    num_keys = 0
    for _ in range(_MAX_DEPTH):
        inner: list[tuple[str, Any]] = []
        for path, value in level:
            if isinstance(value, dict):
                inner += [(f"{path}.{key}" if path else key, part) for key, part in value.items()]
            elif isinstance(value, list):
                inner += [(path, part) for part in value]
            elif isinstance(value, float) and not math.isfinite(value):
                return f"{shortened(path)} is {value}; write a finite number"
            elif isinstance(value, int) and abs(value) > _LARGEST:
                return f"{shortened(path)} is {shortened(str(value))}; a whole number is below 2^63"
        num_keys += len(inner)
        if num_keys > _MAX_KEYS:
            return f"it holds above {_MAX_KEYS} values; a configuration has fewer"
        level = inner
    return f"it is nested deeper than {_MAX_DEPTH} levels" if level else None


def _write_out_names(loaded: dict[str, Any], path: Path) -> None:
    """DeepSpeed's model of the section takes `max_live_parameters` for `stage3_max_live_parameters`."""
    zero = loaded.get("zero_optimization")
    if not isinstance(zero, dict):
        return
    known = table().sections["zero_optimization"]
    for name in list(zero):
        whole = f"stage3_{name}"
        if name not in known and whole in known:
            if whole in zero:
                raise ConfigError(f"{path}: zero_optimization.{name} is {whole}, and both are there; remove one")
            zero[whole] = zero.pop(name)


def _find(name_or_path: str) -> Path:
    for folder in _FOLDERS:
        if (folder / f"{name_or_path}.json").is_file() and "/" not in name_or_path:
            return folder / f"{name_or_path}.json"
    path = Path(name_or_path)
    if not path.is_file():
        names = deepspeed_config_names()
        raise ConfigError(
            f"--deepspeed_config {name_or_path} is neither a file nor a shipped configuration"
            f"{nearest(name_or_path, names)} (shipped: {', '.join(names)})"
        )
    return path


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for key, value in pairs:
        if key in section:
            raise ValueError(f"key {key!r} stands twice")
        section[key] = value
    return section
