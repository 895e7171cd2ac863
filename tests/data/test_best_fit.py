"""Best-fit decreasing, compiled and not, beside a reference that looks at every row for every segment."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_ds.data import packing
from lumina_ds.data.packing import best_fit_rows


def reference(lengths: list[int], seq_length: int) -> list[int]:
    rows: list[int] = []
    rooms: list[int] = []
    changed: list[int] = []  # the segment after which a row had its present room
    for segment, length in enumerate(lengths):
        fitting = [row for row, room in enumerate(rooms) if room >= length]
        if fitting:
            row = min(fitting, key=lambda row: (rooms[row], -changed[row]))
        else:
            row = len(rooms)
            rooms.append(seq_length)
            changed.append(0)
        rooms[row] -= length
        changed[row] = segment
        rows.append(row)
    return rows


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90))
def test_equals_the_reference_compiled_and_not(lengths: list[int], seq_length: int) -> None:
    lengths = sorted(lengths, reverse=True)
    expected = reference(lengths, seq_length)
    assert best_fit_rows(np.array(lengths, np.int64), seq_length).tolist() == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_loop", lambda: packing._fill)
        assert best_fit_rows(np.array(lengths, np.int64), seq_length).tolist() == expected


def test_the_loop_is_compiled_here() -> None:
    assert hasattr(packing._loop(), "nopython_signatures")
