"""Best-fit decreasing: which row takes each segment. One loop over plain arrays, compiled by numba where that is there.

Packing is the part of the offline stage that waits for all the others, so more workers cannot hide it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import numpy as np

log = logging.getLogger(__name__)


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
