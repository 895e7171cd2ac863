"""Which documents share a row: a pure function of the documents' lengths, so any row length can be planned
from a finished shard folder without tokenizing again.

A plan is a list of rows, each a run of segments (document, start, length) that never sums above the row
length. Modes: `best_fit` keeps documents whole and fills rows tightly, `concat` fills every row and cuts
documents at its end, `none` gives each document a row. Where a document is cut, the next segment begins
with the last token of the one before: a token is trained from its predecessor, so without that overlap
the first token after every cut would never be a target.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

Packing = Literal["best_fit", "concat", "none"]
Overlong = Literal["truncate", "split", "drop"]

# Best-fit looks at so many documents at a time: enough to fill rows, and bounded time and memory for any corpus.
DOCUMENTS_PER_BLOCK = 65_536


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
    """

    seq_length: int
    row_offsets: np.ndarray  # [rows + 1] int64
    documents: np.ndarray  # [segments] int64
    starts: np.ndarray  # [segments] int64
    lengths: np.ndarray  # [segments] int64
    num_dropped: int
    num_truncated: int

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
        if not self.num_truncated and not self.num_dropped:
            return None
        return (
            f"{self.num_truncated:,} conversations are cut and {self.num_dropped:,} dropped at {self.seq_length} "
            f"tokens, which loses {lost:.1%} of the tokens; --overlong split keeps them"
        )

    def row(self, index: int) -> list[Segment]:
        begin, end = int(self.row_offsets[index]), int(self.row_offsets[index + 1])
        columns = (self.documents[begin:end], self.starts[begin:end], self.lengths[begin:end])
        return list(map(Segment, *(column.tolist() for column in columns)))


def pack(
    lengths: np.ndarray,
    first_trained: np.ndarray,
    seq_length: int,
    mode: Packing = "best_fit",
    overlong: Overlong = "truncate",
) -> PackingPlan:
    """Plan rows of `seq_length` tokens.

    lengths: tokens of each document. first_trained: position of its first trained token; a document whose
    first seq_length tokens hold no trained one is dropped rather than truncated to nothing to learn.
    `overlong` says what happens to documents longer than a row; `concat` cuts at row ends and ignores it.
    """
    assert mode in get_args(Packing) and overlong in get_args(Overlong) and seq_length >= 2
    if mode == "concat":
        return _build(_concat_rows(lengths, seq_length), seq_length, num_dropped=0, num_truncated=0)
    too_long = lengths > seq_length
    dropped = too_long & (first_trained >= seq_length) if overlong == "truncate" else too_long & (overlong == "drop")
    num_truncated = int((too_long & ~dropped).sum()) if overlong == "truncate" else 0
    rows = _document_rows(lengths, dropped, seq_length, mode, overlong)
    return _build(rows, seq_length, int(dropped.sum()), num_truncated)


def _document_rows(
    lengths: np.ndarray, dropped: np.ndarray, seq_length: int, mode: Packing, overlong: Overlong
) -> Iterator[list[Segment]]:
    for begin in range(0, len(lengths), DOCUMENTS_PER_BLOCK):
        segments: list[Segment] = []
        for document, length in enumerate(lengths[begin : begin + DOCUMENTS_PER_BLOCK].tolist(), begin):
            if not dropped[document]:
                segments += _pieces(document, length, seq_length, overlong)
        yield from _best_fit(segments, seq_length) if mode == "best_fit" else ([segment] for segment in segments)


def _pieces(document: int, length: int, seq_length: int, overlong: Overlong) -> list[Segment]:
    if length <= seq_length:
        return [Segment(document, 0, length)]
    if overlong == "truncate":
        return [Segment(document, 0, seq_length)]
    starts = range(0, length - 1, seq_length - 1)
    return [Segment(document, start, min(seq_length, length - start)) for start in starts]


def _best_fit(segments: list[Segment], seq_length: int) -> list[list[Segment]]:
    """Best-fit decreasing: the longest segment first, each into the fullest row that still has room.

    `rooms` holds the distinct free lengths in order, so a row is found by bisection.
    """
    rows: list[list[Segment]] = []
    rooms: list[int] = []
    rows_with: dict[int, list[int]] = {}
    for segment in sorted(segments, key=lambda s: (-s.length, s.document, s.start)):
        position = bisect_left(rooms, segment.length)
        if position == len(rooms):
            row, room = len(rows), seq_length
            rows.append([])
        else:
            room = rooms[position]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[position]
        rows[row].append(segment)
        left = room - segment.length
        if left:
            if not rows_with.setdefault(left, []):
                insort(rooms, left)
            rows_with[left].append(row)
    # In a row, documents stand in corpus order: neighbouring reads, and a listing that reads naturally.
    return [sorted(row) for row in rows]


def _concat_rows(lengths: np.ndarray, seq_length: int) -> Iterator[list[Segment]]:
    row: list[Segment] = []
    room = seq_length
    for document, length in enumerate(lengths.tolist()):
        start = 0
        while True:
            if room < min(2, length - start):  # a single token has no successor to train on
                yield row
                row, room = [], seq_length
            taken = min(room, length - start)
            row.append(Segment(document, start, taken))
            room -= taken
            if start + taken == length:
                break
            start += taken - 1
            yield row
            row, room = [], seq_length
    if row:
        yield row


def _build(rows: Iterable[list[Segment]], seq_length: int, num_dropped: int, num_truncated: int) -> PackingPlan:
    """Flatten rows as they come: a tuple per segment would cost a large corpus gigabytes."""
    counts: list[int] = []
    chunks: list[np.ndarray] = []
    flat: list[Segment] = []
    for row in rows:
        flat += row
        counts.append(len(row))
        if len(flat) >= DOCUMENTS_PER_BLOCK:
            chunks.append(np.array(flat, np.int64))
            flat = []
    chunks.append(np.array(flat, np.int64).reshape(-1, 3))
    documents, starts, lengths = (np.ascontiguousarray(column) for column in np.concatenate(chunks).T)
    row_offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
    return PackingPlan(seq_length, row_offsets, documents, starts, lengths, num_dropped, num_truncated)
