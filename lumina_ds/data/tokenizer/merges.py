"""The merges of a SentencePiece BPE model as tables for the compiled encoder of short chunks.

SentencePiece looks up the text of two neighbours among its pieces; here that is a table from the two ids to the
id of the joined piece. It holds the same wherever every character of every piece is a piece itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lumina_ds.data.tokenizer.sentencepiece_file import BYTE, NORMAL, SPACE_SYMBOL, UNUSED, USER_DEFINED, ModelFile

_NUM_CODE_POINTS = 0x110000


class Merges(NamedTuple):
    """character_ids: int32 [code points], -1 where spelled in bytes. pairs: uint64 [a power of two, 2]: left id + 1
    << 32 | right id + 1 (0: free); rank << 32 | joined id, the best score having rank 0. byte_ids: int32 [256]."""

    character_ids: np.ndarray
    pairs: np.ndarray
    byte_ids: np.ndarray


def make_merges(model: ModelFile) -> Merges | None:
    """None for a model whose merges need more than this: user-defined and unused pieces, characters not its own."""
    if any(piece.kind in (USER_DEFINED, UNUSED) for piece in model.pieces):
        return None
    texts = [piece.text if piece.kind == NORMAL else b"" for piece in model.pieces]
    characters = {text.decode(): i for i, text in enumerate(texts) if 0 < len(text) <= 4 and len(text.decode()) == 1}
    reserved = [piece for piece in model.pieces if piece.kind != NORMAL and len(piece.text.decode()) < 2]
    byte_ids = [i for i, piece in enumerate(model.pieces) if piece.kind == BYTE]
    if reserved or len(byte_ids) != 256 or not set(b"".join(texts).decode()) <= characters.keys():
        return None
    byte_ids.sort(key=lambda i: int(model.pieces[i].text[1:-1], 16))
    character_ids = np.full(_NUM_CODE_POINTS, -1, np.int32)
    for character, i in characters.items():
        character_ids[ord(character)] = i
    # A text's own spaces arrive here as they are; a literal U+2581 never does.
    character_ids[ord(" ")] = character_ids[ord(SPACE_SYMBOL)]
    # Equal scores have one rank: among them the leftmost pair is joined first.
    _, ranks = np.unique([-piece.score for piece in model.pieces], return_inverse=True)
    return Merges(character_ids, _pair_table(texts, ranks), np.array(byte_ids, np.int32))


def _pair_table(texts: list[bytes], ranks: np.ndarray) -> np.ndarray:
    from lumina_ds.data.tokenizer.kernel import fill_pairs, find_splits

    text = np.frombuffer(b"".join(texts), np.uint8)
    offsets = np.cumsum([0, *map(len, texts)])
    known = np.zeros(1 << (2 * len(texts)).bit_length(), np.int64)
    splits = np.empty((len(text), 3), np.int64)
    splits = splits[: find_splits(text, offsets, known, splits)]
    pairs = np.zeros((1 << max(4, (2 * len(splits)).bit_length()), 2), np.uint64)
    fill_pairs(splits, ranks, pairs)
    return pairs
