"""Build a run's configuration: defaults < preset < YAML file < command line, with the origin of every value."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lumina_ds.config.checks import attention_faults, data_faults, kernel_faults, model_faults, sequence_faults
from lumina_ds.config.elastic import elastic_faults
from lumina_ds.config.mixture_checks import mixture_faults
from lumina_ds.config.mixtures import EvalSetConfig, SourceConfig
from lumina_ds.config.schema import ModelConfig, RunConfig, Section
from lumina_ds.config.tensors import num_parameters
from lumina_ds.errors import ConfigError
from lumina_ds.text import nearest, with_article

PRESET_FOLDER = Path(__file__).parent / "presets"
MAX_YAML_BYTES = 1 << 20
# A few lines of aliases of aliases would fill any memory.
MAX_YAML_VALUES = 100_000

# Lists whose entries have fields of their own.
_ENTRIES: dict[str, type[BaseModel]] = {"data.sources": SourceConfig, "data.eval_sets": EvalSetConfig}

# (below so many parameters, share of the steps)
_WARMUP_RATIOS = ((10e6, 0.1), (500e6, 0.05), (5e9, 0.03), (25e9, 0.02), (float("inf"), 0.01))


@dataclass(frozen=True)
class Override:
    """One value from the command line: the field's dotted name, the value, and the flag as typed."""

    field: str
    value: Any
    flag: str


@dataclass(frozen=True)
class ResolvedConfig:
    """A validated configuration and, for every dotted field, where its value came from."""

    config: RunConfig
    origins: Mapping[str, str]


def preset_names() -> list[str]:
    """Names of the presets, in alphabetical order: the shipped ones, and those of $LUMINA_PRESETS."""
    return sorted(_preset_files())


def _preset_files() -> dict[str, Path]:
    """Every preset is one YAML file. ConfigError where a name stands for two."""
    own = [Path(folder) for folder in os.environ.get("LUMINA_PRESETS", "").split(os.pathsep) if folder]
    files: dict[str, Path] = {}
    for folder in (PRESET_FOLDER, *own):
        for path in folder.glob("*.yaml"):
            if path.stem in files:
                raise ConfigError(f"{path}: {files[path.stem]} is a preset of the same name; rename the file")
            files[path.stem] = path
    return files


def load_config(source: str | None = None, overrides: Iterable[Override] = ()) -> ResolvedConfig:
    """Resolve `source` (a preset's name or a YAML file) and `overrides` into one configuration.

    Raises ConfigError with every fault found: unknown keys with the nearest name, values out of range,
    and shapes that do not fit together.
    """
    overrides = list(overrides)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer, origin in _layers(source):
        _merge(values, layer, origin, origins)
    for override in overrides:
        section = _expand(override)
        _merge(values, section, f"command line {override.flag}", origins)
    _release_preset_stage(values, origins)
    if source is None and not any(override.field.startswith("model.") for override in overrides):
        raise ConfigError(f"--config is missing; give a YAML file or a preset ({', '.join(preset_names())})")
    config = _validate(values, origins)
    faults = model_faults(config) + attention_faults(config) + kernel_faults(config)
    faults += sequence_faults(config) + data_faults(config) + mixture_faults(config) + elastic_faults(config)
    if faults:
        raise ConfigError.from_faults(faults)
    if "train.warmup_ratio" not in origins:
        config.train.warmup_ratio = warmup_by_size(config.model)
        origins["train.warmup_ratio"] = "by the model's size"
    return ResolvedConfig(config, {name: origins.get(name, "default") for name in dotted_fields(RunConfig)})


def warmup_by_size(model: ModelConfig) -> float:
    """Share of the steps that warm up, where none is given: small models train in few steps, of which Adam's second
    moment needs some tens to settle whatever their number (arXiv 1910.04209). The presets' own values."""
    size = num_parameters(model)
    return next(ratio for below, ratio in _WARMUP_RATIOS if size < below)


def dotted_fields(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every settable field of `section` by its dotted name, for messages and listings."""
    names: list[str] = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            names += dotted_fields(field.annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader, refusing duplicate keys and oversized files."""
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_YAML_BYTES} bytes, too large for a configuration")
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds {with_article(type(loaded).__name__)}, not a mapping of sections")
    if _num_values(loaded, {}) > MAX_YAML_VALUES:
        raise ConfigError(f"{path} holds above {MAX_YAML_VALUES} values once its aliases are written out; remove them")
    return loaded


def _num_values(value: Any, known: dict[int, int]) -> int:
    """Values with every alias written out; each object is visited once. One that holds itself counts as too many."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = MAX_YAML_VALUES + 1
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(value)]


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML without duplicate keys, and with true and false as the only booleans: `flash_attention: on` is text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} stands twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _layers(source: str | None) -> list[tuple[dict[str, Any], str]]:
    if source is None:
        return []
    preset = _find_preset(source)
    if preset is not None:
        return [(read_yaml(preset) | {"preset": source}, f"preset {source}")]
    path = Path(source)
    if not path.is_file():
        names = preset_names()
        raise ConfigError(
            f"--config {source} is neither a preset nor a file{nearest(source, names)} (presets: {', '.join(names)})"
        )
    values = read_yaml(path)
    base = values.get("preset")
    layers: list[tuple[dict[str, Any], str]] = []
    if base is not None:
        preset = _find_preset(str(base))
        if preset is None:
            raise ConfigError(f"{path}: preset {base!r} does not exist{nearest(str(base), preset_names())}")
        layers.append((read_yaml(preset), f"preset {base}"))
    return [*layers, (values, f"file {path}")]


def _find_preset(name: str) -> Path | None:
    return _preset_files().get(name)


def _expand(override: Override) -> dict[str, Any]:
    value = override.value
    # Text fields take what is typed: a run may be named 2024.
    if isinstance(value, str) and _annotation(override.field) not in (str, str | None):
        value = _parse_scalar(value)
    tree: Any = value
    for part in reversed(override.field.split(".")):
        tree = {part: tree}
    return tree


def _annotation(field: str) -> Any:
    """The declared type of a dotted field, None for an unknown one."""
    section: Any = RunConfig
    for part in field.split("."):
        fields = getattr(section, "model_fields", {})
        section = fields[part].annotation if part in fields else None
    return section


def _parse_scalar(text: str) -> Any:
    """Numbers, booleans, null and [lists] as YAML writes them; anything else stays the text typed."""
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    return value if isinstance(value, (bool, int, float, list)) or value is None else text


def _merge(
    into: dict[str, Any], layer: Mapping[str, Any], origin: str, origins: dict[str, str], prefix: str = ""
) -> None:
    for key, value in layer.items():
        name = f"{prefix}{key}"
        if value is None and not prefix and _is_section(key):
            continue  # an empty section in YAML
        if name == "train.micro_batch_size" and _leaves_it_open(value, into, origin, origins):
            continue
        if isinstance(value, Mapping) and isinstance(into.get(key, {}), dict):
            _merge(into.setdefault(key, {}), value, origin, origins, f"{name}.")
        else:
            into[key] = value
            origins[name] = origin


def _leaves_it_open(value: Any, train: dict[str, Any], origin: str, origins: dict[str, str]) -> bool:
    """Whether a micro-batch is `auto`. The number of an earlier layer stays: it says how many rows a step has."""
    is_auto = value == "auto"
    if is_auto or "auto_micro_batch" in train:
        train["auto_micro_batch"] = is_auto
        origins["train.auto_micro_batch"] = origin
    return is_auto


def _release_preset_stage(values: dict[str, Any], origins: dict[str, str]) -> None:
    """A DeepSpeed JSON that the user chose brings its own stage; a preset's must not override it."""
    section = values.get("deepspeed")
    if not isinstance(section, dict) or not section.get("config"):
        return
    chosen, stage = origins.get("deepspeed.config", "preset"), origins.get("deepspeed.zero_stage", "")
    if stage.startswith("preset") and not chosen.startswith("preset"):
        section["zero_stage"] = None
        origins["deepspeed.zero_stage"] = f"left to {section['config']}"


def _is_section(name: str) -> bool:
    field = RunConfig.model_fields.get(name)
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _validate(values: dict[str, Any], origins: Mapping[str, str]) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError.from_faults([_describe(fault, origins) for fault in error.errors()]) from error


def _describe(fault: Any, origins: Mapping[str, str]) -> str:
    name = ".".join(str(part) for part in fault["loc"])
    origin = origins.get(name, "")
    place = f" ({origin})" if origin else ""
    if fault["type"] == "extra_forbidden":
        return f"unknown field {name}{place}{_nearest_field(name)}"
    return f"{name} is {fault['input']!r}{place}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _nearest_field(name: str) -> str:
    """A hint by the field's last word: first among its section's fields, then among all."""
    section, _, word = name.rpartition(".")
    if not section and (hint := nearest(name, RunConfig.model_fields)):
        return hint
    entries = _ENTRIES.get(re.sub(r"\.\d+$", "", section))
    if entries is not None:
        return nearest(word, entries.model_fields) or f"; it takes {', '.join(entries.model_fields)}"
    fields = dotted_fields(RunConfig)
    siblings = [field for field in fields if field.startswith(f"{section}.")] if section else []
    for candidates in (siblings, fields):
        by_word = {field.rpartition(".")[2]: field for field in candidates}
        match = difflib.get_close_matches(word, by_word, n=1, cutoff=0.6)
        if match:
            return f"; did you mean {by_word[match[0]]}?"
    return ""
