"""The order of training rows: a pure function of (seed, epoch), never of ranks or workers."""

from __future__ import annotations

import numpy as np


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of 0 .. num_rows-1 for one epoch, int64.

    Sorts raw Philox words keyed by SeedSequence(seed, epoch): numpy guarantees the words of a bit generator
    across versions, but not what Generator.permutation makes of them.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_rows)
    return np.argsort(words, kind="stable")
