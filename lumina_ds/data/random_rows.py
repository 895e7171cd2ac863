"""Rows of random tokens in place of a shard folder, for measurements that need no data.

Random tokens spread over the experts about evenly, and rows hold no padding: what real data does to the balance of
the experts and to the share of padding is measured with real shards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lumina_ds.data.loader import MicroBatch


class RandomRows:
    """Endless rows of one document each, every position trained; a row is a function of its number."""

    num_rows = 1 << 30

    def __init__(self, vocab_size: int, seq_length: int) -> None:
        self.vocab_size = vocab_size
        self.seq_length = seq_length

    def collate(self, row_ids: Sequence[int]) -> MicroBatch:
        """A micro-batch of the rows with these numbers."""
        shape = (len(row_ids), self.seq_length)
        drawn = [
            np.random.default_rng(row).integers(0, self.vocab_size, self.seq_length + 1, dtype=np.int64)
            for row in row_ids
        ]
        tokens = np.stack(drawn)
        return MicroBatch(
            input_ids=np.ascontiguousarray(tokens[:, :-1]),
            labels=np.ascontiguousarray(tokens[:, 1:]),
            position_ids=np.tile(np.arange(self.seq_length), (len(row_ids), 1)),
            document_lengths=(self.seq_length,) * len(row_ids),
            num_trained_tokens=shape[0] * shape[1],
            num_tokens=shape[0] * shape[1],
            row_ids=tuple(row_ids),
            padding_mask=np.ones(shape, dtype=bool),
        )
