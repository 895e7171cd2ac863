"""The chat template over whole batches: what chat_template.encode_conversations() does, many times faster.

Compiled where numba is there, else in numpy. A test holds all three equal. Like there, a conversation is [BOS] (role marker, content, end marker) per turn, and
an assistant's content and end marker are trained.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lumina_ds.data.tokenizer.tokenizer import ROLES, Tokenizer
from preprocess.scan import Conversations


class Documents(NamedTuple):
    """Token rows one after the other."""

    ids: np.ndarray  # [tokens] of the dtype asked for
    mask: np.ndarray  # [tokens] uint8, 1 where trained
    lengths: np.ndarray  # [documents] int32
    first_trained: np.ndarray  # [documents] int32, position of the first trained token in its document

    def where(self, chosen: np.ndarray) -> Documents:
        """The documents for which `chosen`, bool [documents], is set."""
        tokens = np.repeat(chosen, self.lengths)
        return Documents(self.ids[tokens], self.mask[tokens], self.lengths[chosen], self.first_trained[chosen])


def lay_out(conversations: Conversations, tokenizer: Tokenizer, id_dtype: np.dtype) -> Documents:
    """Tokenize and lay out conversations, each with at least one assistant turn."""
    contents, offsets = tokenizer.encode_utf8(conversations.texts, conversations.has_space_symbol)
    try:
        from preprocess.layout_kernel import fill_documents
    except (ImportError, RuntimeError):  # no numba, or nowhere to keep its code
        return _lay_out_in_numpy(conversations, contents, offsets, tokenizer, id_dtype)
    count, has_bos = conversations.num_conversations, tokenizer.bos_id is not None
    num_tokens = len(contents) + 2 * len(conversations.roles) + has_bos * count
    documents = Documents(
        np.empty(num_tokens, id_dtype), np.empty(num_tokens, np.uint8), np.empty(count, np.int32),
        np.empty(count, np.int32),
    )  # fmt: skip
    role_ids = np.array([tokenizer.role_ids[role] for role in ROLES])
    bos_id = -1 if tokenizer.bos_id is None else tokenizer.bos_id
    turns = (contents, offsets, conversations.roles, conversations.first_turns)
    fill_documents(*turns, role_ids, ROLES.index("assistant"), bos_id, tokenizer.end_id, *documents)
    return documents


def _lay_out_in_numpy(
    conversations: Conversations,
    contents: np.ndarray,
    offsets: np.ndarray,
    tokenizer: Tokenizer,
    id_dtype: np.dtype,
) -> Documents:
    content_lengths = np.diff(offsets)
    markers = np.array([tokenizer.role_ids[role] for role in ROLES])[conversations.roles]
    trained = conversations.roles == ROLES.index("assistant")
    first_turns = conversations.first_turns
    if not conversations.num_conversations:
        return Documents(np.zeros(0, id_dtype), np.zeros(0, np.uint8), np.zeros(0, np.int32), np.zeros(0, np.int32))

    # One more token before the first turn of each conversation where the tokenizer has a BOS.
    num_before = np.zeros(len(markers), np.int64)
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
