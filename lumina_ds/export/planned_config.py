"""What `lumina plan --model` makes of a config.json: our model section, where it takes the same memory as one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumina_ds.config.schema import ModelConfig
from lumina_ds.errors import ConfigError
from lumina_ds.export.foreign_config import kind_faults, model_from_hugging_face
from lumina_ds.foreign_files import ForeignFileError, read_json
from lumina_ds.text import shortened

CONFIG = "config.json"
# Rotated as Llama, windowed attention: other numbers than ours computes, in the same memory (a window: in no more).
_LIKE_LLAMA = ("mistral", "ministral")
_NO_MEMORY = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "rope_scaling")


@dataclass(frozen=True)
class PlannedModel:
    """`model` is our section; None for a family that we do not train, whose tensors count_foreign counts. `ignored` are
    fields of config.json, as text, that take no memory and that our trainer does not compute."""

    folder: Path
    family: str
    model: ModelConfig | None
    ignored: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def planned_model(path: Path) -> PlannedModel:
    """The model of a config.json, or of a folder with one. Raises ConfigError where it is none."""
    file = _config_file(path)
    try:
        config = read_json(file)
    except (ForeignFileError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"--model {file}: {reason}; give the config.json of a model") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(f"--model {file} has no model_type; give the config.json of a model in Hugging Face's format")
    family = shortened(config["model_type"])
    ours, ignored = _as_ours(config)
    try:
        return PlannedModel(file.parent, family, model_from_hugging_face(ours), ignored)
    except ConfigError:
        if kind_faults(config):
            raise
    return PlannedModel(file.parent, family, None)


def _config_file(path: Path) -> Path:
    file = path / CONFIG if path.is_dir() else path
    if file.name == CONFIG and file.is_file():
        return file
    if file.is_file():
        raise ConfigError(f"--model {path}: the file must be called {CONFIG}, as transformers reads it; rename it")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.is_dir():
        target = path.name
        raise ConfigError(
            f"--model {path} is no folder here, and nothing is downloaded; fetch its config with "
            f"`hf download {path} {CONFIG} --local-dir {target}`, then give --model {target}"
        )
    raise ConfigError(f"--model {path}: there is no {file}; give {CONFIG}, or a folder with it")


def _as_ours(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config without what takes no memory, and a phrase for each such field that it has."""
    ours, ignored = dict(config), []
    if config["model_type"] in _LIKE_LLAMA:
        ours["model_type"] = "llama"
    for name in _NO_MEMORY:
        value = ours.pop(name, None)
        if value not in (None, False) and not (name == "sliding_window" and not config.get("use_sliding_window", True)):
            ignored.append(f"{name} {shortened(repr(value), 40)}")
    rope = ours.get("rope_parameters")
    if isinstance(rope, Mapping) and rope.get("rope_type", "default") != "default":
        ignored.append(f"rope_type {shortened(repr(rope['rope_type']), 40)}")
        ours["rope_parameters"] = {"rope_theta": rope.get("rope_theta")}
    return ours, (*ignored,)
