"""Binned series against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lumina_ds.report.runs.series import ExpertUsage, Series
from lumina_ds.report.scale import Point


def test_few_steps_are_kept_as_they_are() -> None:
    series = Series(max_bins=8)
    for step, value in ((1, 4.0), (2, 2), (4, 1.0)):
        series.add(step, value)
    assert series.points == [Point(1, 1, 4.0, 4.0, 4.0), Point(2, 2, 2.0, 2.0, 2.0), Point(4, 4, 1.0, 1.0, 1.0)]
    assert (series.last, series.high, series.mean) == (1.0, 4.0, pytest.approx(7 / 3))


def test_more_steps_double_the_width_of_the_bins() -> None:
    series = Series(max_bins=4)
    for step in range(1, 9):
        series.add(step, step * 10)
    # Step 4 needs a fifth bin and step 8 a ninth: the width goes to 2, then to 4.
    assert series.width == 4
    assert series.points == [Point(1, 3, 20, 10, 30), Point(4, 7, 55, 40, 70), Point(8, 8, 80, 80, 80)]


def test_the_same_points_in_any_order() -> None:
    forward, backward = Series(16), Series(16)
    for step in range(1000):
        forward.add(step, step % 7)
        backward.add(999 - step, (999 - step) % 7)
    assert forward.points == backward.points
    assert len(forward.points) <= 16


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), True, "1", [1.0]])
def test_what_is_no_finite_number_is_missing(value: object) -> None:
    series = Series()
    series.add(1, 2.0)
    series.add(2, value)
    assert (series.num_missing, series.missing_steps, len(series.points), series.last) == (1, [2], 1, 2.0)


def test_loads_are_shares_over_an_even_share() -> None:
    usage = ExpertUsage()
    assert usage.add(1, [[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]]) == 2.0
    usage.add(3, [[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    # Step 2 was not recorded: its column repeats that of step 1.
    assert usage.loads(0).tolist() == [[2, 2, 1], [1, 1, 1], [1, 1, 1], [0, 0, 1]]
    assert usage.loads(1)[0].tolist() == [1, 1, 4]
    assert (usage.num_layers, usage.first_step, usage.last_step) == (2, 1, 3)


def test_loads_of_many_steps_are_averaged() -> None:
    usage = ExpertUsage(max_columns=2)
    for step in range(4):
        usage.add(step, [[1.0, 0.0]] if step % 2 else [[0.5, 0.5]])
    assert np.allclose(usage.loads(0), [[1.5, 1.5], [0.5, 0.5]])


@pytest.mark.parametrize("usage", ["x", [], [[]], [0.5, 0.5], [[0.5], [0.5, 0.5]], [[None, 1.0]], [[1.0, 0.0, 0.0]]])
def test_what_is_no_table_of_the_same_shape_is_left_out(usage: object) -> None:
    experts = ExpertUsage()
    experts.add(1, [[0.5, 0.5]])
    assert experts.add(2, usage) is None
    assert experts.loads(0).shape == (2, 1)
