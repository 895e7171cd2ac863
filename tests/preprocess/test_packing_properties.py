"""Packing against a slow reference, and what holds for any corpus."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_ds.data import packing
from lumina_ds.data.packing import Overlong, Packing, Segment, pack

DOCUMENTS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 39)).map(lambda pair: (pair[0], min(pair[1], pair[0] - 1))), max_size=60)  # fmt: skip


def columns(documents: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([d[0] for d in documents], np.int64), np.array([d[1] for d in documents], np.int64)


def fullest_row_with_room(rows: list[list[Segment]], length: int, seq_length: int) -> list[Segment] | None:
    def room(row: list[Segment]) -> int:
        return seq_length - sum(segment.length for segment in row)

    fitting = [row for row in rows if room(row) >= length]
    return min(fitting, key=room) if fitting else None


@settings(max_examples=150, deadline=None, derandomize=True)
@given(DOCUMENTS, st.integers(2, 50))
def test_best_fit_decreasing_opens_as_many_rows_as_the_slow_reference(
    documents: list[tuple[int, int]], seq_length: int
) -> None:
    lengths, first_trained = columns(documents)
    rows: list[list[Segment]] = []
    for document in sorted(range(len(documents)), key=lambda d: (-lengths[d], d)):
        length = int(lengths[document])
        if length > seq_length:
            continue
        row = fullest_row_with_room(rows, length, seq_length)
        if row is None:
            rows.append(row := [])
        row.append(Segment(document, 0, length))
    plan = pack(lengths, first_trained, seq_length, "best_fit", "drop")
    made = [plan.row(index) for index in range(plan.num_rows)]
    # rows of equal room may be taken in any order, so fillings are compared, not members
    assert sorted(sorted(s.length for s in row) for row in made) == sorted(
        sorted(s.length for s in row) for row in rows
    )


@pytest.mark.parametrize("mode", ["best_fit", "concat", "none"])
@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(documents=DOCUMENTS, seq_length=st.integers(2, 50), block=st.sampled_from([1, 7, 65_536]))
def test_every_token_is_where_it_must_be(
    documents: list[tuple[int, int]], seq_length: int, block: int, mode: Packing, overlong: Overlong
) -> None:
    lengths, first_trained = columns(documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "DOCUMENTS_PER_BLOCK", block)
        plan = pack(lengths, first_trained, seq_length, mode, overlong)
    held: dict[int, list[Segment]] = {}
    for index in range(plan.num_rows):
        row = plan.row(index)
        assert row and sum(segment.length for segment in row) <= seq_length
        assert row == sorted(row)
        for segment in row:
            held.setdefault(segment.document, []).append(segment)
    for document, (length, first) in enumerate(documents):
        segments = sorted(held.get(document, []))
        if mode == "concat" or length <= seq_length or overlong == "split":
            # all of it, each piece from the last token of the one before, so that every token but the first is a target
            assert segments[0].start == 0 and segments[-1].start + segments[-1].length == length
            for one, other in pairwise(segments):
                assert other.start == one.start + one.length - 1
        elif overlong == "truncate" and first < seq_length:
            assert segments == [Segment(document, 0, seq_length)]
        else:
            assert segments == []
