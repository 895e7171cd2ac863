"""The merges of a SentencePiece BPE model as tables for the compiled encoder of short chunks.

SentencePiece looks up the text of two neighbours among its pieces; here that is a table from the two ids to the
id of the joined piece. It holds the same wherever every character of every piece is a piece itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np

from lumina_ds.data.sentencepiece_file import BYTE, NORMAL, SPACE_SYMBOL, UNUSED, USER_DEFINED, ModelFile

_NUM_CODE_POINTS = 0x110000


class Merges(NamedTuple):
    """character_ids: int32 [code points], -1 where spelled in bytes. pairs: uint64 [a power of two, 2]: left id + 1
    << 32 | right id + 1 (0: free), joined id. scores: float32 [ids]. byte_ids: int32 [256]."""

    character_ids: np.ndarray
    pairs: np.ndarray
    scores: np.ndarray
    byte_ids: np.ndarray


def make_merges(model: ModelFile) -> Merges | None:
    """None for a model whose merges need more than this: user-defined and unused pieces, characters not its own."""
    if any(piece.kind in (USER_DEFINED, UNUSED) for piece in model.pieces):
        return None
    texts = [piece.text.decode() if piece.kind == NORMAL else "" for piece in model.pieces]
    ids = {text: i for i, text in enumerate(texts) if text}
    reserved = [piece for piece in model.pieces if piece.kind != NORMAL and len(piece.text.decode()) < 2]
    byte_ids = [i for i, piece in enumerate(model.pieces) if piece.kind == BYTE]
    if reserved or len(byte_ids) != 256 or not all(character in ids for text in ids for character in text):
        return None
    byte_ids.sort(key=lambda i: int(model.pieces[i].text[1:-1], 16))
    character_ids = np.full(_NUM_CODE_POINTS, -1, np.int32)
    for text, i in ids.items():
        if len(text) == 1:
            character_ids[ord(text)] = i
    # A text's own spaces arrive here as they are; a literal U+2581 never does.
    character_ids[ord(" ")] = character_ids[ord(SPACE_SYMBOL)]
    scores = np.array([piece.score for piece in model.pieces], np.float32)
    return Merges(
        character_ids,
        _pair_table(np.fromiter(chain.from_iterable(_splits(ids)), np.uint64)),
        scores,
        np.array(byte_ids, np.int32),
    )


def _splits(ids: dict[str, int]) -> Iterator[tuple[int, int, int]]:
    """(left, right, joined) of every way to split a piece into two."""
    for text, joined in ids.items():
        for middle in range(1, len(text)):
            left = ids.get(text[:middle])
            if left is not None:
                right = ids.get(text[middle:])
                if right is not None:
                    yield left, right, joined


def _pair_table(splits: np.ndarray) -> np.ndarray:
    """The table of `splits`, uint64 [3 n]: left, right, joined, left, ..."""
    from lumina_ds.data.tokenizer_kernel import fill_pairs

    splits = splits.reshape(-1, 3)
    pairs = np.zeros((1 << max(4, (2 * len(splits)).bit_length()), 2), np.uint64)
    fill_pairs(splits, pairs)
    return pairs
