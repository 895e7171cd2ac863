"""The chat template over whole batches: what chat_template.encode_conversations() does, many times faster.

A test holds both equal. One loop over plain arrays, compiled by numba where that is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from lumina_ds.data.tokenizer.tokenizer import ROLES, Tokenizer
from preprocess.scan import Conversations

log = logging.getLogger("lumina_ds.preprocess")


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
    """Tokenize and lay out conversations, each with at least one trained turn."""
    contents, offsets = tokenizer.encode_utf8(conversations.texts, conversations.has_space_symbol)
    count, has_bos = conversations.num_conversations, tokenizer.bos_id is not None
    num_tokens = len(contents) + 2 * len(conversations.roles) + has_bos * count
    documents = Documents(
        np.empty(num_tokens, id_dtype), np.empty(num_tokens, np.uint8), np.empty(count, np.int32),
        np.empty(count, np.int32),
    )  # fmt: skip
    role_ids = np.array([tokenizer.role_ids[role] for role in ROLES])
    bos_id = -1 if tokenizer.bos_id is None else tokenizer.bos_id
    turns = (contents, offsets, conversations.roles, conversations.trained, conversations.first_turns)
    _loop()(*turns, role_ids, bos_id, tokenizer.end_id, *documents)
    return documents


@cache
def _loop() -> Callable[..., None]:
    try:
        import numba

        return numba.njit(cache=True, nogil=True)(_fill)
    except (ImportError, RuntimeError) as error:  # not there, or nowhere to keep its code
        log.info("laying out conversations without compiled code, slower: %s", error)
        return _fill


def _fill(
    contents: np.ndarray,
    offsets: np.ndarray,
    roles: np.ndarray,
    trained: np.ndarray,
    first_turns: np.ndarray,
    role_ids: np.ndarray,
    bos_id: int,
    end_id: int,
    ids: np.ndarray,
    mask: np.ndarray,
    lengths: np.ndarray,
    first_trained: np.ndarray,
) -> None:
    """Write `Documents`. contents, offsets: the ids of all turns' contents, flat.

    trained: uint8 [turns]. role_ids: int64 [roles], the marker of each. bos_id: -1 for none.
    """
    to = 0
    for row in range(len(lengths)):
        begin = to
        first_trained[row] = -1
        if bos_id >= 0:
            ids[to], mask[to] = bos_id, 0
            to += 1
        for turn in range(first_turns[row], first_turns[row + 1]):
            is_trained = trained[turn]
            ids[to], mask[to] = role_ids[roles[turn]], 0
            to += 1
            if is_trained and first_trained[row] < 0:
                first_trained[row] = to - begin
            count = offsets[turn + 1] - offsets[turn]
            ids[to : to + count] = contents[offsets[turn] : offsets[turn + 1]]
            ids[to + count] = end_id
            mask[to : to + count + 1] = is_trained
            to += count + 1
        lengths[row] = to - begin
