"""The order of training rows: a pure function of (seed, epoch, position), never of ranks or workers.

Nothing is shuffled in memory: where a row goes is computed, so an epoch of any size begins, and a run
resumes anywhere in it, at once.
"""

from __future__ import annotations

import math

import numpy as np

# Measured: with 16 passes, chi-square tests over 20,000 seeds cannot tell the permutations of 2 to 6 rows, nor the
# neighbours in 100 and 10^6 rows, from even ones; with 12, those of 5 and 6 rows still show a trace. Large folders
# need about 6. The cost is some 0.3 microseconds a row, and 0.2 milliseconds a call.
NUM_PASSES = 16

# Part of a checkpoint's identity: another order would read other rows after a resume.
ORDER_VERSION = "feistel-16"


class EpochOrder:
    """A permutation of 0 .. num_rows-1 that is evaluated position by position.

    The generalised Feistel network of Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002):
    a number is written as two digits (left, right) of a grid of height x width >= num_rows, and in turn each digit
    is shifted by a keyed hash of the other, which can be undone, so the network is a bijection of the grid. A
    number that lands beyond num_rows goes through the network again until it does not ("cycle walking"), which is
    a bijection of 0 .. num_rows-1. The grid is nearly square and exceeds num_rows by less than 1 in
    sqrt(num_rows), so second walks are rare. The hash is SplitMix64's finalizer (Steele, Lea and Flood,
    OOPSLA 2014); it makes no cryptographic claim. The keys come from numpy's SeedSequence, whose output numpy
    guarantees across versions.
    """

    def __init__(self, num_rows: int, seed: int, epoch: int) -> None:
        self.num_rows = num_rows
        height = math.isqrt(max(0, num_rows - 1)) + 1
        self._height = np.uint64(height)
        self._width = np.uint64(max(1, -(-num_rows // height)))
        self._keys = np.random.SeedSequence([seed, epoch]).generate_state(NUM_PASSES, np.uint64)

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Rows at `positions` (integers in 0 .. num_rows-1, any shape): int64 of the same shape."""
        rows = self._network(positions.astype(np.uint64).ravel())
        while (beyond := np.flatnonzero(rows >= self.num_rows)).size:
            rows[beyond] = self._network(rows[beyond])
        return rows.astype(np.int64).reshape(positions.shape)

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        left, right = np.divmod(numbers, self._width)
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                left = (left + _hash(right, key)) % self._height
            else:
                right = (right + _hash(left, key)) % self._width
        return left * self._width + right


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """SplitMix64's finalizer of value + key, less its lowest byte so that adding a digit cannot overflow."""
    mixed = values + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(8)
