"""Which documents share a row: a pure function of the documents' lengths, so any row length can be planned
from a finished shard folder without tokenizing again.

A plan is a list of rows, each a run of segments (document, start, length) that never sums above the row
length. Modes: `best_fit` keeps documents whole and fills rows tightly, `concat` fills every row and cuts
documents at its end, `none` gives each document a row. Where a document is cut, the next segment begins
with the last token of the one before: a token is trained from its predecessor, so without that overlap
the first token after every cut would never be a target.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, get_args

import numpy as np

from lumina_ds.text import counted

log = logging.getLogger(__name__)

Packing = Literal["best_fit", "concat", "none"]
Overlong = Literal["truncate", "split", "drop"]

# Best-fit looks at so many documents at a time: enough to fill rows, and bounded time and memory for any corpus.
DOCUMENTS_PER_BLOCK = 65_536
_ROWS_PER_PART = 65_536


# (documents, starts, lengths) of segments -> bool [segments]: does a token beyond the first count as a label?
HasLabels = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Segment(NamedTuple):
    """Tokens start .. start+length-1 of one document."""

    document: int
    start: int
    length: int


@dataclass(frozen=True)
class PackingPlan:
    """Rows of segments in flat arrays: row r holds segments row_offsets[r] .. row_offsets[r+1]-1.

    Where the plan was read from a file, the arrays are views of it, and all but `documents` are int32.

    num_dropped: documents that no row holds, being overlong. num_truncated: documents that lost their end.
    num_without_labels: pieces of documents that no row holds because nothing in them would be trained.
    """

    seq_length: int
    row_offsets: np.ndarray  # [rows + 1] int64
    documents: np.ndarray  # [segments] int64
    starts: np.ndarray  # [segments] int64
    lengths: np.ndarray  # [segments] int64
    num_dropped: int
    num_truncated: int
    num_without_labels: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def fullness(self) -> float:
        """Share of the rows' positions that hold a token."""
        return float(self.lengths.sum()) / max(1, self.num_rows * self.seq_length)

    def describe_losses(self, num_tokens: int) -> str | None:
        """One sentence on what `truncate` or `drop` takes away from a folder of `num_tokens`; None for nothing."""
        lost = 1 - float(self.lengths.sum()) / max(1, num_tokens)
        if self.num_without_labels:
            pieces = counted(self.num_without_labels, "piece")
            return f"{pieces} without a label token left out, {lost:.1%} of the tokens: they would train nothing"
        if not self.num_truncated and not self.num_dropped:
            return None
        return (
            f"{counted(self.num_truncated, 'conversation is', 'conversations are')} cut and {self.num_dropped:,} dropped at {self.seq_length} "
            f"tokens, which loses {lost:.1%} of the tokens; --overlong split keeps them"
        )

    def row_tokens(self, rows: np.ndarray) -> np.ndarray:
        """int64 [rows]: the tokens in each of some rows."""
        _, _, lengths, counts = self.segments(rows)
        return np.add.reduceat(lengths, np.cumsum(counts) - counts) if len(rows) else np.zeros(0, np.int64)

    def row(self, index: int) -> list[Segment]:
        begin, end = int(self.row_offsets[index]), int(self.row_offsets[index + 1])
        columns = (self.documents[begin:end], self.starts[begin:end], self.lengths[begin:end])
        return list(map(Segment, *(column.tolist() for column in columns)))

    def segments(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(documents, starts, lengths) of the segments of some rows, one row after the other, and how many each has."""
        chosen = np.asarray(rows, np.int64)
        begins = self.row_offsets[chosen].astype(np.int64)
        counts = self.row_offsets[chosen + 1] - begins
        places = np.repeat(begins - np.cumsum(counts) + counts, counts) + np.arange(int(counts.sum()))
        documents, starts, lengths = (column[places] for column in (self.documents, self.starts, self.lengths))
        return documents.astype(np.int64), starts.astype(np.int64), lengths.astype(np.int64), counts


def pack(
    lengths: np.ndarray,
    first_trained: np.ndarray,
    seq_length: int,
    mode: Packing = "best_fit",
    overlong: Overlong = "truncate",
    has_labels: HasLabels | None = None,
) -> PackingPlan:
    """Plan rows of `seq_length` tokens.

    lengths: tokens of each document. first_trained: position of its first trained token; a document whose
    first seq_length tokens hold no trained one is dropped rather than truncated to nothing to learn.
    has_labels: tells segments with a label token from those without, which then stand in no row of their own: a
    step on such a row would train nothing and report a loss of 0.
    `overlong` says what happens to documents longer than a row; `concat` cuts at row ends and ignores it.
    """
    assert mode in get_args(Packing) and overlong in get_args(Overlong) and seq_length >= 2
    labels = _Labels(lengths, has_labels)
    if mode == "concat":
        return _plan(map(labels.with_labels, _concat_parts(lengths, seq_length)), seq_length, 0, 0, labels)
    too_long = lengths > seq_length
    dropped = too_long & (first_trained >= seq_length) if overlong == "truncate" else too_long & (overlong == "drop")
    num_truncated = int((too_long & ~dropped).sum()) if overlong == "truncate" else 0
    parts = _document_parts(lengths, ~dropped, seq_length, mode, overlong, labels)
    return _plan(parts, seq_length, int(dropped.sum()), num_truncated, labels)


class _Part(NamedTuple):
    """Some rows of a plan, one after the other."""

    row_sizes: np.ndarray  # [rows], segments of each
    documents: np.ndarray  # [segments]
    starts: np.ndarray
    lengths: np.ndarray


class _Labels:
    """Leaves out what holds no label token, and counts it."""

    def __init__(self, lengths: np.ndarray, has_labels: HasLabels | None) -> None:
        self._lengths = lengths
        self._has_labels = has_labels
        self.num_left_out = 0

    def of(self, documents: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """bool [segments]. Whole documents have labels: a conversation without any is refused before."""
        found = np.ones(len(documents), bool)
        partial = np.flatnonzero(sizes < self._lengths[documents])
        if self._has_labels is not None and len(partial):
            found[partial] = self._has_labels(documents[partial], starts[partial], sizes[partial])
        return found

    def with_labels(self, part: _Part) -> _Part:
        """The rows of `part` in which some segment has a label."""
        row_of_segment = np.repeat(np.arange(len(part.row_sizes)), part.row_sizes)
        whole = part.lengths == self._lengths[part.documents]
        kept = np.bincount(row_of_segment, whole, len(part.row_sizes)) > 0
        open_rows = np.flatnonzero(~kept[row_of_segment])
        found = self.of(part.documents[open_rows], part.starts[open_rows], part.lengths[open_rows])
        kept |= np.bincount(row_of_segment[open_rows], found, len(part.row_sizes)) > 0
        self.num_left_out += int(part.row_sizes[~kept].sum())
        segments = kept[row_of_segment]
        return _Part(part.row_sizes[kept], part.documents[segments], part.starts[segments], part.lengths[segments])


def _document_parts(
    lengths: np.ndarray, kept: np.ndarray, seq_length: int, mode: Packing, overlong: Overlong, labels: _Labels
) -> Iterator[_Part]:
    for begin in range(0, len(lengths), DOCUMENTS_PER_BLOCK):
        documents = begin + np.flatnonzero(kept[begin : begin + DOCUMENTS_PER_BLOCK])
        documents, starts, sizes = _pieces(documents, lengths[documents], seq_length, overlong)
        if overlong == "split":
            found = labels.of(documents, starts, sizes)
            labels.num_left_out += int((~found).sum())
            documents, starts, sizes = documents[found], starts[found], sizes[found]
        if mode == "none":
            yield _Part(np.ones(len(documents), np.int64), documents, starts, sizes)
            continue
        rows = _best_fit(documents, starts, sizes, seq_length)
        # In a row, documents stand in corpus order: neighbouring reads, and a listing that reads naturally.
        order = np.lexsort((starts, documents, rows))
        yield _Part(np.bincount(rows), documents[order], starts[order], sizes[order])


def _pieces(
    documents: np.ndarray, lengths: np.ndarray, seq_length: int, overlong: Overlong
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, length) of each segment: one per document, but overlong ones are cut off or split."""
    if overlong != "split":
        return documents, np.zeros_like(documents), np.minimum(lengths, seq_length)
    # Pieces overlap by one token, so each one but the last brings seq_length - 1 on.
    counts = np.maximum(1, -(-(lengths - 1) // (seq_length - 1)))
    first_pieces = np.repeat(np.cumsum(counts) - counts, counts)
    starts = (np.arange(len(first_pieces)) - first_pieces) * (seq_length - 1)
    return np.repeat(documents, counts), starts, np.minimum(np.repeat(lengths, counts) - starts, seq_length)


def _best_fit(documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """Row of each segment, int64."""
    order = np.lexsort((starts, documents, -lengths))
    row_of_segment = np.empty(len(order), np.int64)
    row_of_segment[order] = best_fit_rows(lengths[order].astype(np.int64), seq_length)
    return row_of_segment


def best_fit_rows(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """int64 [segments]: the row of each. lengths: int64, 1 .. seq_length, the longest first.

    A segment goes into the fullest row that has room for it, of equally full ones into the latest to become so, and
    into a new row where none has.
    """
    rows = np.empty(len(lengths), np.int64)
    num_rooms = min(len(lengths), seq_length) + 1
    latest_with = np.full(seq_length + 1, -1, np.int64)
    _loop()(lengths, seq_length, np.empty(num_rooms, np.int64), latest_with, np.empty_like(rows), rows)
    return rows


@cache
def _loop() -> Callable[..., None]:
    try:
        import numba

        return numba.njit(cache=True, nogil=True)(_fill)
    except (ImportError, RuntimeError) as error:  # not there, or nowhere to keep its code
        log.info("packing without compiled code, several times slower: %s", error)
        return _fill


def _fill(
    lengths: np.ndarray,
    seq_length: int,
    rooms: np.ndarray,
    latest_with: np.ndarray,
    before: np.ndarray,
    rows: np.ndarray,
) -> None:
    """Write `rows`. rooms: the free lengths in use, in order. latest_with: by free length, the row that came to it last,
    -1 for none. before: of a row, the one that came to its free length before it."""
    num_rooms = num_rows = 0
    for segment in range(len(lengths)):
        length = lengths[segment]
        place = np.searchsorted(rooms[:num_rooms], length)
        if place == num_rooms:
            row, room = num_rows, seq_length
            num_rows += 1
        else:
            room = rooms[place]
            row = latest_with[room]
            latest_with[room] = before[row]
            if latest_with[room] < 0:
                num_rooms -= 1
                rooms[place:num_rooms] = rooms[place + 1 : num_rooms + 1]
        rows[segment] = row
        left = room - length
        if left:
            if latest_with[left] < 0:
                place = np.searchsorted(rooms[:num_rooms], left)
                rooms[place + 1 : num_rooms + 1] = rooms[place:num_rooms]
                rooms[place] = left
                num_rooms += 1
            before[row] = latest_with[left]
            latest_with[left] = row


def _concat_parts(lengths: np.ndarray, seq_length: int) -> Iterator[_Part]:
    """One step per row, not per document: where its last document ends is found in the running sum of the lengths."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    document = start = 0
    firsts: list[tuple[int, int, int, int]] = []  # per row: first document, start in it, documents begun, tokens
    while document < len(lengths):
        begin = int(ends[document]) + start
        # Every document has a token at least, so no more of them than tokens fit.
        fits = bisect_right(ends, begin + seq_length, document, min(len(ends), document + seq_length + 2)) - 1
        tokens = int(ends[fits]) - begin
        if fits < len(lengths) and seq_length - tokens >= 2:  # a single token has no successor to train on
            firsts.append((document, start, fits + 1 - document, seq_length))
            document, start = fits, seq_length - tokens - 1
        else:
            firsts.append((document, start, fits - document, tokens))
            document, start = fits, 0
        if len(firsts) >= _ROWS_PER_PART:
            yield _concat_part(np.array(firsts), lengths)
            firsts = []
    if firsts:
        yield _concat_part(np.array(firsts), lengths)


def _concat_part(rows: np.ndarray, lengths: np.ndarray) -> _Part:
    """The segments of rows that are given as (first document, start in it, number of documents, tokens)."""
    first, start, counts, tokens = rows.T
    last = np.cumsum(counts) - 1
    documents = np.repeat(first - (last + 1 - counts), counts) + np.arange(int(counts.sum()))
    starts = np.zeros_like(documents)
    starts[last + 1 - counts] = start
    sizes = lengths[documents].astype(np.int64) - starts
    # The last one is cut where the row is full.
    sizes[last] -= np.add.reduceat(sizes, last + 1 - counts) - tokens
    return _Part(counts, documents, starts, sizes)


def _plan(
    parts: Iterable[_Part], seq_length: int, num_dropped: int, num_truncated: int, labels: _Labels
) -> PackingPlan:
    empty = np.zeros(0, np.int64)
    columns = zip(_Part(empty, empty, empty, empty), *parts, strict=True)
    sizes, documents, starts, lengths = (np.concatenate(column).astype(np.int64, copy=False) for column in columns)
    row_offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64, copy=False)
    return PackingPlan(
        seq_length, row_offsets, documents, starts, lengths, num_dropped, num_truncated, labels.num_left_out
    )
