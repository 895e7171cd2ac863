"""Many texts, or the ids of many texts, in two arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np


class Texts(NamedTuple):
    """UTF-8 with a space before each text, where a tokenizer's dummy prefix can stand.

    data: uint8 [bytes]. offsets: int64 [texts + 1]; text i is data[offsets[i] + 1 : offsets[i + 1]].
    """

    data: np.ndarray
    offsets: np.ndarray

    @classmethod
    def join(cls, texts: Sequence[str]) -> Texts:
        encoded = [b" " + text.encode() for text in texts]
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, encoded), np.int64, len(texts)), out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def slices(self) -> Iterator[bytes]:
        """Each text's own bytes."""
        for begin, end in pairwise(self.offsets.tolist()):
            yield self.data[begin + 1 : end].tobytes()

    def split(self) -> list[str]:
        return [text.decode() for text in self.slices()]


def flatten(runs: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids as (uint32 [tokens], int64 [lists + 1]): all ids, and where each list's begin."""
    offsets = np.zeros(len(runs) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, runs), np.int64, len(runs)), out=offsets[1:])
    return np.fromiter(chain.from_iterable(runs), np.uint32, int(offsets[-1])), offsets
