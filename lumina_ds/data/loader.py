"""Packed rows as arrays for the model, and the order in which ranks read them. numpy only; training wraps
the arrays in tensors.

The order is a stream of positions: position p is row p % num_rows of epoch p // num_rows, shuffled per
epoch. A step takes the next G positions, G being the rows of a global batch, so which rows a step trains
depends on G alone, and the whole state of the loader is one integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lumina_ds.data.sampler import EpochOrder
from lumina_ds.data.shards.folder import Origin, ShardFolder
from lumina_ds.errors import DataError

IGNORED_LABEL = -100
PAD_ID = 0
FILLER_ROW = -1
POSITIONS_PER_BLOCK = 4096


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
    row_seeds: tuple[int, ...] | None = None  # of the routers' noise, per row; None where there is none


@dataclass(frozen=True)
class RowShare:
    """Which rows a reader gets: those of number `rank` among `size`; and of each the slice `part` of `num_parts`."""

    rank: int
    size: int
    part: int = 0
    num_parts: int = 1

    def cut(self, batch: MicroBatch) -> MicroBatch:
        """The slice of a micro-batch, [B, S / num_parts]; its documents stay those of the whole rows."""
        if self.num_parts == 1:
            return batch
        length = batch.input_ids.shape[1] // self.num_parts
        columns = slice(self.part * length, (self.part + 1) * length)
        labels, padding_mask = batch.labels[:, columns], batch.padding_mask[:, columns]
        return replace(
            batch,
            # Slices of rows are no contiguous memory, which is what a copy to the device wants.
            input_ids=np.ascontiguousarray(batch.input_ids[:, columns]),
            position_ids=np.ascontiguousarray(batch.position_ids[:, columns]),
            labels=np.ascontiguousarray(labels),
            padding_mask=np.ascontiguousarray(padding_mask),
            num_trained_tokens=int(np.count_nonzero(labels != IGNORED_LABEL)),
            num_tokens=int(np.count_nonzero(padding_mask)),
        )


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
        return self._plan.describe_losses(self.folder.manifest.totals.tokens)

    def origins(self, row_id: int) -> list[Origin]:
        """Source file and line of every conversation in a row, in order; none for a filler."""
        return [self.folder.origin(document) for document, _, _ in self._plan.row(row_id)] if row_id >= 0 else []

    def collate(self, row_ids: Sequence[int]) -> MicroBatch:
        """Gather rows by number; -1 gives an all-padding row of PAD_ID.

        Conversations may be as short as a sentence, so nothing is done for each of them in Python.
        """
        shape = (len(row_ids), self.seq_length)
        documents, starts, lengths, counts = self._plan.segments([row for row in row_ids if row != FILLER_ROW])
        row_of_segment = np.repeat(np.flatnonzero(np.array(row_ids) != FILLER_ROW), counts)
        filled = np.bincount(row_of_segment, lengths, len(row_ids)).astype(np.int64)
        # Segments of a row stand without gaps, so a row's padding is all that lies between the rows.
        padding = self.seq_length - filled
        places = np.cumsum(lengths) - lengths + (np.cumsum(padding) - padding)[row_of_segment]
        tokens = np.full(shape, PAD_ID, self.folder.ids_dtype)
        is_target = np.zeros(shape, np.uint8)
        self.folder.gather(documents, starts, lengths, places, tokens.reshape(-1), is_target.reshape(-1))
        # The first token of a segment is no target: its predecessor in the row belongs to another document.
        is_target.reshape(-1)[places] = 0
        input_ids = tokens.astype(np.int64)
        labels = np.full(shape, IGNORED_LABEL, np.int64)
        trained = is_target[:, 1:] == 1
        np.copyto(labels[:, :-1], input_ids[:, 1:], where=trained)
        document_lengths = _with_padding(lengths, np.bincount(row_of_segment, minlength=len(row_ids)), padding)
        return MicroBatch(
            input_ids=input_ids,
            labels=labels,
            position_ids=_positions(np.array(document_lengths)).reshape(shape),
            document_lengths=tuple(document_lengths),
            num_trained_tokens=int(np.count_nonzero(trained)),
            num_tokens=int(filled.sum()),
            row_ids=tuple(row_ids),
            padding_mask=np.arange(self.seq_length) < filled[:, None],
        )


def _with_padding(lengths: np.ndarray, counts: np.ndarray, padding: np.ndarray) -> list[int]:
    """Lengths of all segments in order, where the padding of a row is a segment after its `counts` own ones."""
    every, found, begin = lengths.tolist(), [], 0
    for count, padded in zip(counts.tolist(), padding.tolist(), strict=True):
        found += every[begin : begin + count] + [padded] * (padded > 0)
        begin += count
    return found


def _positions(lengths: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... from the start of each segment, int64."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1])) - np.repeat(ends - lengths, lengths)


class TrainingOrder:
    """The endless stream of rows. From position `total_rows` on, if given, there are only fillers (-1).

    The order is computed for a block of positions at a time, so its memory is that of one block, and any position
    is as near as the next.
    """

    def __init__(self, num_rows: int, seed: int, total_rows: int | None = None) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.total_rows = total_rows
        self._block: tuple[int, int, list[int]] = (-1, -1, [])  # epoch, number in the epoch, rows
        self.passed_over: tuple[tuple[int, int], ...] = ()

    def pass_over(self, first: int, count: int) -> list[int]:
        """Take `count` positions from `first` on out of the stream; what follows moves up. Returns their rows.

        `passed_over` then holds them as (first, count) in the stream without any of this, ascending: all that a
        resumed run must know of it.
        """
        rows = [self.row_at(position) for position in range(first, first + count)]
        taken = [(start, length) for start, length in self.passed_over]
        taken += [(self._in_whole_stream(position), 1) for position in range(first, first + count)]
        self.passed_over = tuple(_merged(sorted(taken)))
        return rows

    @property
    def num_positions(self) -> int | None:
        """Positions before the filler; None for an endless stream."""
        if self.total_rows is None:
            return None
        return self.total_rows - sum(max(0, min(c, self.total_rows - first)) for first, c in self.passed_over)

    def _in_whole_stream(self, position: int) -> int:
        for first, count in self.passed_over:
            if position >= first:
                position += count
        return position

    def row_at(self, position: int) -> int:
        position = self._in_whole_stream(position)
        if self.total_rows is not None and position >= self.total_rows:
            return FILLER_ROW
        epoch, offset = divmod(position, self.num_rows)
        block, place = divmod(offset, POSITIONS_PER_BLOCK)
        held = self._block  # one reference: the loop and its read-ahead thread both come here
        if held[:2] != (epoch, block):
            first = block * POSITIONS_PER_BLOCK
            positions = np.arange(first, min(first + POSITIONS_PER_BLOCK, self.num_rows))
            rows = EpochOrder(self.num_rows, self.seed, epoch).rows_at(positions).tolist()
            held = self._block = (epoch, block, rows)
        return held[2][place]

    def epoch_at(self, position: int) -> float:
        """Passes over the data that are complete before `position`."""
        return self._in_whole_stream(position) / self.num_rows

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


def _merged(intervals: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending (first, count) without neighbours that touch."""
    merged: list[tuple[int, int]] = []
    for first, count in intervals:
        if merged and sum(merged[-1]) == first:
            merged[-1] = (merged[-1][0], merged[-1][1] + count)
        else:
            merged.append((first, count))
    return merged


def evaluation_rows(num_rows: int, rank: int, world_size: int, micro_batch_size: int) -> list[list[int]]:
    """Every row once over all ranks, in order; each rank gets the same number of micro-batches, filled with -1."""
    rows_per_round = micro_batch_size * world_size
    num_rounds = -(-num_rows // rows_per_round)
    starts = (number * rows_per_round + rank * micro_batch_size for number in range(num_rounds))
    return [
        [row if row < num_rows else FILLER_ROW for row in range(start, start + micro_batch_size)] for start in starts
    ]
