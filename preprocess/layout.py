"""The chat template over whole batches: what chat_template.encode_conversations() does, many times faster.

A test holds both equal. One loop over plain arrays, compiled by numba where that is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, TEMPLATES, ChatTemplate
from lumina_ds.data.chat_template import num_context_tokens
from lumina_ds.data.rendering import RENDERED_ROLES
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
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


def lay_out(
    conversations: Conversations,
    tokenizer: Tokenizer,
    id_dtype: np.dtype,
    template: ChatTemplate = TEMPLATES[DEFAULT_TEMPLATE],
) -> Documents:
    """Tokenize and lay out conversations, each with at least one trained turn."""
    contents, offsets = tokenizer.encode_utf8(conversations.texts, conversations.has_space_symbol)
    before, after = (
        _flat_ids(tokens, tokenizer) for tokens in zip(*(template.around(role) for role in RENDERED_ROLES), strict=True)
    )
    bos_id = tokenizer.bos_id if template.bos and tokenizer.bos_id is not None else -1
    count = conversations.num_conversations
    num_added = (np.diff(before[1]) + np.diff(after[1]))[conversations.roles].sum() + (bos_id >= 0) * count
    num_tokens = len(contents) + int(num_added)
    documents = Documents(
        np.empty(num_tokens, id_dtype), np.empty(num_tokens, np.uint8), np.empty(count, np.int32),
        np.empty(count, np.int32),
    )  # fmt: skip
    turns = (contents, offsets, conversations.roles, conversations.trained, conversations.first_turns)
    _loop()(*turns, *before, *after, bos_id, *documents)
    _switch_off_contexts(conversations, offsets, before[1], after[1], bos_id, tokenizer, documents)
    return documents


def _switch_off_contexts(
    conversations: Conversations,
    offsets: np.ndarray,
    before_offsets: np.ndarray,
    after_offsets: np.ndarray,
    bos_id: int,
    tokenizer: Tokenizer,
    documents: Documents,
) -> None:
    """Take the labels from the first tokens of turns that begin with context. Such turns are few."""
    if not conversations.context_bytes:
        return
    roles, first_turns = conversations.roles, conversations.first_turns
    num_before, num_after = np.diff(before_offsets)[roles], np.diff(after_offsets)[roles]
    sizes = np.diff(offsets) + num_before + num_after
    ends = np.cumsum(documents.lengths, dtype=np.int64)
    for turn, num_bytes in conversations.context_bytes.items():
        row = int(np.searchsorted(first_turns, turn, "right")) - 1
        begin = int(ends[row]) - int(documents.lengths[row])
        first = begin + (bos_id >= 0) + int(sizes[first_turns[row] : turn].sum()) + int(num_before[turn])
        ids = documents.ids[first : first + int(offsets[turn + 1] - offsets[turn])].tolist()
        text = conversations.texts.data[conversations.texts.offsets[turn] + 1 :][:num_bytes].tobytes().decode()
        documents.mask[first : first + num_context_tokens(ids, text, tokenizer)] = 0
        documents.first_trained[row] = int(documents.mask[begin : ends[row]].argmax())


def _flat_ids(tokens: Sequence[tuple[str, ...]], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(ids of all roles' special tokens, where each role's begin): int64 [tokens] and [roles + 1]."""
    by_role = [tokenizer.ids_of(names) for names in tokens]
    flat = np.array([token for ids in by_role for token in ids], np.int64)
    return flat, np.cumsum([0, *map(len, by_role)], dtype=np.int64)


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
    before: np.ndarray,
    before_offsets: np.ndarray,
    after: np.ndarray,
    after_offsets: np.ndarray,
    bos_id: int,
    ids: np.ndarray,
    mask: np.ndarray,
    lengths: np.ndarray,
    first_trained: np.ndarray,
) -> None:
    """Write `Documents`. contents, offsets: the ids of all turns' contents, flat.

    trained: uint8 [turns]. before, after: ids of the special tokens around a content, of all roles, flat. bos_id: -1
    for none.
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
            role = roles[turn]
            for special in range(before_offsets[role], before_offsets[role + 1]):
                ids[to], mask[to] = before[special], 0
                to += 1
            if is_trained and first_trained[row] < 0:
                first_trained[row] = max(to - begin, 1)
            count = offsets[turn + 1] - offsets[turn]
            ids[to : to + count] = contents[offsets[turn] : offsets[turn + 1]]
            mask[to : to + count] = is_trained
            to += count
            for special in range(after_offsets[role], after_offsets[role + 1]):
                ids[to], mask[to] = after[special], is_trained
                to += 1
        # Nothing predicts a first token, which is one of a text where the tokenizer has no BOS.
        if to > begin:
            mask[begin] = 0
        lengths[row] = to - begin
