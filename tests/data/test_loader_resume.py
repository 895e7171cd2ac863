"""Exact data at any layout: what a step trains depends on the global batch alone, and resuming loses no row."""

from __future__ import annotations

from collections import Counter
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_ds.data.sampler import FILLER_ROW, TrainingOrder


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, int]]]:
    """A global batch, and ways to share it out as (ranks, rows of a micro-batch, micro-batches)."""
    batch_rows = draw(st.integers(1, 48))
    ways = [
        (world_size, micro_batch_size, batch_rows // world_size // micro_batch_size)
        for world_size in range(1, batch_rows + 1)
        for micro_batch_size in range(1, batch_rows // world_size + 1)
        if batch_rows % (world_size * micro_batch_size) == 0
    ]
    return batch_rows, draw(st.lists(st.sampled_from(ways), min_size=1, max_size=4))


def step_rows(order: TrainingOrder, step: int, world_size: int, micro_batch_size: int, accumulation: int) -> list[int]:
    """All ranks' rows of one step."""
    return [
        row
        for rank in range(world_size)
        for micro_batch in range(accumulation)
        for row in order.step_rows(step, micro_batch, rank, world_size, micro_batch_size, accumulation)
    ]


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(1, 200), st.integers(1, 3), st.integers(0, 2**70), st.data())
def test_every_row_once_an_epoch_at_any_layout_and_from_any_step(
    batch: tuple[int, list[tuple[int, int, int]]], num_rows: int, epochs: int, seed: int, data: st.DataObject
) -> None:
    batch_rows, ways = batch
    total_rows = epochs * num_rows
    num_steps = -(-total_rows // batch_rows)
    with patch("lumina_ds.data.sampler.POSITIONS_PER_BLOCK", 16):  # several blocks in an epoch, the last one shorter
        whole = TrainingOrder(num_rows, seed, total_rows)
        expected = [Counter(map(whole.row_at, range(s * batch_rows, (s + 1) * batch_rows))) for s in range(num_steps)]

        # A run that is stopped several times and goes on, each time with another layout.
        found: list[Counter[int]] = []
        while len(found) < num_steps:
            way = ways[len(found) % len(ways)]
            resumed = TrainingOrder(num_rows, seed, total_rows)
            stop = data.draw(st.integers(len(found) + 1, num_steps))
            found += [Counter(step_rows(resumed, step, *way)) for step in range(len(found), stop)]

    assert found == expected
    seen = sum(found, Counter())
    assert seen.pop(FILLER_ROW, 0) == num_steps * batch_rows - total_rows
    assert seen == Counter({row: epochs for row in range(num_rows)})


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 4), st.integers(0, 2**32))
def test_each_epoch_holds_every_row(num_rows: int, epoch: int, seed: int) -> None:
    order = TrainingOrder(num_rows, seed)
    rows = [order.row_at(position) for position in range(epoch * num_rows, (epoch + 1) * num_rows)]
    assert sorted(rows) == list(range(num_rows))
