"""The order of training rows: a pure function of (seed, epoch), never of ranks or workers."""

from __future__ import annotations

import numpy as np


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of 0 .. num_rows-1 for one epoch, int64.

    Philox keyed through SeedSequence(seed, epoch): counter-based, the same on every machine and numpy
    version that keeps numpy's stream guarantee for bit generators.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(num_rows)
