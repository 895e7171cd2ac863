"""All that a run trains and evaluates on, as shard folders: one set of training data, or the sources of a mixture, and
the named evaluation sets. Each is prepared as if it were alone (prepare.py), with the tokenizer of all."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumina_ds.config.mixture_checks import best_by_fault
from lumina_ds.config.mixtures import PLAIN_EVAL_SET, EvalSetConfig, SourceConfig
from lumina_ds.config.schema import DataConfig, RunConfig
from lumina_ds.data.shards.folder import EVAL_FOLDER, ShardFolder
from lumina_ds.errors import ConfigError
from preprocess.prepare import (
    AUTO,
    PreparedData,
    check_sources,
    check_training_data,
    prepare_training_data,
    preprocessing_record,
    tokenizer_of_run,
)
from preprocess.sources import resolve_inputs, warn_of_shared_files
from preprocess.summary import summary_record

log = logging.getLogger("lumina_ds.preprocess")


@dataclass(frozen=True)
class RunData:
    """`config` names shard folders in place of files. `record` is what preprocessing did, by what it made; empty where
    nothing had to be made of files."""

    config: RunConfig
    record: dict[str, Any] = field(default_factory=dict)


def prepare_run_data(config: RunConfig, cache: Path) -> RunData:
    """Open or make every folder. Raises ConfigError and DataError as prepare_training_data does."""
    check_run_data(config)
    changed = config.model_copy(deep=True)
    record: dict[str, Any] = {}
    data = changed.data
    if data.sources:
        main = _prepare_sources(changed, cache, record)
    else:
        main = prepare_training_data(
            _alone(config, train_data=config.data.train_data, shards=config.data.shards), cache
        )
        if config.data.train_data:
            record = preprocessing_record(main)
        # Naming the source of the shards as well would be a contradiction.
        data.train_data, data.shards = [], str(main.shards)
        data.eval_shards = None if main.eval_shards is None else str(main.eval_shards)
    for entry in data.eval_sets:
        folder = _evaluation_folder(config, entry, main, cache)
        if entry.paths:
            record.setdefault("eval_sets", {})[entry.name] = summary_record(folder)
        entry.paths, entry.format, entry.shards = [], None, str(folder)
    return RunData(changed, record)


def check_run_data(config: RunConfig) -> None:
    """Refuse what is not named, named twice, or not there; nothing is read beyond a folder's manifest."""
    data = config.data
    if fault := best_by_fault(config.train.best_by, evaluation_set_names(config)):
        raise ConfigError(fault)
    plain = {"eval_data": data.eval_data, "eval_shards": data.eval_shards}
    if not data.sources:
        check_sources(_alone(config, train_data=data.train_data, shards=data.shards))
    for source in data.sources:
        check_sources(_alone(config, **_of_entry(source), **plain))
    _warn_of_files_in_two_places(data)
    for entry in data.eval_sets:
        one = {"eval_data": entry.paths, "eval_shards": entry.shards}
        named = _of_entry(data.sources[0]) if data.sources else {"train_data": data.train_data, "shards": data.shards}
        check_sources(_alone(config, **named, **one))


def check_before_preparing(config: RunConfig) -> None:
    """Everything that prepare_run_data refuses before it reads a conversation; nothing is made."""
    check_run_data(config)
    data = config.data
    tokenizer = str(_named_tokenizer(config) or AUTO) if data.sources else data.tokenizer
    first = {"train_data": data.train_data, "shards": data.shards}
    for source in data.sources:
        check_training_data(_alone(config, **_of_entry(source), tokenizer=tokenizer))
        first = _of_entry(data.sources[0])
    plain = {"eval_data": data.eval_data, "eval_shards": data.eval_shards}
    check_training_data(_alone(config, **first, **plain, tokenizer=tokenizer))
    for entry in data.eval_sets:
        one = {"eval_data": entry.paths, "eval_shards": entry.shards}
        check_training_data(_alone(config, **first, **one, tokenizer=tokenizer))


def _warn_of_files_in_two_places(data: DataConfig) -> None:
    """Say which file two sources share, and which is evaluated on too: both may be meant, and neither is by accident."""
    readers: dict[Hashable, str] = {}
    for source in data.sources:
        for file in resolve_inputs(source.paths) if source.paths else ():
            first = readers.setdefault(file.identity, source.name)
            if first != source.name:
                log.warning("%s is in the sources %s and %s, and is trained in both", file.shown, first, source.name)
    trained = [path for source in data.sources for path in source.paths] or data.train_data
    evaluated = [*data.eval_data, *(path for entry in data.eval_sets for path in entry.paths)]
    if trained and evaluated:
        warn_of_shared_files(trained, evaluated)


def evaluation_set_names(config: RunConfig) -> list[str]:
    """Names of the evaluation sets that the run will have, before any data is prepared."""
    data, names = config.data, [entry.name for entry in config.data.eval_sets]
    if data.eval_data or data.eval_shards:
        return [PLAIN_EVAL_SET, *names]
    if not data.sources:
        held_out = data.eval_fraction > 0 if data.train_data else _has_held_out(data.shards)
        return [PLAIN_EVAL_SET] * held_out + names
    return names or [
        source.name
        for source in data.sources
        if (_has_held_out(source.shards) if source.shards else data.eval_fraction)
    ]


def _prepare_sources(changed: RunConfig, cache: Path, record: dict[str, Any]) -> PreparedData:
    """Make folders of the sources and of the plain evaluation data; the first source's data."""
    data = changed.data
    tokenizer = str(_shared_tokenizer(changed, cache))
    prepared = {
        source.name: prepare_training_data(_alone(changed, **_of_entry(source), tokenizer=tokenizer), cache)
        for source in data.sources
    }
    main = prepared[data.sources[0].name]
    made = {source.name: summary_record(prepared[source.name].shards) for source in data.sources if source.paths}
    record |= {"sources": made} if made else {}
    for source in data.sources:
        source.paths, source.format, source.shards = [], None, str(prepared[source.name].shards)
    if data.eval_data or data.eval_shards:
        plain = EvalSetConfig(name=PLAIN_EVAL_SET, paths=data.eval_data, shards=data.eval_shards)
        folder = _evaluation_folder(changed, plain, main, cache)
        record |= {"eval": summary_record(folder)} if data.eval_data else {}
        data.eval_data, data.eval_shards = [], str(folder)
    elif not data.eval_sets:
        held_out = {name: each.eval_shards for name, each in prepared.items() if each.eval_shards is not None}
        data.eval_sets = [EvalSetConfig(name=name, shards=str(folder)) for name, folder in held_out.items()]
    data.eval_fraction = 0.0
    return main


def _shared_tokenizer(config: RunConfig, cache: Path) -> Path:
    """The tokenizer of every source: the one named, that of the first finished folder, or one trained on all files."""
    if named := _named_tokenizer(config):
        return named
    files = [path for source in config.data.sources for path in source.paths]
    return tokenizer_of_run(_alone(config, train_data=files, **_format_of(config.data.sources[0].format)), cache)


def _named_tokenizer(config: RunConfig) -> Path | None:
    """The one that is there for all sources; None where it has to be trained, ConfigError where it cannot be."""
    data = config.data
    if data.tokenizer != AUTO:
        return Path(data.tokenizer)
    finished = [source.shards for source in data.sources if source.shards]
    if finished:
        return ShardFolder.open(finished[0], force_streaming=True).tokenizer_path
    formats = {source.format for source in data.sources}
    if len(formats) > 1:
        raise ConfigError(
            "a tokenizer is trained on files of one format, and data.sources have several; name one with --tokenizer "
            "(lumina tokenizer train makes it)"
        )
    return None


def _evaluation_folder(config: RunConfig, entry: EvalSetConfig, main: PreparedData, cache: Path) -> Path:
    alone = _alone(
        config,
        **{"shards": str(main.shards), "eval_data": entry.paths, "eval_shards": entry.shards},
        **{"tokenizer": AUTO, **_format_of(entry.format)},
    )
    folder = prepare_training_data(alone, cache).eval_shards
    assert folder is not None
    return folder


def _alone(config: RunConfig, **fields: Any) -> RunConfig:
    """The configuration of a run on one set of training data: without sources and named sets, and with `fields`."""
    changed = config.model_copy(deep=True)
    data = changed.data
    data.sources, data.eval_sets, data.temperature = [], [], None
    if config.data.sources or "eval_data" in fields:
        data.eval_data, data.eval_shards = [], None
    for name, value in fields.items():
        setattr(data, name, value)
    return changed


def _of_entry(entry: SourceConfig) -> dict[str, Any]:
    return {"train_data": entry.paths, "shards": entry.shards, **_format_of(entry.format)}


def _format_of(name: str | None) -> dict[str, Any]:
    """The setting that names a format, where an entry has its own; else data.format holds."""
    return {} if name is None else {"format": name}


def _has_held_out(shards: str | None) -> bool:
    return shards is not None and (Path(shards) / EVAL_FOLDER).is_dir()


def iter_folders(config: RunConfig) -> Iterator[Path]:
    """Every folder of a configuration that prepare_run_data returned: what is trained, then what is evaluated on."""
    data = config.data
    named = [data.shards, *(source.shards for source in data.sources)]
    named += [data.eval_shards, *(entry.shards for entry in data.eval_sets)]
    yield from (Path(folder) for folder in named if folder)
