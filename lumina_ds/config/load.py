"""Build a run's configuration: defaults < preset < YAML file < command line, with the origin of every value."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lumina_ds.config.checks import attention_faults, data_faults, kernel_faults, model_faults, sequence_faults
from lumina_ds.config.elastic import elastic_faults
from lumina_ds.config.mixture_checks import mixture_faults
from lumina_ds.config.mixtures import EvalSetConfig, SourceConfig
from lumina_ds.config.own_file import in_its_place
from lumina_ds.config.schema import ModelConfig, RunConfig, Section
from lumina_ds.config.tensors import num_parameters
from lumina_ds.config.yaml_file import YamlFile, parse_yaml_value, read_yaml_file
from lumina_ds.errors import MAX_FAULTS, ConfigError
from lumina_ds.text import nearest, shortened

PRESET_FOLDER = Path(__file__).parent / "presets"

_COMMAND_LINE = "command line "
# Lists whose entries have fields of their own.
_ENTRIES: dict[str, type[BaseModel]] = {"data.sources": SourceConfig, "data.eval_sets": EvalSetConfig}

# Names that say what is counted, optimizer steps, for fields whose names of old say batches.
IN_STEPS = {f"train.{what}_every_n_steps": f"train.{what}_every_n_batches" for what in ("log", "eval", "save")}

# How pydantic calls a type in the place of a fault, where a field takes several.
_TYPE_LABEL = re.compile(r"[\[(]|^(int|float|str|bool|none|constrained-\w+)$")

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
    overrides = _of_one_name(overrides)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    layers = _layers(source)
    for origin, layer in layers.items():
        _merge(values, layer.values, origin, origins)
    for override in overrides:
        section = _expand(override)
        _merge(values, section, f"{_COMMAND_LINE}{override.flag}", origins)
    _release_preset_stage(values, origins)
    _release_steps(values, origins)
    if source is None and not any(override.field.startswith("model.") for override in overrides):
        raise ConfigError(f"--config is missing; give a YAML file or a preset ({', '.join(preset_names())})")
    config = _validate(values, origins, layers)
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


def _layers(source: str | None) -> dict[str, YamlFile]:
    """The files that make the configuration by their origin, the one that gives way first."""
    if source is None:
        return {}
    preset = _find_preset(source)
    if preset is not None:
        return {f"preset {source}": _read(preset, source)}
    path = Path(source)
    if not path.is_file():
        names = preset_names()
        raise ConfigError(
            f"--config {source} is neither a preset nor a file{nearest(source, names)} (presets: {', '.join(names)})"
        )
    file = _read(path)
    file = replace(file, values=in_its_place(path, file.values))
    base = file.values.get("preset")
    if base is None:
        return {f"file {path}": file}
    preset = _find_preset(str(base))
    if preset is None:
        raise ConfigError(
            f"{path}: preset {shortened(repr(base))} does not exist{nearest(str(base), preset_names())}, "
            f"at {file.place('preset')}"
        )
    return {f"preset {base}": _read(preset, str(base)), f"file {path}": file}


def _read(path: Path, preset: str | None = None) -> YamlFile:
    """A file that says something; a preset also says which one it is."""
    file = read_yaml_file(path)
    if not file.values:
        raise ConfigError(f"{path} is empty; write `preset: NAME` or fields into it, or give another --config")
    if preset is not None and "preset" in file.values:
        raise ConfigError(f"{path}: a preset begins from no other; write its fields out, at {file.place('preset')}")
    return file if preset is None else replace(file, values=file.values | {"preset": preset})


def _find_preset(name: str) -> Path | None:
    return _preset_files().get(name)


def _of_one_name(overrides: Iterable[Override]) -> list[Override]:
    """Overrides under the names of the schema; ConfigError where the two names of a field are given different values."""
    found: dict[str, Override] = {}
    renamed = [replace(each, field=IN_STEPS.get(each.field, each.field)) for each in overrides]
    for each in renamed:
        first = found.setdefault(each.field, each)
        if each.field in IN_STEPS.values() and str(first.value) != str(each.value):
            raise ConfigError(
                f"{first.flag} {first.value} and {each.flag} {each.value} set the same; leave one of them out"
            )
    return renamed


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
        value = parse_yaml_value(text)
    except ValueError:
        return text
    return value if isinstance(value, (bool, int, float, list)) or value is None else text


def _merge(
    into: dict[str, Any], layer: Mapping[str, Any], origin: str, origins: dict[str, str], prefix: str = ""
) -> None:
    for key, value in layer.items():
        name = f"{prefix}{key}"
        if name in IN_STEPS:
            name = IN_STEPS[name]
            key = name.removeprefix(prefix)
            if layer.get(key, value) != value:
                raise ConfigError(
                    f"{origin}: {prefix}{key} is {layer[key]}, and its other name says {value}; keep one of them"
                )
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


def _release_steps(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Asked for epochs on the command line, a run has not the steps of a file. ConfigError where both are asked for."""
    train = values.get("train")
    if not isinstance(train, dict):
        return
    steps = train.get("max_steps")
    epochs_from, steps_from = origins.get("train.epochs", ""), origins.get("train.max_steps", "")
    if steps is None or not epochs_from.startswith(_COMMAND_LINE):
        return
    if steps_from.startswith(_COMMAND_LINE):
        raise ConfigError(
            f"--max-steps {steps} and --epochs {train['epochs']} both say how long the run is; leave one of them out"
        )
    train["max_steps"] = None
    origins["train.max_steps"] = f"left to {epochs_from.removeprefix(_COMMAND_LINE)}"


def _is_section(name: str) -> bool:
    field = RunConfig.model_fields.get(name)
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _validate(values: dict[str, Any], origins: Mapping[str, str], layers: Mapping[str, YamlFile]) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        found = _by_field(error.errors(include_context=False, include_url=False), values)
        faults = [_describe(fault, origins, layers) for fault in found[:MAX_FAULTS]]
        raise ConfigError.from_faults(faults, len(found) - len(faults)) from error


def _by_field(faults: Sequence[Any], values: Any) -> list[dict[str, Any]]:
    """One fault for each place of `values`: of a field that takes several types pydantic tells one for each of them."""
    found: dict[tuple[str | int, ...], dict[str, Any]] = {}
    for fault in faults:
        place, here = [], values
        for part in fault["loc"]:
            is_inside = part in here if isinstance(here, Mapping) else isinstance(here, list) and isinstance(part, int)
            if is_inside or not _TYPE_LABEL.search(str(part)):
                place.append(part)
            here = here[part] if is_inside else here
        first = found.setdefault((*place,), {**fault, "loc": (*place,)})
        also = fault["msg"].removeprefix("Input should be ")
        if first["msg"] != fault["msg"] and also != fault["msg"]:
            first["msg"] += f", or {also}"
    return [*found.values()]


def _describe(fault: Any, origins: Mapping[str, str], layers: Mapping[str, YamlFile]) -> str:
    name = ".".join(str(part) for part in fault["loc"])
    origin = _origin(name, origins)
    line = layers[origin].place(name) if origin in layers else ""
    origin = f"file {layers[origin].path}" if line else origins.get(name, "")
    place = f" ({origin}{line and f', {line}'})" if origin else ""
    name = shortened(name)
    if fault["type"] == "extra_forbidden":
        if "." in str(fault["loc"][-1]):
            return f"unknown field {name}{place}; in a file, write the section's name and the field below it"
        return f"unknown field {name}{place}{_nearest_field(name)}"
    reason = fault["msg"].removeprefix("Value error, ")
    message = f"{name} is {shortened(repr(fault['input']))}{place}: {reason[0].lower()}{reason[1:]}"
    is_word = fault["type"] == "string_type" and isinstance(fault["input"], int | float)
    return f"{message}; quote it" if is_word and line else message


def _origin(name: str, origins: Mapping[str, str]) -> str:
    """Where a field came from, or what holds it, or what it holds."""
    holders = [name]
    while "." in holders[-1]:
        holders.append(holders[-1].rpartition(".")[0])
    found = next((origins[holder] for holder in holders if holder in origins), None)
    return found or next((origin for known, origin in origins.items() if known.startswith(f"{name}.")), "")


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
