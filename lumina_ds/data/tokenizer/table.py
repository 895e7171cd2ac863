"""The table of known chunks: the working memory of one thread that encodes for tokenizer_chunks.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lumina_ds.data.tokenizer.flat import Texts, flatten
from lumina_ds.data.tokenizer.merges import Merges

# Ids that a table remembers before it starts again empty.
_MAX_VALUES = 8 << 20


class ChunkSource(NamedTuple):
    """What a model gives, the same for all tables: never written to."""

    processor: Any  # SentencePiece without a dummy prefix
    is_cut: np.ndarray  # uint8 [65536], by two neighbouring bytes: may a text be cut between them?
    merges: Merges | None
    adds_prefix: bool

    def encode_whole(self, texts: Texts) -> list[list[int]]:
        """The ids of SentencePiece alone."""
        prefix = " " if self.adds_prefix else ""
        return self.processor.encode([prefix + text if text else "" for text in texts.split()], num_threads=1)


class ChunkTable:
    """Ids of chunks seen before. After an exception it must not be used again."""

    def __init__(self, source: ChunkSource, num_rows: int) -> None:
        from lumina_ds.data.tokenizer import kernel

        self._kernel = kernel
        self._source = source
        self._table = np.zeros((num_rows, kernel.ROW_WORDS), np.uint64)
        # The last quarter stays empty, without which searches would be long.
        self._max_rows = num_rows * 3 // 4
        self.num_rows = 0
        self._values = np.zeros(1 << 16, np.uint32)
        self._num_values = 0
        self._words, self._chunks = np.empty(5, np.uint64), np.empty(0, np.uint64)
        self._pending = np.empty((0, 3), np.int64)

    def encode(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        """As ChunkEncoder.encode, for so much text as may be held at once."""
        if self.num_rows >= self._max_rows or self._num_values > _MAX_VALUES:
            self._forget()
        offsets = texts.offsets - texts.offsets[0]
        num_bytes = int(offsets[-1])
        words, chunks, pending = self._scratch(num_bytes)
        data = words.view(np.uint8)
        data[:num_bytes] = texts.data[texts.offsets[0] : texts.offsets[-1]]
        first_chunks = np.empty(len(texts.offsets), np.int64)
        free_rows = self._max_rows - self.num_rows
        source, prefix_bytes = self._source, int(self._source.adds_prefix)
        num_pending = self._kernel.find_chunks(
            data, words, offsets, prefix_bytes, source.is_cut, self._table, free_rows, chunks, first_chunks, pending
        )
        pending_ids = self._learn(data, pending[:num_pending])
        return self._kernel.copy_ids(chunks, first_chunks, pending_ids, self._values)

    def _scratch(self, num_bytes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Working memory for a text of that many bytes, each a chunk at worst; kept from call to call."""
        if num_bytes > len(self._chunks):
            self._words = np.empty(num_bytes // 8 + 5, np.uint64)
            self._chunks, self._pending = np.empty(num_bytes, np.uint64), np.empty((num_bytes, 3), np.int64)
        return self._words, self._chunks, self._pending

    def _forget(self) -> None:
        self._table[:] = 0
        self._values = np.zeros(1 << 16, np.uint32)
        self.num_rows = self._num_values = 0

    def _learn(self, data: np.ndarray, pending: np.ndarray) -> np.ndarray:
        """Encode the pending chunks; those with a row go into the table. Returns where each one's ids stand."""
        # Of one byte at most three ids: a model without U+2581 spells a space in the bytes of that.
        most = 3 * int((pending[:, 2] - pending[:, 1]).sum())
        if self._num_values + most > len(self._values):
            self._values = np.concatenate([self._values, np.zeros(len(self._values) + most, np.uint32)])
        where = np.zeros(len(pending), np.uint64)
        # What is not kept stands last and is overwritten next time.
        self._num_values = self._encode_pending(data, pending, True, self._num_values, where)
        self._encode_pending(data, pending, False, self._num_values, where)
        self._kernel.complete_rows(self._table, pending, where)
        self.num_rows += int((pending[:, 0] >= 0).sum())
        return where

    def _encode_pending(
        self, data: np.ndarray, pending: np.ndarray, with_rows: bool, num_values: int, where: np.ndarray
    ) -> int:
        """Write the ids of the chunks with a row, or without one, after `num_values`; the new number of values."""
        left = (pending[:, 0] >= 0) == with_rows
        if self._source.merges is not None:
            num_values = self._kernel.merge_chunks(
                data, pending, with_rows, *self._source.merges, self._values, num_values, where
            )
            left &= pending[:, 2] - pending[:, 1] > self._kernel.MAX_MERGED_BYTES
        chunks = [data[begin:end].tobytes().decode() for begin, end in pending[left, 1:].tolist()]
        if not chunks:
            return num_values
        ids, offsets = flatten(self._source.processor.encode(chunks, num_threads=1))
        self._values[num_values : num_values + len(ids)] = ids
        counts = np.diff(offsets)
        places = np.where(counts == 1, ids[np.minimum(offsets[:-1], len(ids) - 1)], num_values + offsets[:-1])
        where[left] = (places << 32 | counts << 8).astype(np.uint64)
        return num_values + len(ids)
