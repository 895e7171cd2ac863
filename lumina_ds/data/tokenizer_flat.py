"""Ids of many texts in two arrays."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np


def flatten(runs: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids as (uint32 [tokens], int64 [lists + 1]): all ids, and where each list's begin."""
    offsets = np.zeros(len(runs) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, runs), np.int64, len(runs)), out=offsets[1:])
    return np.fromiter(chain.from_iterable(runs), np.uint32, int(offsets[-1])), offsets
