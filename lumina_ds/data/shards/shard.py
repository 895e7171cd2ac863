"""One shard file, read or mapped at its first use: documents by row, and segments of many at once."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from lumina_ds.data.shards.arrow_columns import numbers
from lumina_ds.data.shards.arrow_stream import file_buffer, record_batches
from lumina_ds.data.shards.manifest import ShardEntry
from lumina_ds.errors import DataError
from lumina_ds.files import file_digest
from lumina_ds.foreign_files import ForeignFileError, check_regular, shown

REMEDY = "restore it, or delete the folder and preprocess again"
# Longer segments, on average, are copied one by one; and fewer than these.
LONG_SEGMENT = 256
_MIN_TOGETHER = 8


class Batch(NamedTuple):
    offsets: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    table: pa.RecordBatch


class _Flat(NamedTuple):
    """A whole shard file as arrays of each of its types, and where in them the columns of each batch begin."""

    offsets: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    first_rows: np.ndarray
    starts_of: np.ndarray  # [batches, 3]: elements of `offsets`, `ids`, `mask`


class Shard:
    """One shard file, read or mapped at its first use."""

    def __init__(self, path: Path, entry: ShardEntry, schema: pa.Schema, in_memory: bool) -> None:
        self._path = path
        self._entry = entry
        self._schema = schema
        self._in_memory = in_memory
        self._batches: list[Batch] | None = None
        self._first_rows: list[int] = []
        self._flat: _Flat | None = None
        self._changed_at: int | None = None

    def check_size(self) -> None:
        """Raises DataError where the file is missing, has another size than the manifest says, or was rewritten since
        the last call with other content."""
        try:
            found = self._path.lstat()
            check_regular(found.st_mode)
            is_another = (
                self._changed_at not in (None, found.st_mtime_ns) and file_digest(self._path) != self._entry.sha256
            )
        except OSError as error:
            raise DataError(f"cannot read {self._path}: {error.strerror}; {REMEDY}") from error
        except ForeignFileError as error:
            raise DataError(f"{self._path} is damaged: it {error}; {REMEDY}") from None
        if found.st_size != self._entry.size_bytes:
            raise DataError(f"{self._path} is damaged: {found.st_size} bytes, not {self._entry.size_bytes}; {REMEDY}")
        if is_another:
            raise DataError(f"{self._path} was replaced by another file since the folder was opened; {REMEDY}")
        self._changed_at = found.st_mtime_ns

    def load(self) -> list[Batch]:
        """The shard's record batches. Two threads may come here at once: both make the same."""
        if self._batches is None:
            self.check_size()  # again, for a streamed shard: reading beyond the end of a mapping kills the process
            batches, file = _read_shard(self._path, self._entry, self._schema, self._in_memory)
            self._first_rows = list(accumulate((len(batch.offsets) - 1 for batch in batches), initial=0))
            self._flat = _flat_view(batches, file, self._first_rows)
            self._batches = batches
        return self._batches

    def locate(self, row: int) -> tuple[Batch, int]:
        batches = self._batches or self.load()
        number = bisect_right(self._first_rows, row) - 1
        return batches[number], row - self._first_rows[number]

    def origin(self, row: int) -> tuple[str, int]:
        """Source and line of a row."""
        batch, own = self.locate(row)
        try:
            _check_sources(batch)
        except pa.ArrowException as error:
            raise DataError(f"{self._path} is damaged: {_phrase(error)}; {REMEDY}") from error
        return batch.table.column("source")[own].as_py(), batch.table.column("line")[own].as_py()

    def content_fault(self, vocab_size: int) -> str | None:
        """What no digest tells of the file: ids that the tokenizer does not have, other masks than 0 and 1, sources
        that are no text, columns that disagree. A phrase, None for nothing. Reads every byte, and keeps none."""
        try:
            batches, _ = _batches_of(self._path, self._entry, self._schema, self._in_memory)
            for batch in batches:
                if fault := token_fault(batch.ids, batch.mask, vocab_size):
                    return fault
                _check_sources(batch)
        except (pa.ArrowException, OSError, ValueError) as error:
            return _phrase(error)
        return None

    def has_labels(self, rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """As ShardFolder.has_labels, for rows of this shard."""
        found = np.zeros(len(rows), bool)
        batches, first_rows = self.load(), np.array(self._first_rows)
        numbers = np.searchsorted(first_rows, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            here = np.flatnonzero(numbers == number)
            begins = batches[number].offsets[rows[here] - first_rows[number]] + starts[here]
            found[here] = _any_between(batches[number].mask, begins + 1, begins + lengths[here])
        return found

    def gather(
        self,
        rows: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        places: np.ndarray,
        ids: np.ndarray,
        mask: np.ndarray,
    ) -> None:
        """As ShardFolder.gather, for rows of this shard."""
        self.load()
        flat = self._flat
        if flat is None or len(rows) < _MIN_TOGETHER:
            for row, start, length, place in zip(*(x.tolist() for x in (rows, starts, lengths, places)), strict=True):
                batch, own = self.locate(row)
                begin = int(batch.offsets[own]) + start
                check_inside(self._path, begin + length <= batch.offsets[own + 1])
                ids[place : place + length] = batch.ids[begin : begin + length]
                mask[place : place + length] = batch.mask[begin : begin + length]
            return
        batches = np.searchsorted(flat.first_rows, rows, side="right") - 1
        offsets_at, ids_at, mask_at = flat.starts_of[batches].T
        offsets_at = offsets_at + rows - flat.first_rows[batches]
        begins = flat.offsets[offsets_at] + starts
        check_inside(self._path, bool((begins + lengths <= flat.offsets[offsets_at + 1]).all()))
        first, total = int(places[0]), int(lengths.sum())
        # Source of every token: its own number in the run, plus what its segment is away from the run's start.
        away = begins - (places - first)
        counter = np.arange(total)
        ids[first : first + total] = flat.ids[np.repeat(away + ids_at, lengths) + counter]
        mask[first : first + total] = flat.mask[np.repeat(away + mask_at, lengths) + counter]


def _any_between(mask: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """bool [segments]: whether mask[begin:end] of each has anything."""
    found = np.zeros(len(begins), bool)
    # reduceat takes no end behind the last element, and gives an empty segment its neighbour's.
    together = (begins < ends) & (ends < len(mask))
    if together.any():
        bounds = np.stack([begins[together], ends[together]], axis=1).ravel()
        found[together] = np.maximum.reduceat(mask, bounds)[::2] > 0
    for index in np.flatnonzero(~together).tolist():
        found[index] = mask[begins[index] : ends[index]].any()
    return found


def _flat_view(batches: list[Batch], file: pa.Buffer, first_rows: list[int]) -> _Flat | None:
    """None where Arrow has put a column elsewhere, as it does with columns that the file does not align."""
    whole = np.frombuffer(file, np.uint8)
    base = whole.ctypes.data
    columns = [(batch.offsets, batch.ids, batch.mask) for batch in batches if len(batch.ids)]
    if len(columns) != len(batches):
        return None
    bytes_at = np.array([[column.ctypes.data - base for column in each] for each in columns], np.int64)
    sizes = np.array([column.itemsize for column in columns[0]]) if columns else np.ones(3, np.int64)
    if not columns or bytes_at.min() < 0 or bytes_at.max() >= len(whole) or (bytes_at % sizes).any():
        return None
    offsets, ids, mask = (whole[: len(whole) // c.itemsize * c.itemsize].view(c.dtype) for c in columns[0])
    return _Flat(offsets, ids, mask, np.array(first_rows), bytes_at // sizes)


def _read_shard(path: Path, entry: ShardEntry, schema: pa.Schema, in_memory: bool) -> tuple[list[Batch], pa.Buffer]:
    try:
        return _batches_of(path, entry, schema, in_memory)
    except OSError as error:
        raise DataError(f"cannot read {path}: {_phrase(error)}; {REMEDY}") from error
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{path} is damaged: {_phrase(error)}; {REMEDY}") from error


def _batches_of(path: Path, entry: ShardEntry, schema: pa.Schema, in_memory: bool) -> tuple[list[Batch], pa.Buffer]:
    source = file_buffer(path, in_memory)
    batches = [_views(table) for table in record_batches(source, schema)[1]]
    rows, tokens = sum(len(batch.offsets) - 1 for batch in batches), sum(len(batch.ids) for batch in batches)
    if (rows, tokens) != (entry.rows, entry.tokens):
        raise ValueError(f"{rows} rows of {tokens} tokens, not {entry.rows} of {entry.tokens}")
    return batches, source


def _views(table: pa.RecordBatch) -> Batch:
    ids, mask = table.column("input_ids"), table.column("loss_mask")
    offsets = numbers(ids.offsets)
    # Arrow checks none of this: a flipped bit in an offset would silently read another document's tokens.
    if not np.array_equal(offsets, numbers(mask.offsets)) or len(ids.values) != len(mask.values):
        raise ValueError("the lengths of its columns disagree")
    if len(table) and (offsets[0] != 0 or offsets[-1] != len(ids.values) or not (offsets[1:] > offsets[:-1]).all()):
        raise ValueError("a document lies outside its column")
    if not np.array_equal(np.diff(offsets), numbers(table.column("num_tokens"))):
        raise ValueError("the lengths of its columns disagree")
    return Batch(offsets, numbers(ids.values), numbers(mask.values), table)


def token_fault(ids: np.ndarray, mask: np.ndarray, vocab_size: int) -> str | None:
    """What is wrong with tokens and their masks, as a phrase; None for nothing."""
    if not ids.size:
        return None
    if (highest := int(ids.max())) >= vocab_size:
        return f"holds the id {highest}, and its tokenizer has {vocab_size} ids"
    if (highest := int(mask.max())) > 1:
        return f"has {highest} in a loss mask, not 0 or 1"
    return None


def check_inside(path: Path, is_inside: bool) -> None:
    """Raises DataError where a packing plan asks for tokens that a document of the shard does not have."""
    if not is_inside:
        raise DataError(f"a packing plan beside {path} names tokens beyond the end of a conversation; {REMEDY}")


def _check_sources(batch: Batch) -> None:
    """Arrow reads wherever an offset of a text leads. Raises pa.ArrowException."""
    batch.table.column("source").validate(full=True)


def _phrase(error: Exception) -> str:
    """What Arrow, the kernel or we say of a file, on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown(text.partition("\n")[0])
