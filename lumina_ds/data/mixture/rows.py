"""The packed rows of several sources under one numbering. Rows are packed within a source, so each has one."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby

import numpy as np

from lumina_ds.config.schema import DataConfig
from lumina_ds.data.loader import MicroBatch, PackedRows
from lumina_ds.data.mixture.order import MixtureOrder, SourceStream
from lumina_ds.data.mixture.shares import Weights, mixture_weights
from lumina_ds.data.sampler import FILLER_ROW
from lumina_ds.data.shards.folder import Origin, ShardFolder
from lumina_ds.errors import DataError


class MixedRows:
    """Rows of all sources; those of the first name come first. The interface is that of PackedRows."""

    def __init__(self, sources: Mapping[str, PackedRows]) -> None:
        """Raises DataError where the sources were made with different tokenizers or chat templates."""
        self.names = tuple(sorted(sources))
        self.sources = tuple(sources[name] for name in self.names)
        self._first_rows = list(accumulate((rows.num_rows for rows in self.sources), initial=0))
        self.num_rows = self._first_rows[-1]
        self.seq_length = self.sources[0].seq_length
        for name, rows in zip(self.names, self.sources, strict=True):
            self._check_made_alike(name, rows)

    def _check_made_alike(self, name: str, rows: PackedRows) -> None:
        first, other = self.folder.manifest, rows.folder.manifest
        for what, same in (
            ("tokenizer", first.tokenizer.digest == other.tokenizer.digest),
            ("chat template", first.template.digest == other.template.digest),
        ):
            if not same:
                raise DataError(
                    f"the sources {self.names[0]} and {name} were made with different {what}s ({self.folder.path}, "
                    f"{rows.folder.path}); preprocess one of them again"
                )

    @property
    def folder(self) -> ShardFolder:
        """That of the first source, for what all have in common: the tokenizer and the chat template."""
        return self.sources[0].folder

    @property
    def folders(self) -> list[ShardFolder]:
        """Of all sources."""
        return [rows.folder for rows in self.sources]

    @property
    def digest(self) -> str:
        """Of the names and the shards of all sources, in the order of the names."""
        listed = [f"{name} {rows.digest}\n" for name, rows in zip(self.names, self.sources, strict=True)]
        return hashlib.sha256("".join(listed).encode()).hexdigest()

    @property
    def num_tokens(self) -> dict[str, int]:
        """Tokens of each source's rows."""
        return {name: rows.num_tokens for name, rows in zip(self.names, self.sources, strict=True)}

    def weights(self, data: DataConfig) -> Weights:
        """What the settings of the sources come to."""
        return mixture_weights(data.sources, self.num_tokens, data.temperature)

    def order(self, data: DataConfig, seed: int, passes: float | None) -> MixtureOrder:
        """The order in which a run of `passes` reads the rows; None for one that ends by steps."""
        streams = [
            SourceStream.of(name, rows.num_rows, rows.num_tokens, first, seed, rows.row_tokens)
            for name, rows, first in zip(self.names, self.sources, self._first_rows, strict=False)
        ]
        caps = {source.name: source.cap for source in data.sources}
        return MixtureOrder(streams, self.weights(data), caps, seed, passes)

    def describe_losses(self) -> str | None:
        """A sentence for each source that loses conversations at this row length; None for none."""
        named = ((name, rows.describe_losses()) for name, rows in zip(self.names, self.sources, strict=True))
        return "; ".join(f"{name}: {losses}" for name, losses in named if losses) or None

    def origins(self, row_id: int) -> list[Origin]:
        """Source file and line of every conversation in a row, in order; none for a filler."""
        if row_id == FILLER_ROW:
            return []
        source = self._source_of(row_id)
        return self.sources[source].origins(row_id - self._first_rows[source])

    def collate(self, row_ids: Sequence[int]) -> MicroBatch:
        """As PackedRows.collate, with the source of every row."""
        row_sources = tuple(map(self._source_of, row_ids))
        parts = []
        for source, run in groupby(zip(row_sources, row_ids, strict=True), key=lambda each: each[0]):
            first = self._first_rows[source] if source >= 0 else 0
            parts.append(self.sources[max(0, source)].collate([row - first for _, row in run]))
        return MicroBatch(
            input_ids=np.concatenate([part.input_ids for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
            position_ids=np.concatenate([part.position_ids for part in parts]),
            document_lengths=tuple(length for part in parts for length in part.document_lengths),
            num_trained_tokens=sum(part.num_trained_tokens for part in parts),
            num_tokens=sum(part.num_tokens for part in parts),
            row_ids=tuple(row_ids),
            padding_mask=np.concatenate([part.padding_mask for part in parts]),
            row_sources=row_sources,
            num_sources=len(self.sources),
        )

    def _source_of(self, row_id: int) -> int:
        """Number of the source that has a row; -1 for a filler."""
        return bisect_right(self._first_rows, row_id) - 1 if row_id != FILLER_ROW else -1
