"""A run's own config.yaml: written so that it starts the run from any folder, and read so that the run may be moved."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from lumina_ds.config.chat_templates import TEMPLATE_SUFFIX
from lumina_ds.config.deepspeed.tree import deepspeed_config_names
from lumina_ds.errors import ConfigError

# What stands beside it in a run folder.
_BESIDE = ("ds_config.json", "checkpoints")
# Fields that hold a path, and the values of theirs that are none.
_PATHS: dict[tuple[str, str], Callable[[str], bool]] = {
    ("data", "shards"): lambda _: False,
    ("data", "eval_shards"): lambda _: False,
    ("data", "tokenizer"): lambda value: value == "auto",
    ("data", "chat_template"): lambda value: not value.endswith(TEMPLATE_SUFFIX),
    ("train", "init_from"): lambda _: False,
    ("deepspeed", "config"): lambda value: value in deepspeed_config_names(),
    ("run", "runs_dir"): lambda _: False,
    ("run", "resume"): lambda value: value in ("auto", "must", "none"),
}
_LISTS = (("data", "sources"), ("data", "eval_sets"))


def with_whole_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration with every path from the root on."""
    return _with_paths(values, lambda name, path: Path(os.path.abspath(path)))


def in_its_place(file: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration's `file` says; of a run's own, with name, place and paths by where it lies now.

    Raises ConfigError for a relative path of a moved run: nobody knows any more what it was relative to.
    """
    home = file.resolve().parent
    run = values.get("run")
    if not _is_own(file) or not isinstance(run, Mapping) or not isinstance(run.get("runs_dir"), str):
        return dict(values)
    written, now = Path(run["runs_dir"]), home.parent
    start: Path | None = now
    if not written.is_absolute():
        num_parts = len(written.parts)
        start = Path(*now.parts[:-num_parts]) if now.parts[-num_parts:] == written.parts else None

    def moved(name: str, path: Path) -> Path:
        if path.is_absolute():
            inside = path.is_relative_to(written) and not path.exists()
            return now / path.relative_to(written) if inside else path
        if start is None:
            raise ConfigError(
                f"{file}: {name} {path} was relative to the folder in which the run began, and the run was moved; write "
                "the whole path there"
            )
        return start / path

    own = dict(values) | {"run": dict(run) | {"runs_dir": str(now), "name": home.name}}
    return _with_paths(own, moved)


def _is_own(file: Path) -> bool:
    return file.name == "config.yaml" and all((file.parent / name).exists() for name in _BESIDE)


def _with_paths(values: Mapping[str, Any], change: Callable[[str, Path], Path]) -> dict[str, Any]:
    changed = deepcopy(dict(values))
    for (section, name), is_word in _PATHS.items():
        part = changed.get(section)
        value = part.get(name) if isinstance(part, dict) else None
        if isinstance(part, dict) and isinstance(value, str) and value and not is_word(value):
            part[name] = str(change(f"{section}.{name}", Path(value)))
    for section, name in _LISTS:
        part = changed.get(section)
        entries = part.get(name) if isinstance(part, dict) else None
        for number, entry in enumerate(entries if isinstance(entries, list) else ()):
            if isinstance(entry, dict) and isinstance(entry.get("shards"), str):
                entry["shards"] = str(change(f"{section}.{name}.{number}.shards", Path(entry["shards"])))
    return changed
