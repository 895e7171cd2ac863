"""Loss and gradient norm against their recent past: how far out of line is this step?

Median and median absolute deviation, because they do not move when one of a hundred values is wild: with mean
and standard deviation the first spike hides the second. Only upward counts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

# A normal distribution's standard deviation over its median absolute deviation.
_DEVIATIONS_PER_MAD = 1.4826


class SpikeDetector:
    """Scores one quantity step by step. Values that were spikes, or not finite, are not learned from."""

    def __init__(
        self, threshold: float, window: int, warmup: int, noise_floor: float, values: Iterable[float] = ()
    ) -> None:
        """`noise_floor`: the standard deviation is taken for at least this share of the median.

        `values` are those of an earlier life, as `values` gave them, so that a resumed run judges alike.
        """
        self.threshold = threshold
        self.warmup = warmup
        self.noise_floor = noise_floor
        self._values: deque[float] = deque(values, maxlen=window)

    @property
    def values(self) -> list[float]:
        return list(self._values)

    def score(self, value: float) -> float:
        """Robust standard deviations above the median; 0 below it or before the warm-up, infinite if not finite."""
        if not math.isfinite(value):
            return math.inf
        if len(self._values) < self.warmup:
            return 0.0
        middle = median(self._values)
        spread = _DEVIATIONS_PER_MAD * median(abs(each - middle) for each in self._values)
        return max(0.0, value - middle) / max(spread, self.noise_floor * abs(middle), 1e-12)

    def is_spike(self, value: float) -> bool:
        """Whether a finite value is out of line; non-finite ones have a rule of their own."""
        return math.isfinite(value) and self.score(value) > self.threshold

    def learn(self, value: float) -> None:
        self._values.append(value)
