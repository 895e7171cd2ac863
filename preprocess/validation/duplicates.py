"""Exact duplicates among any number of conversations, in bounded memory.

Digests of 128 bits are kept in sorted runs, spilled to a temporary file beyond the first. At the end one slice of
the digests' range after the other is gathered from all runs, so memory holds a run or a slice, never the corpus.
"""

from __future__ import annotations

import hashlib
import heapq
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lumina_ds.data.conversation import Turn
from lumina_ds.report.data.visible import excerpt
from preprocess.validation.rules import beginning

RECORDS_PER_RUN = 1 << 16
MAX_PLACES = 4
_BEGINNING_BYTES = 72
_RECORD = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("input", "<u4"), ("line", "<u8"), ("beginning", f"S{_BEGINNING_BYTES}")]
)


@dataclass(frozen=True)
class Repeat:
    """A conversation that stands several times: where first, and where the other times (a few of them)."""

    times: int
    places: list[tuple[int, int]]  # (input number, line), in order, at most MAX_PLACES
    excerpt: str


class DuplicateFinder:
    """Takes conversations in order; repeats() tells which stood before. Use as a context manager."""

    def __init__(self, records_per_run: int = RECORDS_PER_RUN) -> None:
        self._records_per_run = records_per_run
        self._pending: list[tuple[int, int, int, int, bytes]] = []
        self._spilled: Any = None
        self._run_lengths: list[int] = []

    def __enter__(self) -> DuplicateFinder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._spilled is not None:
            self._spilled.close()

    def add(self, turns: Sequence[Turn], input_number: int, line: int) -> None:
        high, low = _digest(turns)
        self._pending.append((high, low, input_number, line, beginning(turns).encode()[:_BEGINNING_BYTES]))
        if len(self._pending) >= self._records_per_run:
            self._spill()

    def repeats(self, num_largest: int) -> tuple[int, list[Repeat]]:
        """(conversations that stood before, the `num_largest` most repeated ones, largest first)."""
        largest: list[tuple[int, int, int, Repeat]] = []
        num_duplicates = 0
        for group in self._groups():
            num_duplicates += len(group) - 1
            places = list(zip(group["input"].tolist(), group["line"].tolist(), strict=True))
            first = places[0]
            text = bytes(group["beginning"][0]).decode("utf-8", "ignore")
            # Equal counts are ordered by place, the earliest first, so that the list is the same every time.
            entry = (len(group), -first[0], -first[1], Repeat(len(group), places[:MAX_PLACES], excerpt(text)))
            if len(largest) < num_largest:
                heapq.heappush(largest, entry)
            elif largest and entry[:3] > largest[0][:3]:
                heapq.heapreplace(largest, entry)
        return num_duplicates, [entry[3] for entry in sorted(largest, key=lambda e: e[:3], reverse=True)]

    def _spill(self) -> None:
        if self._spilled is None:
            self._spilled = tempfile.TemporaryFile()
        run = _sorted(np.array(self._pending, _RECORD))
        self._spilled.write(run.tobytes())
        self._run_lengths.append(len(run))
        self._pending = []

    def _groups(self) -> Iterator[np.ndarray]:
        """Every set of two or more equal conversations, each in the order of the input."""
        for records in self._slices():
            changes = (np.diff(records["high"]) != 0) | (np.diff(records["low"]) != 0)
            borders = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(records)]])
            for number in np.flatnonzero(np.diff(borders) > 1).tolist():
                yield records[borders[number] : borders[number + 1]]

    def _slices(self) -> Iterator[np.ndarray]:
        """All records in slices of the digests' range, each sorted."""
        last = _sorted(np.array(self._pending, _RECORD))
        if not self._run_lengths:
            yield last
            return
        self._spilled.flush()
        ends = np.cumsum(self._run_lengths).tolist()
        stored = np.memmap(self._spilled, _RECORD, "r")
        runs = [stored[end - length : end] for end, length in zip(ends, self._run_lengths, strict=True)] + [last]
        # A run per slice keeps a slice about as large as a run, since digests are spread evenly.
        borders = [(1 << 64) * number // len(runs) for number in range(1, len(runs))]
        cuts = [[0, *run["high"].searchsorted(np.array(borders, np.uint64)).tolist(), len(run)] for run in runs]
        for number in range(len(runs)):
            parts = [run[cut[number] : cut[number + 1]] for run, cut in zip(runs, cuts, strict=True)]
            yield _sorted(np.concatenate(parts))


def _digest(turns: Sequence[Turn]) -> tuple[int, int]:
    # With its length before it, no content can pass for a turn of its own.
    text = "".join([f"{turn.role} {len(turn.content)} {turn.content}" for turn in turns])
    value = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(value[:8], "big"), int.from_bytes(value[8:], "big")


def _sorted(records: np.ndarray) -> np.ndarray:
    return records[np.lexsort((records["line"], records["input"], records["low"], records["high"]))]
