"""The compiled inner loops of tokenizer_chunks.py: cut bytes into chunks, find them in a table, encode those that
are not there, copy the ids.

numba compiles them at first use and keeps the machine code beside this file or in the user's cache folder; no
compiler has to be installed. Import this module only where numba may be missing.

A table row is uint64 [4], half a cache line: the chunk's bytes in three words, and
`start << 32 | count << 8 | number of bytes`: where its ids stand, or with count 1 the id itself instead of start. A row
of 0 bytes is free, and with count 0 `start` is the number of the pending chunk that will complete it.
"""

from __future__ import annotations

import numba
import numpy as np

# Longer chunks are rare and seldom come twice: they are encoded each time, so that they cannot fill the table.
MAX_CHUNK_BYTES = 24
ROW_WORDS = 4
# Encoding takes the square of the length; SentencePiece takes longer chunks.
MAX_MERGED_BYTES = 128

_INFO = 3
_LENGTH_BITS = np.uint64(0xFF)
_START_SHIFT = np.uint64(32)
_COUNT_SHIFT = np.uint64(8)
_COUNT_BITS = np.uint64(0xFFFFFF)
_NEVER = np.int64(2**63 - 1)
_MIX = np.uint64(0x9E3779B97F4A7C15)
# By number of bytes: the bits of a word that they take.
_MASKS = np.array([256**size - 1 for size in range(9)], np.uint64)


# Indices are unsigned throughout: numba adds a branch for negative ones to each access by a signed index.
@numba.njit(cache=True, nogil=True)
def find_chunks(
    data: np.ndarray,
    words: np.ndarray,
    text_offsets: np.ndarray,
    prefix_bytes: int,
    is_cut: np.ndarray,
    table: np.ndarray,
    free_rows: int,
    chunks: np.ndarray,
    first_chunks: np.ndarray,
    pending: np.ndarray,
) -> int:
    """Cut texts into chunks and name the table row of each, taking a free row for a new chunk.

    data, text_offsets: see tokenizer_flat.Texts; of the space before each text the last `prefix_bytes` are encoded
    with it, 0 or 1, but none where the text is empty. words: uint64, the memory of `data` and at least 32 bytes
    more. is_cut: uint8 [65536], by two neighbouring bytes. table: uint64 [a power of two, ROW_WORDS]; `free_rows` of it
    may be taken.
    Written: chunks: uint64 [chunks], the row's last word where it is complete, else `n << 8` for pending chunk n;
    first_chunks: int64 [texts + 1];
    pending: int64 [n, 3], (row or -1, begin, end) of each chunk whose ids are still to be found.
    Returns how many are pending.
    """
    one = np.uint64(1)
    last_row = np.uint64(len(table) - 1)
    num_chunks = np.uint64(0)
    num_pending = np.uint64(0)
    for text in range(np.uint64(len(text_offsets) - 1)):
        first_chunks[text] = num_chunks
        begin = np.uint64(text_offsets[text]) + one
        text_end = np.uint64(text_offsets[text + one])
        if begin >= text_end:
            continue
        begin -= np.uint64(prefix_bytes)
        last_chunk = _mark_ends(data, begin, text_end, is_cut, chunks, num_chunks)
        while num_chunks < last_chunk:
            end = chunks[num_chunks]
            length = end - begin
            row = info = np.uint64(0)
            state = 0  # 0: without a row; 1: found; 2: a free row, to be taken
            if length <= np.uint64(MAX_CHUNK_BYTES):
                word0, word1, word2 = _chunk_words(words, begin, length)
                row = _chunk_code(word0, word1, word2, length) & last_row
                while True:
                    info = table[row, _INFO]
                    known_length = info & _LENGTH_BITS
                    if known_length == np.uint64(0):
                        if free_rows > 0:
                            state = 2
                        break
                    if (
                        table[row, 0] == word0
                        and known_length == length
                        and table[row, 1] == word1
                        and table[row, 2] == word2
                    ):
                        state = 1
                        break
                    row = (row + one) & last_row
                if state == 2:
                    free_rows -= 1
                    table[row, 0], table[row, 1], table[row, 2] = word0, word1, word2
                    table[row, _INFO] = num_pending << _START_SHIFT | length
            if state == 1:
                is_complete = (info >> _COUNT_SHIFT) & _COUNT_BITS != np.uint64(0)
                chunks[num_chunks] = info if is_complete else (info >> _START_SHIFT) << np.uint64(8)
            else:
                chunks[num_chunks] = num_pending << np.uint64(8)
                pending[num_pending, 0] = row if state == 2 else -1
                pending[num_pending, 1] = begin
                pending[num_pending, 2] = end
                num_pending += one
            num_chunks += one
            begin = end
    first_chunks[len(text_offsets) - 1] = num_chunks
    return np.int64(num_pending)


@numba.njit(cache=True, nogil=True)
def _mark_ends(data: np.ndarray, begin: int, end: int, is_cut: np.ndarray, chunks: np.ndarray, num_chunks: int) -> int:
    """Write where each chunk of a text ends from chunks[num_chunks] on; the new number of chunks.

    Without a branch on what it finds: where a chunk ends cannot be predicted, and a guess costs as much as ten bytes.
    """
    pair = np.uint64(data[begin])
    for position in range(begin + np.uint64(1), end):
        pair = (pair << np.uint64(8) | np.uint64(data[position])) & np.uint64(0xFFFF)
        chunks[num_chunks] = position
        num_chunks += np.uint64(is_cut[pair])
    chunks[num_chunks] = end
    return num_chunks + np.uint64(1)


@numba.njit(cache=True, nogil=True)
def _chunk_words(words: np.ndarray, begin: int, length: int) -> tuple[int, int, int]:
    """The bytes of a chunk of at most MAX_CHUNK_BYTES in three words, filled up with 0."""
    one, eight, zero = np.uint64(1), np.uint64(8), np.uint64(0)
    at, shift = begin >> np.uint64(3), (begin & np.uint64(7)) << np.uint64(3)
    back = np.uint64(63) - shift  # in two steps, as no shift by 64 is defined
    word0 = words[at] >> shift | (words[at + one] << one) << back
    if length <= eight:
        return word0 & _MASKS[length], zero, zero
    word1 = words[at + one] >> shift | (words[at + np.uint64(2)] << one) << back
    if length <= np.uint64(16):
        return word0, word1 & _MASKS[length - eight], zero
    word2 = words[at + np.uint64(2)] >> shift | (words[at + np.uint64(3)] << one) << back
    return word0, word1, word2 & _MASKS[length - np.uint64(16)]


@numba.njit(cache=True, nogil=True)
def _chunk_code(word0: int, word1: int, word2: int, length: int) -> int:
    code = (word0 ^ (length << np.uint64(59))) * _MIX
    if length > np.uint64(8):
        code = (code ^ (code >> np.uint64(29)) ^ word1) * _MIX
        code = (code ^ (code >> np.uint64(29)) ^ word2) * _MIX
    return code ^ (code >> np.uint64(29))


@numba.njit(cache=True, nogil=True)
def complete_rows(table: np.ndarray, pending: np.ndarray, pending_ids: np.ndarray) -> None:
    """Write what find_chunks left open: pending_ids, uint64 [n], is a row's last word without the number of bytes."""
    for n in range(np.uint64(len(pending))):
        if pending[n, 0] >= 0:
            row = np.uint64(pending[n, 0])
            table[row, _INFO] = pending_ids[n] | (table[row, _INFO] & _LENGTH_BITS)


@numba.njit(cache=True, nogil=True)
def copy_ids(
    chunks: np.ndarray, first_chunks: np.ndarray, pending_ids: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, uint32 [tokens]; where each text's begin, int64 [texts + 1]) of the chunks that find_chunks found."""
    one = np.uint64(1)
    total = np.uint64(0)
    for chunk in range(np.uint64(first_chunks[-1])):
        if chunks[chunk] & _LENGTH_BITS == np.uint64(0):
            chunks[chunk] = pending_ids[chunks[chunk] >> np.uint64(8)]
        total += (chunks[chunk] >> _COUNT_SHIFT) & _COUNT_BITS
    ids = np.empty(total, np.uint32)
    offsets = np.empty(len(first_chunks), np.int64)
    position = np.uint64(0)
    for text in range(np.uint64(len(first_chunks) - 1)):
        offsets[text] = position
        for chunk in range(np.uint64(first_chunks[text]), np.uint64(first_chunks[text + one])):
            info = chunks[chunk]
            count = (info >> _COUNT_SHIFT) & _COUNT_BITS
            start = info >> _START_SHIFT
            if count == one:
                ids[position] = start
                position += one
            else:
                for i in range(start, start + count):
                    ids[position] = values[i]
                    position += one
    offsets[len(first_chunks) - 1] = position
    return ids, offsets


@numba.njit(cache=True, nogil=True)
def fill_pairs(splits: np.ndarray, ranks: np.ndarray, pairs: np.ndarray) -> None:
    """Write splits, int64 [n, 3] of (left, right, joined), into the table of tokenizer_merges.Merges."""
    for n in range(len(splits)):
        key = _pair_key(np.uint64(splits[n, 0]), np.uint64(splits[n, 1]))
        row = _pair_row(pairs, key)
        pairs[row, 0] = key
        pairs[row, 1] = np.uint64(ranks[splits[n, 2]]) << np.uint64(32) | np.uint64(splits[n, 2])


@numba.njit(cache=True, nogil=True)
def find_splits(text: np.ndarray, offsets: np.ndarray, known: np.ndarray, splits: np.ndarray) -> int:
    """Write (left, right, joined) of every way to split a piece into two pieces; how many.

    Piece i is the UTF-8 text[offsets[i] : offsets[i + 1]], none where that is empty. known: int64 [a power of two] of 0,
    more than there are pieces, working memory. splits: int64 [bytes of text, 3].
    """
    for piece in range(len(offsets) - 1):
        begin, end = offsets[piece], offsets[piece + 1]
        if begin < end:
            known[_piece_row(text, offsets, known, begin, end)] = piece + 1
    count = 0
    for piece in range(len(offsets) - 1):
        begin, end = offsets[piece], offsets[piece + 1]
        for middle in range(begin + 1, end):
            if text[middle] & 0xC0 == 0x80:
                continue  # inside a character
            left = known[_piece_row(text, offsets, known, begin, middle)]
            if left:
                right = known[_piece_row(text, offsets, known, middle, end)]
                if right:
                    splits[count] = left - 1, right - 1, piece
                    count += 1
    return count


@numba.njit(cache=True, nogil=True)
def _piece_row(text: np.ndarray, offsets: np.ndarray, known: np.ndarray, begin: int, end: int) -> int:
    """The row of the piece that reads text[begin:end], or the free row where it would stand."""
    code = np.uint64(end - begin)
    for position in range(begin, end):
        code = (code ^ np.uint64(text[position])) * _MIX
        code ^= code >> np.uint64(29)
    row = np.int64(code & np.uint64(len(known) - 1))
    while known[row]:
        other = offsets[known[row] - 1]
        if offsets[known[row]] - other == end - begin:
            same = 0
            while same < end - begin and text[other + same] == text[begin + same]:
                same += 1
            if same == end - begin:
                break
        row = (row + 1) & (len(known) - 1)
    return row


@numba.njit(cache=True, nogil=True)
def merge_chunks(
    data: np.ndarray,
    pending: np.ndarray,
    with_rows: bool,
    character_ids: np.ndarray,
    pairs: np.ndarray,
    byte_ids: np.ndarray,
    values: np.ndarray,
    num_values: int,
    pending_ids: np.ndarray,
) -> int:
    """Encode the pending chunks of at most MAX_MERGED_BYTES, those with a row or those without, into `values`.

    The tables are those of tokenizer_merges.Merges; where a chunk's ids stand is written to pending_ids. As
    SentencePiece does it: join the pair of the best score, the leftmost among equals, until none is a piece.
    Returns the number of values.
    """
    symbols = np.empty(MAX_MERGED_BYTES, np.int64)  # an id, or ~code point of a character spelled in bytes
    joined = np.empty(MAX_MERGED_BYTES, np.int64)  # rank << 32 | id of symbols i and i + 1 together, or _NEVER
    for n in range(len(pending)):
        begin, end = pending[n, 1], pending[n, 2]
        if (pending[n, 0] >= 0) != with_rows or end - begin > MAX_MERGED_BYTES:
            continue
        size = _characters(data, begin, end, character_ids, symbols)
        for i in range(size - 1):
            joined[i] = _join(pairs, symbols[i], symbols[i + 1])
        while True:
            best, best_rank = -1, _NEVER >> 32
            for i in range(size - 1):
                rank = joined[i] >> 32
                if rank < best_rank:
                    best, best_rank = i, rank
            if best < 0:
                break
            symbols[best] = joined[best] & 0xFFFFFFFF
            size -= 1
            for i in range(best + 1, size):
                symbols[i] = symbols[i + 1]
            for i in range(best + 1, size - 1):
                joined[i] = joined[i + 1]
            if best > 0:
                joined[best - 1] = _join(pairs, symbols[best - 1], symbols[best])
            if best < size - 1:
                joined[best] = _join(pairs, symbols[best], symbols[best + 1])
        start = num_values
        for i in range(size):
            if symbols[i] >= 0:
                values[num_values] = symbols[i]
                num_values += 1
            else:
                num_values = _spell(~symbols[i], byte_ids, values, num_values)
        count = num_values - start
        place = values[start] if count == 1 else start
        pending_ids[n] = np.uint64(place) << _START_SHIFT | np.uint64(count) << _COUNT_SHIFT
    return num_values


@numba.njit(cache=True, nogil=True)
def _characters(data: np.ndarray, begin: int, end: int, character_ids: np.ndarray, symbols: np.ndarray) -> int:
    """The characters of UTF-8 bytes as symbols; how many."""
    size = 0
    position = begin
    while position < end:
        byte = np.int64(data[position])
        if byte < 0x80:
            code, length = byte, 1
        elif byte < 0xE0:
            code, length = byte & 0x1F, 2
        elif byte < 0xF0:
            code, length = byte & 0x0F, 3
        else:
            code, length = byte & 0x07, 4
        for i in range(1, length):
            code = code << 6 | (np.int64(data[position + i]) & 0x3F)
        symbols[size] = character_ids[code] if character_ids[code] >= 0 else ~code
        size += 1
        position += length
    return size


@numba.njit(cache=True, nogil=True)
def _spell(code: int, byte_ids: np.ndarray, values: np.ndarray, num_values: int) -> int:
    """Write the ids of a code point's UTF-8 bytes; the number of values."""
    if code == 0x20:
        code = 0x2581  # SentencePiece spells the symbol that it puts for the space
    if code < 0x80:
        values[num_values] = byte_ids[code]
        return num_values + 1
    length = 2 if code < 0x800 else 3 if code < 0x10000 else 4
    lead = (0xC0, 0xE0, 0xF0)[length - 2]
    for i in range(length):
        bits = (code >> (6 * (length - 1 - i))) & 0x3F
        values[num_values + i] = byte_ids[(lead | code >> (6 * (length - 1))) if i == 0 else (0x80 | bits)]
    return num_values + length


@numba.njit(cache=True, nogil=True)
def _join(pairs: np.ndarray, left: int, right: int) -> int:
    """rank << 32 | id of the piece that two symbols make together, or _NEVER."""
    if left < 0 or right < 0:
        return _NEVER
    key = _pair_key(np.uint64(left), np.uint64(right))
    row = _pair_row(pairs, key)
    return np.int64(pairs[row, 1]) if pairs[row, 0] == key else _NEVER


@numba.njit(cache=True, nogil=True)
def _pair_key(left: int, right: int) -> int:
    return (left + np.uint64(1)) << np.uint64(32) | (right + np.uint64(1))


@numba.njit(cache=True, nogil=True)
def _pair_row(pairs: np.ndarray, key: int) -> int:
    """The row of that key, or the free row where it would stand."""
    last_row = np.uint64(len(pairs) - 1)
    code = key * _MIX
    row = (code ^ (code >> np.uint64(29))) & last_row
    while pairs[row, 0] != np.uint64(0) and pairs[row, 0] != key:
        row = (row + np.uint64(1)) & last_row
    return row
