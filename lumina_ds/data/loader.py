"""Packed rows as arrays for the model, gathered ahead of the training loop. numpy only; training wraps the arrays in
tensors. Which rows a step reads is sampler.py's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np

from lumina_ds.data.sampler import FILLER_ROW
from lumina_ds.data.shards.folder import Origin, ShardFolder
from lumina_ds.data.shards.shard import REMEDY, token_fault
from lumina_ds.errors import DataError

IGNORED_LABEL = -100
PAD_ID = 0
STEPS_AHEAD = 2

T = TypeVar("T")


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
    row_sources: tuple[int, ...] | None = None  # of a mixture, per row, -1 for a filler; None where there is one source
    num_sources: int = 0

    @cached_property
    def labels_by_source(self) -> list[int]:
        """Label tokens of each source of a mixture; none without one."""
        found = [0] * self.num_sources
        for source, labels in zip(self.row_sources or (), self.labels, strict=self.row_sources is not None):
            if source >= 0:
                found[source] += int(np.count_nonzero(labels != IGNORED_LABEL))
        return found


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

    @property
    def folders(self) -> list[ShardFolder]:
        """The one folder."""
        return [self.folder]

    @property
    def digest(self) -> str:
        """What a checkpoint knows these rows by."""
        return self.folder.digest

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return int(self._plan.lengths.sum(dtype=np.int64))

    def row_tokens(self, rows: np.ndarray) -> np.ndarray:
        """int64 [rows]: the tokens in each of some rows."""
        return self._plan.row_tokens(rows)

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
        if fault := token_fault(tokens, is_target, self.folder.manifest.tokenizer.vocab_size):
            raise DataError(f"{self.folder.path} {fault}; lumina data verify names the file: {REMEDY}")
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


class RandomRows:
    """Endless rows of one document each in place of a shard folder, every position trained; a row is a function of
    its number. For measurements that need no data.

    Random tokens spread over the experts about evenly, and rows hold no padding: what real data does to the balance of
    the experts and to the share of padding is measured with real shards.
    """

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


class Prefetcher(Generic[T]):
    """Makes the batches of the next STEPS_AHEAD steps in a thread while a step trains.

    One thread, because gathering rows is several times faster than any model reads them: what it hides is the
    waiting for pages of a folder that is larger than memory. `make` runs in that thread, for one step at a time.
    A batch is a pure function of its step, so what was read ahead is no state: a run that stops, resumes or goes back
    to an earlier step gets the batches that it would have made itself.
    """

    def __init__(self, make: Callable[[int], T], end: int) -> None:
        """`make(step)` gives a step's batch; nothing is made for step `end` or beyond before it is asked for."""
        self._make = make
        self._end = end
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: deque[tuple[int, Future[T]]] = deque()

    def take(self, step: int) -> T:
        """The batch of `step`; whatever `make` raised for it is raised here. A jump drops what was read ahead."""
        if not self._ahead or self._ahead[0][0] != step:
            self._drop()
            self._submit(step)
        _, batch = self._ahead.popleft()
        for following in range(step + 1 + len(self._ahead), min(step + 1 + STEPS_AHEAD, self._end)):
            self._submit(following)
        return batch.result()

    def close(self) -> None:
        """Drop what was read ahead and end the thread; waits for the batch it is making."""
        self._drop()
        self._thread.shutdown()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, step: int) -> None:
        self._ahead.append((step, self._thread.submit(self._make, step)))

    def _drop(self) -> None:
        for _, batch in self._ahead:
            batch.cancel()
        self._ahead.clear()


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
