"""The chat template over whole batches, in numpy: what chat_template.encode_conversations() does, many times faster.

A test holds the two equal. Like there, a conversation is [BOS] (role marker, content, end marker) per turn, and
an assistant's content and end marker are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lumina_ds.data.tokenizer import Tokenizer
from preprocess.parse import Turns


class Documents(NamedTuple):
    """Token rows one after the other."""

    ids: np.ndarray  # [tokens] of the dtype asked for
    mask: np.ndarray  # [tokens] uint8, 1 where trained
    lengths: np.ndarray  # [documents] int32
    first_trained: np.ndarray  # [documents] int32, position of the first trained token in its document


def lay_out(conversations: Sequence[Turns], tokenizer: Tokenizer, id_dtype: type[np.generic]) -> Documents:
    """Tokenize and lay out conversations, each with at least one assistant turn."""
    contents, offsets = tokenizer.encode_flat([content for turns in conversations for _, content in turns])
    content_lengths = np.diff(offsets)
    roles = [role for turns in conversations for role, _ in turns]
    markers = np.fromiter(map(tokenizer.role_ids.__getitem__, roles), np.int64, len(roles))
    trained = markers == tokenizer.role_ids["assistant"]
    first_turns = np.cumsum([0] + [len(turns) for turns in conversations])

    # One more token before the first turn of each conversation where the tokenizer has a BOS.
    num_before = np.zeros(len(roles), np.int64)
    num_before[first_turns[:-1]] = tokenizer.bos_id is not None
    ends = np.cumsum(num_before + content_lengths + 2)  # of each turn, its end marker included
    marker_at = ends - content_lengths - 2
    document_ends = ends[first_turns[1:] - 1]
    document_starts = np.concatenate([[0], document_ends[:-1]])

    ids = np.empty(int(ends[-1]), id_dtype)
    is_content = np.ones(len(ids), np.bool_)
    for positions, values in ((marker_at, markers), (ends - 1, tokenizer.end_id), (document_starts, tokenizer.bos_id)):
        if values is not None:
            ids[positions] = values
            is_content[positions] = False
    ids[is_content] = contents

    first_of_conversation = np.flatnonzero(trained)
    first_of_conversation = first_of_conversation[np.searchsorted(first_of_conversation, first_turns[:-1])]
    return Documents(
        ids,
        _mask(trained, marker_at, ends),
        np.diff(document_ends, prepend=0).astype(np.int32),
        (marker_at[first_of_conversation] + 1 - document_starts).astype(np.int32),
    )


def _mask(trained: np.ndarray, marker_at: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """1 from after the marker to the end of every trained turn, 0 elsewhere."""
    lengths = np.empty(2 * len(ends), np.int64)
    lengths[0::2] = marker_at + 1 - np.concatenate([[0], ends[:-1]])
    lengths[1::2] = ends - marker_at - 1
    values = np.zeros(2 * len(ends), np.uint8)
    values[1::2] = trained
    return np.repeat(values, lengths)


def no_documents(id_dtype: type[np.generic]) -> Documents:
    return Documents(np.zeros(0, id_dtype), np.zeros(0, np.uint8), np.zeros(0, np.int32), np.zeros(0, np.int32))
