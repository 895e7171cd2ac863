"""The compiled inner loops of tokenizer_chunks.py: cut bytes into chunks, find them in a table, copy their ids.

numba compiles them at first use and keeps the machine code beside this file or in the user's cache folder; no
compiler has to be installed. Import this module only where numba may be missing.

A table row is uint64 [6]: the chunk's bytes in four words, the last eight or fewer first, its number of bytes (0: the
row is free), and where its ids stand: `start << 32 | count`.
"""

from __future__ import annotations

import numba
import numpy as np

# Longer chunks are rare and seldom come twice: they are encoded each time, so that they cannot fill the table.
MAX_CHUNK_BYTES = 32
ROW_WORDS = 6

_LENGTH = 4
_IDS = 5
_MIX = np.uint64(0x9E3779B97F4A7C15)


# Indices are unsigned throughout: numba adds a branch for negative ones to each access by a signed index.
@numba.njit(cache=True)
def find_chunks(
    data: np.ndarray,
    text_offsets: np.ndarray,
    is_cut: np.ndarray,
    table: np.ndarray,
    free_rows: int,
    chunks: np.ndarray,
    first_chunks: np.ndarray,
    pending: np.ndarray,
) -> int:
    """Cut texts into chunks and name the table row of each, taking a free row for a new chunk.

    data: uint8 [bytes], all texts; text_offsets: int64 [texts + 1]. is_cut: bool [65536], by two neighbouring
    bytes. table: uint64 [a power of two, ROW_WORDS]; `free_rows` of it may be taken.
    Written: chunks: int32 [chunks], a row, or ~n for a chunk without a row; first_chunks: int64 [texts + 1];
    pending: int64 [n, 3], (row or -1, begin, end) of each chunk whose ids are still to be found.
    Returns how many are pending.
    """
    one, eight, shift = np.uint64(1), np.uint64(8), np.uint64(29)
    last_row = np.uint64(len(table) - 1)
    num_chunks = np.uint64(0)
    num_pending = np.uint64(0)
    for text in range(np.uint64(len(text_offsets) - 1)):
        first_chunks[text] = num_chunks
        position = np.uint64(text_offsets[text])
        end = np.uint64(text_offsets[text + one])
        while position < end:
            begin = position
            byte = np.uint64(data[position])
            word = byte
            code = np.uint64(0)
            length = one
            word0 = word1 = word2 = word3 = np.uint64(0)
            position += one
            while position < end:
                following = np.uint64(data[position])
                if is_cut[(byte << eight) | following]:
                    break
                byte = following
                if length & np.uint64(7) == np.uint64(0):
                    # Eight bytes are full: the finished words move up by one.
                    word3, word2, word1, word = word2, word1, word, np.uint64(0)
                    code = (code ^ word1) * _MIX
                    code ^= code >> shift
                word = (word << eight) | byte
                length += one
                position += one
            row = np.uint64(0)
            state = 0  # 0: without a row; 1: found; 2: a free row, to be taken
            if length <= np.uint64(MAX_CHUNK_BYTES):
                word0 = word
                code = (code ^ word ^ (length << np.uint64(59))) * _MIX
                row = (code ^ (code >> shift)) & last_row
                while True:
                    known_length = table[row, _LENGTH]
                    if known_length == np.uint64(0):
                        if free_rows > 0:
                            state = 2
                        break
                    if (
                        table[row, 0] == word0
                        and known_length == length
                        and table[row, 1] == word1
                        and table[row, 2] == word2
                        and table[row, 3] == word3
                    ):
                        state = 1
                        break
                    row = (row + one) & last_row
            if state == 1:
                chunks[num_chunks] = row
            else:
                if state == 2:
                    free_rows -= 1
                    table[row, 0], table[row, 1], table[row, 2], table[row, 3] = word0, word1, word2, word3
                    table[row, _LENGTH] = length
                    pending[num_pending, 0] = row
                    chunks[num_chunks] = row
                else:
                    pending[num_pending, 0] = -1
                    chunks[num_chunks] = ~np.int64(num_pending)
                pending[num_pending, 1] = begin
                pending[num_pending, 2] = position
                num_pending += one
            num_chunks += one
    first_chunks[len(text_offsets) - 1] = num_chunks
    return np.int64(num_pending)


@numba.njit(cache=True)
def copy_ids(
    chunks: np.ndarray, first_chunks: np.ndarray, table: np.ndarray, pending_ids: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, uint32 [tokens]; where each text's begin, int64 [texts + 1]).

    pending_ids: uint64 [n], as in a table's row, for the chunks without a row; values: uint32, what both point to.
    """
    low = np.uint64(0xFFFFFFFF)
    total = np.uint64(0)
    num_chunks = np.uint64(first_chunks[-1])
    for chunk in range(num_chunks):
        row = chunks[chunk]
        total += (table[np.uint64(row), _IDS] if row >= 0 else pending_ids[np.uint64(~row)]) & low
    ids = np.empty(total, np.uint32)
    offsets = np.empty(len(first_chunks), np.int64)
    position = np.uint64(0)
    for text in range(np.uint64(len(first_chunks) - 1)):
        offsets[text] = position
        for chunk in range(np.uint64(first_chunks[text]), np.uint64(first_chunks[text + np.uint64(1)])):
            row = chunks[chunk]
            where = table[np.uint64(row), _IDS] if row >= 0 else pending_ids[np.uint64(~row)]
            start = where >> np.uint64(32)
            for i in range(start, start + (where & low)):
                ids[position] = values[i]
                position += np.uint64(1)
    offsets[len(first_chunks) - 1] = position
    return ids, offsets
