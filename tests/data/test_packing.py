"""Rows by hand for each mode, and the invariants on random lengths."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lumina_ds.data import packing
from lumina_ds.data.packing import PackingPlan, pack


def rows(plan: PackingPlan) -> list[list[tuple[int, int, int]]]:
    return [[tuple(segment) for segment in plan.row(index)] for index in range(plan.num_rows)]


def plan(lengths: list[int], seq_length: int, first_trained: list[int] | None = None, **settings: str) -> PackingPlan:
    first = np.array(first_trained if first_trained is not None else [1] * len(lengths))
    return pack(np.array(lengths), first, seq_length, **settings)  # type: ignore[arg-type]


def test_best_fit_by_hand() -> None:
    # longest first: 7 opens row 0, 6 row 1, 4 fits in row 1 only, 3 in row 0 only, 1 opens row 2
    assert rows(plan([3, 7, 1, 6, 4], 10)) == [[(0, 0, 3), (1, 0, 7)], [(3, 0, 6), (4, 0, 4)], [(2, 0, 1)]]


def test_best_fit_takes_the_tightest_row() -> None:
    # after 6 and 8 the free lengths are 4 and 2: a 2 goes where 2 is free, though row 0 has room and comes first
    assert rows(plan([8, 6, 2, 4], 10)) == [[(0, 0, 8), (2, 0, 2)], [(1, 0, 6), (3, 0, 4)]]


def test_truncate_split_drop() -> None:
    truncated = plan([12, 3], 5, overlong="truncate")
    assert rows(truncated) == [[(0, 0, 5)], [(1, 0, 3)]]
    assert (truncated.num_truncated, truncated.num_dropped) == (1, 0)
    # each piece begins with the last token of the one before, so that tokens 1..11 are targets exactly once
    assert rows(plan([12, 1], 5, overlong="split")) == [[(0, 0, 5)], [(0, 4, 5)], [(0, 8, 4), (1, 0, 1)]]
    dropped = plan([12, 3], 5, overlong="drop")
    assert rows(dropped) == [[(1, 0, 3)]]
    assert (dropped.num_truncated, dropped.num_dropped) == (0, 1)


def test_truncation_keeps_a_trained_token_or_drops() -> None:
    # position 4 is the last of the row; a first trained token at 5 lies beyond it
    kept = plan([9, 9, 4], 5, first_trained=[4, 5, 3])
    assert rows(kept) == [[(0, 0, 5)], [(2, 0, 4)]]
    assert (kept.num_truncated, kept.num_dropped) == (1, 1)


def test_none_gives_each_document_a_row() -> None:
    assert rows(plan([2, 9, 3], 4, mode="none")) == [[(0, 0, 2)], [(1, 0, 4)], [(2, 0, 3)]]


def test_concat_cuts_at_row_ends() -> None:
    assert rows(plan([3, 6, 2], 5, mode="concat")) == [[(0, 0, 3), (1, 0, 2)], [(1, 1, 5)], [(2, 0, 2)]]
    # one free position cannot train anything of the next document: it stays padding
    assert rows(plan([4, 3], 5, mode="concat")) == [[(0, 0, 4)], [(1, 0, 3)]]


@pytest.mark.parametrize("mode", ["best_fit", "concat", "none"])
@pytest.mark.parametrize("overlong", ["truncate", "split", "drop"])
def test_invariants(mode: str, overlong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "DOCUMENTS_PER_BLOCK", 300)
    generator = np.random.default_rng(7)
    lengths = generator.integers(2, 90, 1000)
    first_trained = np.minimum(generator.integers(1, 60, 1000), lengths - 1)
    result = pack(lengths, first_trained, 64, mode, overlong)  # type: ignore[arg-type]
    targets: dict[int, list[int]] = {}
    for row in rows(result):
        assert 0 < sum(length for _, _, length in row) <= 64
        for document, start, length in row:
            assert start + length <= lengths[document]
            targets.setdefault(document, []).extend(range(start + 1, start + length))
    assert all(sorted(seen) == list(range(1, len(seen) + 1)) for seen in targets.values()), "a target twice or skipped"
    if overlong == "split" or mode == "concat":
        assert all(len(targets[document]) == length - 1 for document, length in enumerate(lengths))
    elif overlong == "drop":
        assert set(targets) == set(np.flatnonzero(lengths <= 64)) and result.num_dropped == (lengths > 64).sum()
    else:
        assert set(targets) == set(np.flatnonzero((lengths <= 64) | (first_trained < 64)))
    if mode == "concat":
        assert result.fullness > 0.99


def test_best_fit_is_full_on_chats_of_ordinary_lengths() -> None:
    lengths = np.random.default_rng(1).lognormal(5.5, 0.8, 20_000).astype(int).clip(4, 2048)
    assert plan(lengths.tolist(), 2048).fullness > 0.995


def test_no_documents() -> None:
    assert plan([], 8).num_rows == 0 and plan([], 8, mode="concat").num_rows == 0


def concat_by_document(lengths: list[int], seq_length: int) -> list[list[tuple[int, int, int]]]:
    """The rule of `concat`, one document after the other."""
    found: list[list[tuple[int, int, int]]] = []
    row: list[tuple[int, int, int]] = []
    room = seq_length
    for document, length in enumerate(lengths):
        start = 0
        while True:
            if room < min(2, length - start):
                found.append(row)
                row, room = [], seq_length
            taken = min(room, length - start)
            row.append((document, start, taken))
            room -= taken
            if start + taken == length:
                break
            start += taken - 1
            found.append(row)
            row, room = [], seq_length
    return found + [row] * bool(row)


@pytest.mark.parametrize("rows_per_part", [1, 3, 65_536])
def test_concat_by_row_equals_concat_by_document(rows_per_part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_ROWS_PER_PART", rows_per_part)
    generator = np.random.default_rng(3)
    for trial in range(300):
        seq_length, longest = int(generator.integers(2, 12)), int(generator.integers(1, 30))
        lengths = generator.integers(1, longest + 1, trial % 20).tolist()
        assert rows(plan(lengths, seq_length, mode="concat")) == concat_by_document(lengths, seq_length)


def labels_at(*positions: tuple[int, int]) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Labels stand at these (document, position) alone."""

    def has_labels(documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        segments = zip(documents, starts, lengths, strict=True)
        return np.array([any(d == document and s < at < s + n for d, at in positions) for document, s, n in segments])

    return has_labels


def test_pieces_without_a_label_token_stand_in_no_row() -> None:
    # pieces 0..4, 4..8, 8..11; position 4 is the first of the second piece, so it is a label in the first one only
    lengths, first = np.array([12, 3]), np.array([4, 1])
    split = pack(lengths, first, 5, overlong="split", has_labels=labels_at((0, 4), (0, 11)))
    assert rows(split) == [[(0, 0, 5)], [(0, 8, 4)], [(1, 0, 3)]] and split.num_without_labels == 1
    assert "1 piece without a label token left out" in (split.describe_losses(15) or "")
    # a row of whole documents is never left out, and neither is a cut one beside a label
    concat = pack(np.array([3, 12, 2]), np.array([1, 10, 1]), 5, "concat", has_labels=labels_at((1, 10)))
    assert rows(concat) == [[(0, 0, 3), (1, 0, 2)], [(1, 9, 3), (2, 0, 2)]] and concat.num_without_labels == 2
