"""The shard folders of a run, opened: what it trains and evaluates on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lumina_ds.config.mixture_checks import best_by_fault
from lumina_ds.config.mixtures import PLAIN_EVAL_SET
from lumina_ds.config.schema import RunConfig
from lumina_ds.data.loader import PackedRows
from lumina_ds.data.mixture.rows import MixedRows
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.errors import ConfigError
from lumina_ds.train.evaluation_sets import EvaluationSet, set_names


@dataclass(frozen=True)
class OpenedData:
    """Folders by the source's or set's name; a single source and a set without a name have the name None."""

    sources: dict[str | None, ShardFolder]
    eval_sets: dict[str | None, ShardFolder]

    @classmethod
    def of(cls, config: RunConfig, shards: Path | None, eval_shards: Path | None) -> OpenedData:
        """Open `shards`, or without them the folders of data.sources; DataError for a damaged one."""
        data = config.data
        if fault := best_by_fault(config.train.best_by, set_names(config, eval_shards is not None)):
            raise ConfigError(fault)
        if shards is None and not all(source.shards for source in data.sources):
            raise ConfigError("data.sources with paths are not prepared here; give each a shard folder")

        def opened(path: str | Path) -> ShardFolder:
            return ShardFolder.open(path, force_streaming=data.force_streaming)

        sources: dict[str | None, ShardFolder] = (
            {source.name: opened(source.shards or "") for source in data.sources}
            if shards is None
            else {None: opened(shards)}
        )
        sets: dict[str | None, ShardFolder] = {}
        if eval_shards is not None:
            sets[PLAIN_EVAL_SET if data.eval_sets else None] = opened(eval_shards)
        return cls(sources, sets | {entry.name: opened(entry.shards or "") for entry in data.eval_sets})

    @property
    def folders(self) -> list[ShardFolder]:
        return [*self.sources.values(), *self.eval_sets.values()]

    def rows(self, seq_length: int) -> PackedRows | MixedRows:
        """What is trained. DataError where a source gives no row."""
        if None in self.sources:
            return PackedRows(self.sources[None], seq_length)
        return MixedRows({name: PackedRows(folder, seq_length) for name, folder in self.sources.items() if name})

    def evaluation_sets(self, config: RunConfig) -> tuple[EvaluationSet, ...]:
        """What is evaluated on, in the order of the settings."""
        return tuple(self._sets(config))

    def _sets(self, config: RunConfig) -> Iterator[EvaluationSet]:
        weights = {entry.name: entry.weight for entry in config.data.eval_sets}
        for name, folder in self.eval_sets.items():
            yield EvaluationSet(name, PackedRows(folder, config.seq_length), weights.get(name or "", 1.0))
