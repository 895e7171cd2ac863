"""Distributions of counts (tokens, characters, turns) in bounded memory, and the bins that tables and plots show.

Values fall into buckets that are exact below 2,048 and 1/1024 of their value wide above it, so any corpus takes
the same 350 KB, and percentiles are off by less than 0.1 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_PER_OCTAVE = 1024
_NUM_BUCKETS = _PER_OCTAVE * 24  # up to 2**33
PERCENTILES = (5, 25, 50, 75, 95, 99)
# A tail longer than this many times the 99th percentile goes into one last bin instead of flattening all others.
_TAIL_FACTOR = 1.5


@dataclass(frozen=True)
class Bin:
    """Values first .. last, both included; an open bin is the tail, whose last value is the maximum."""

    first: int
    last: int
    count: int
    is_tail: bool = False

    @property
    def label(self) -> str:
        if self.is_tail:
            return f"{self.first:,} and more"
        return f"{self.first:,}" if self.first == self.last else f"{self.first:,} to {self.last:,}"


class Distribution:
    """Counts of non-negative integers."""

    def __init__(self, values: Any = ()) -> None:
        self._counts = np.zeros(_NUM_BUCKETS, np.int64)
        self._sums = np.zeros(_NUM_BUCKETS, np.int64)
        self.count = 0
        self.sum = 0
        self.minimum = 0
        self.maximum = 0
        self.add(values)

    def add(self, values: Any) -> None:
        """Add an array or a list of integers from 0 to 2**33."""
        values = np.asarray(values, np.int64)
        if not len(values):
            return
        buckets = _bucket(values)
        np.add.at(self._counts, buckets, 1)
        np.add.at(self._sums, buckets, values)
        low, high = int(values.min()), int(values.max())
        self.minimum = min(low, self.minimum) if self.count else low
        self.maximum = max(high, self.maximum)
        self.count += len(values)
        self.sum += int(values.sum())

    @property
    def mean(self) -> float:
        return self.sum / max(1, self.count)

    def percentile(self, percent: float) -> int:
        """The smallest value that at least `percent` of the values do not exceed (nearest rank)."""
        if not self.count:
            return 0
        rank = max(1, int(np.ceil(self.count * percent / 100)))
        bucket = int(np.cumsum(self._counts).searchsorted(rank))
        return max(self.minimum, min(self.maximum, _lower_bound(bucket)))

    def above(self, limit: int) -> tuple[int, int]:
        """(how many values exceed `limit`, the sum of what they exceed it by)."""
        first = int(_bucket(np.array([limit]))[0]) + 1
        count = int(self._counts[first:].sum())
        return count, int(self._sums[first:].sum()) - limit * count

    def bins(self, max_bins: int = 20) -> list[Bin]:
        """Equal bins with round borders from the minimum to the maximum, or to the 99th percentile and a tail."""
        if not self.count:
            return []
        usual = self.percentile(99)
        top = usual if self.maximum > _TAIL_FACTOR * usual else self.maximum
        step = _round_step((top - self.minimum + 1) / max_bins)
        first = self.minimum // step * step
        num_bins = (top - first) // step + 1
        used = np.flatnonzero(self._counts)
        places = np.clip((np.array([_lower_bound(int(b)) for b in used]) - first) // step, 0, num_bins)
        counts = np.zeros(num_bins + 1, np.int64)
        np.add.at(counts, places, self._counts[used])
        bins = [Bin(first + n * step, first + (n + 1) * step - 1, int(counts[n])) for n in range(num_bins)]
        if counts[num_bins]:
            bins.append(Bin(first + num_bins * step, self.maximum, int(counts[num_bins]), is_tail=True))
        return bins

    def summary(self) -> dict[str, Any]:
        """Count, sum, mean, extremes, percentiles and bins, for JSON."""
        percentiles = {f"p{percent}": self.percentile(percent) for percent in PERCENTILES}
        return {
            "count": self.count,
            "sum": self.sum,
            "mean": round(self.mean, 2),
            "min": self.minimum,
            **percentiles,
            "max": self.maximum,
            "histogram": [{"from": b.first, "to": b.last, "count": b.count} for b in self.bins()],
        }


def _bucket(values: np.ndarray) -> np.ndarray:
    octave = np.maximum(0, np.frexp(values.astype(np.float64))[1] - 11)
    return np.minimum(octave * _PER_OCTAVE + (values >> octave), _NUM_BUCKETS - 1)


def _lower_bound(bucket: int) -> int:
    octave = max(0, bucket // _PER_OCTAVE - 1)
    return (bucket - octave * _PER_OCTAVE) << octave


def _round_step(smallest: float) -> int:
    """The first of 1, 2, 5, 10, 20, 25, 50, 100, 200, 250, ... that is not below `smallest`."""
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power // 2, 5 * power):
            if step >= smallest:
                return step
        power *= 10
