"""Packed rows as arrays for the model, and the order in which ranks read them. numpy only; training wraps
the arrays in tensors.

The order is a stream of positions: position p is row p % num_rows of epoch p // num_rows, shuffled per
epoch. A step takes the next G positions, G being the rows of a global batch, so which rows a step trains
depends on G alone, and the whole state of the loader is one integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lumina_ds.data.sampler import epoch_order
from lumina_ds.data.shards import ShardFolder
from lumina_ds.errors import DataError

IGNORED_LABEL = -100
PAD_ID = 0
FILLER_ROW = -1


@dataclass(frozen=True)
class MicroBatch:
    """B packed rows of S positions.

    labels[b, i] is the token at i+1 where that is a trained target of the same document, else -100.
    position_ids restart at 0 at every document. document_lengths are the segments of the flattened B*S
    positions in order; a row's padding is a segment of its own, so they sum to B*S.
    """

    input_ids: np.ndarray  # [B, S] int64
    labels: np.ndarray  # [B, S] int64
    position_ids: np.ndarray  # [B, S] int64
    document_lengths: tuple[int, ...]
    num_trained_tokens: int  # labels that are not -100
    num_tokens: int  # positions that are not padding
    row_ids: tuple[int, ...]  # packed-row number per row, -1 for a filler
    padding_mask: np.ndarray  # [B, S] bool, True where a real token stands


class PackedRows:
    """The rows of one shard folder at one row length. Raises DataError when no row can be made."""

    def __init__(self, folder: ShardFolder, seq_length: int) -> None:
        self.folder = folder
        self._plan = folder.packing(seq_length)
        self.seq_length = seq_length
        self.num_rows = self._plan.num_rows
        if self.num_rows == 0:
            raise DataError(
                f"{folder.path} gives no row of {seq_length} tokens: its conversations are longer; "
                "raise --seq-length, or preprocess with --overlong split"
            )

    def describe_losses(self) -> str | None:
        """One sentence on conversations cut or dropped at this row length; None for nothing."""
        return self._plan.describe_losses(int(self.folder.lengths.sum()))

    def collate(self, row_ids: Sequence[int]) -> MicroBatch:
        """Gather rows by number; -1 gives an all-padding row of PAD_ID."""
        shape = (len(row_ids), self.seq_length)
        input_ids = np.full(shape, PAD_ID, np.int64)
        labels = np.full(shape, IGNORED_LABEL, np.int64)
        position_ids = np.empty(shape, np.int64)
        document_lengths: list[int] = []
        num_tokens = 0
        filled = np.zeros(len(row_ids), np.int64)
        for index, row_id in enumerate(row_ids):
            lengths = self._fill(row_id, input_ids[index], labels[index], position_ids[index])
            filled[index] = sum(lengths)
            document_lengths += lengths
            padding = self.seq_length - int(filled[index])
            if padding:
                position_ids[index, -padding:] = np.arange(padding)
                document_lengths.append(padding)
            num_tokens += int(filled[index])
        return MicroBatch(
            input_ids=input_ids,
            labels=labels,
            position_ids=position_ids,
            document_lengths=tuple(document_lengths),
            num_trained_tokens=int(np.count_nonzero(labels != IGNORED_LABEL)),
            num_tokens=num_tokens,
            row_ids=tuple(row_ids),
            padding_mask=np.arange(self.seq_length) < filled[:, None],
        )

    def _fill(self, row_id: int, input_ids: np.ndarray, labels: np.ndarray, position_ids: np.ndarray) -> list[int]:
        """Write one row in place and return its segments' lengths."""
        lengths: list[int] = []
        cursor = 0
        for document, start, length in self._plan.row(row_id) if row_id != FILLER_ROW else ():
            ids, mask = self.folder.document(document)
            end = cursor + length
            input_ids[cursor:end] = ids[start : start + length]
            # The last position of a segment has no target: its successor is another document's or another row's.
            targets = ids[start + 1 : start + length].astype(np.int64)
            labels[cursor : end - 1] = np.where(mask[start + 1 : start + length] == 1, targets, IGNORED_LABEL)
            position_ids[cursor:end] = np.arange(length)
            lengths.append(length)
            cursor = end
        return lengths


class TrainingOrder:
    """The endless stream of rows. From position `total_rows` on, if given, there are only fillers (-1)."""

    def __init__(self, num_rows: int, seed: int, total_rows: int | None = None) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.total_rows = total_rows
        self._epoch = -1
        self._order = np.zeros(0, np.int64)

    def row_at(self, position: int) -> int:
        if self.total_rows is not None and position >= self.total_rows:
            return FILLER_ROW
        epoch, offset = divmod(position, self.num_rows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.num_rows, self.seed, epoch)
        return int(self._order[offset])

    def epoch_at(self, position: int) -> float:
        """Passes over the data that are complete before `position`."""
        return position / self.num_rows

    def step_rows(
        self, step: int, micro_batch: int, rank: int, world_size: int, micro_batch_size: int, accumulation: int
    ) -> list[int]:
        """Rows of micro-batch `micro_batch` of `rank` in `step`, both counted from 0.

        A step holds G = micro_batch_size * accumulation * world_size positions from step * G on; they are dealt
        out by micro-batch first and rank second, so the set of a step's rows depends on G alone.
        """
        rows_per_step = micro_batch_size * accumulation * world_size
        first = step * rows_per_step + (micro_batch * world_size + rank) * micro_batch_size
        return [self.row_at(position) for position in range(first, first + micro_batch_size)]


def evaluation_rows(num_rows: int, rank: int, world_size: int, micro_batch_size: int) -> list[list[int]]:
    """Every row once over all ranks, in order; each rank gets the same number of micro-batches, filled with -1."""
    rows_per_round = micro_batch_size * world_size
    num_rounds = -(-num_rows // rows_per_round)
    starts = (number * rows_per_round + rank * micro_batch_size for number in range(num_rounds))
    return [
        [row if row < num_rows else FILLER_ROW for row in range(start, start + micro_batch_size)] for start in starts
    ]
