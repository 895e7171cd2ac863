"""Series of any length in bounded memory: steps fall into bins, and bins are merged in pairs when there are too many."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lumina_ds.report.scale import Point

MAX_BINS = 512
MAX_HEAT_COLUMNS = 128


@dataclass
class _Bin:
    first: int
    last: int
    count: int
    total: float
    low: float
    high: float

    def take(self, other: _Bin) -> None:
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)
        self.count += other.count
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


class Series:
    """One number per step, kept as mean, minimum and maximum of at most `max_bins` bins of equal width."""

    def __init__(self, max_bins: int = MAX_BINS) -> None:
        self.max_bins = max_bins
        self.width = 1
        self.last: float | None = None
        self.num_missing = 0
        self._bins: dict[int, _Bin] = {}
        self._missing: set[int] = set()

    def add(self, step: int, value: Any) -> None:
        """Take a value; what is no finite number is counted as missing at its step."""
        if step >= self.max_bins * self.width:
            self._widen(step)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.num_missing += 1
            self._missing.add(step // self.width)
            return
        self.last = value = float(value)
        place = step // self.width
        # The usual case without a second object: a long run has millions of values.
        b = self._bins.get(place)
        if b is None:
            self._bins[place] = _Bin(step, step, 1, value, value, value)
            return
        b.count += 1
        b.total += value
        if value < b.low:
            b.low = value
        elif value > b.high:
            b.high = value
        if step > b.last:
            b.last = step
        elif step < b.first:
            b.first = step

    @property
    def points(self) -> list[Point]:
        bins = [b for _, b in sorted(self._bins.items())]
        return [Point(b.first, b.last, b.total / b.count, b.low, b.high) for b in bins]

    @property
    def missing_steps(self) -> list[int]:
        """Where values are missing, to within the width of a bin."""
        return sorted(place * self.width for place in self._missing)

    @property
    def high(self) -> float | None:
        return max((b.high for b in self._bins.values()), default=None)

    @property
    def mean(self) -> float | None:
        count = sum(b.count for b in self._bins.values())
        return sum(b.total for b in self._bins.values()) / count if count else None

    def _widen(self, step: int) -> None:
        while step // self.width >= self.max_bins:
            self.width *= 2
            bins, self._bins = self._bins, {}
            for place, b in bins.items():
                self._put(place // 2, b)
            self._missing = {place // 2 for place in self._missing}

    def _put(self, place: int, b: _Bin) -> None:
        if place in self._bins:
            self._bins[place].take(b)
        else:
            self._bins[place] = b


class ExpertUsage:
    """Shares of the assignments [layer][expert], averaged over bins of steps."""

    def __init__(self, max_columns: int = MAX_HEAT_COLUMNS) -> None:
        self.max_columns = max_columns
        self.width = 1
        self.first_step = self.last_step = 0
        self._shape: tuple[int, int] | None = None
        self._sums: dict[int, tuple[np.ndarray, int]] = {}

    def add(self, step: int, usage: Any) -> float | None:
        """Take one record; returns the largest load of any expert, or None when it is no such table."""
        shares = _table(usage)
        if shares is None or (self._shape not in (None, shares.shape)):
            return None
        self.first_step = step if self._shape is None else min(self.first_step, step)
        self._shape = shares.shape
        self.last_step = max(self.last_step, step)
        while step // self.width >= self.max_columns:
            self.width *= 2
            sums, self._sums = self._sums, {}
            for place, (total, count) in sums.items():
                self._put(place // 2, total, count)
        self._put(step // self.width, shares, 1)
        return float(shares.max()) * shares.shape[1]

    @property
    def num_layers(self) -> int:
        return self._shape[0] if self._shape else 0

    def loads(self, layer: int) -> np.ndarray:
        """[experts, columns]: each expert's share over an even one, so 1 is even.

        A column of steps without a record repeats the one before.
        """
        assert self._shape is not None
        first, last = min(self._sums), max(self._sums)
        columns = np.empty((self._shape[1], last - first + 1))
        for place in range(first, last + 1):
            if place in self._sums:
                total, count = self._sums[place]
                current = total[layer] / count * self._shape[1]
            columns[:, place - first] = current
        return columns

    def _put(self, place: int, total: np.ndarray, count: int) -> None:
        if place in self._sums:
            old, old_count = self._sums[place]
            total, count = old + total, old_count + count
        self._sums[place] = total, count


def _table(usage: Any) -> np.ndarray | None:
    try:
        shares = np.asarray(usage, np.float64)
    except (TypeError, ValueError):
        return None
    is_table = shares.ndim == 2 and shares.size > 0 and bool(np.isfinite(shares).all())
    return shares if is_table else None
