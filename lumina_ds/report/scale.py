"""From steps and values to places in a plot's frame, on a linear or a logarithmic height."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lumina_ds.report.plot import Frame, round_step

_NUM_GRID_LINES = 4
# Gradient norms span decades when a run is unstable; below this ratio a linear axis shows more.
_LOG_RATIO = 30


@dataclass(frozen=True)
class Point:
    """The values of the steps `first` to `last`."""

    first: int
    last: int
    mean: float
    low: float
    high: float

    @property
    def x(self) -> float:
        return (self.first + self.last) / 2


@dataclass(frozen=True)
class Scale:
    """Where a step and a value stand in the frame; `values` are those of the grid lines."""

    frame: Frame
    first: int
    last: int
    low: float
    high: float
    values: list[float]
    is_log: bool

    @classmethod
    def of(cls, points: Sequence[Point], frame: Frame, from_zero: bool = False, is_log: bool = False) -> Scale:
        """Round borders around all of `points`, of which a logarithmic height takes positive ones only."""
        low, high = min(p.low for p in points), max(p.high for p in points)
        first, last = min(p.first for p in points), max(p.last for p in points)
        values = _log_values(low, high) if is_log else _round_values(min(low, 0.0) if from_zero else low, high)
        return cls(frame, first, last, min(low, values[0]), max(high, values[-1]), values, is_log)

    def x(self, step: float) -> float:
        span = (self.last - self.first) or 1
        return self.frame.left + (step - self.first) / span * self.frame.inner_width

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return self.frame.floor - (value - low) / (high - low) * self.frame.inner_height


def spans_decades(points: Sequence[Point]) -> bool | None:
    """Whether a logarithmic height shows more than a linear one; None where there can be none."""
    low, high = min(p.low for p in points), max(p.high for p in points)
    return high / low > _LOG_RATIO if low > 0 else None


def label(value: float) -> str:
    """A value at an axis, short enough for its margin."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if size <= abs(value) < 1e12:
            return f"{value / size:.4g}{letter}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def _round_values(low: float, high: float) -> list[float]:
    if high == low:
        high = low + (abs(low) or 1.0)
    step = round_step((high - low) / _NUM_GRID_LINES)
    begin, end = math.floor(low / step), math.ceil(high / step)
    # Round to what the step can say: 3 * 0.1 is not 0.3.
    return [float(f"{number * step:.12g}") for number in range(begin, end + 1)]


def _log_values(low: float, high: float) -> list[float]:
    """Round values from the last below `low` to the first above `high`, more of each decade where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if len(decades) < 4 else (1,)
    every = max(1, len(decades) // 6)
    values = [float(f"{digit}e{decade}") for decade in decades[::every] for digit in digits]
    begin = max((n for n, value in enumerate(values) if value <= low), default=0)
    end = min((n for n, value in enumerate(values) if value >= high), default=len(values) - 1)
    return values[begin : max(end, begin + 1) + 1]
